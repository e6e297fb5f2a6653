"""Training, from top to bottom."""

import contextlib
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pretrain import batches, report, state
from pretrain.build import build
from pretrain.config import Config, to_dict
from pretrain.data import Data, Dealing, prepare, settings
from pretrain.errors import PretrainError
from pretrain.evaluate import held_out_losses, transcribe
from pretrain.runtime import checkpoint, processes
from pretrain.runtime.faults import TERMINATED, Guard, RollBack, Watchdog, on_sigterm
from pretrain.runtime.metrics import MetricsWriter, held_out_line, plot, read
from pretrain.runtime.processes import Processes
from pretrain.runtime.profiler import Profiler
from pretrain.runtime.wandb_run import open_run
from pretrain.step import train_step


def train(config: Config) -> None:
    """Train to ``config.steps``, from the run's newest checkpoint if it has one.

    Raises:
        PretrainError: anything that the user can put right; all ranks raise the same.
        SystemExit: with status 143, after SIGTERM: the step at hand was finished and saved.
    """
    here, data = set_up(config)
    with watch(config, here) as watchdog:
        _train(config, here, data, watchdog)
    processes.stop()


def _train(config: Config, here: Processes, data: Data, watchdog: Watchdog) -> None:
    run = build(config, here, data)
    guard = Guard(config.faults)
    watchdog.beat("taking up the newest checkpoint")
    done = state.restore(run, guard)
    state.keep_tokenizer(run)

    run_dir = Path(config.run_dir)
    out = open_metrics(config, here, done)
    profiler = Profiler(config.profile.steps, run_dir / "traces", here.rank)
    out.say(report.opening(run, done))
    skipped = batches.SkippedOfRun(config, here, data)
    skipped.settle()
    out.save("parameters.txt", run.assignment)
    out.append("starts.jsonl", report.start(run, done))

    def numbers() -> Iterator[int]:
        """Of the batches to come, one more than are needed so far: a step may be taken back."""
        number = done + guard.passed_over
        while done < config.steps and number <= config.steps + guard.passed_over:
            yield (number := number + 1)

    with contextlib.closing(state.saver(run)) as saver, on_sigterm() as termination:
        if done == 0:
            watchdog.beat("the evaluation before the first step")
            out.write({"step": 0, **held_out_losses(run)})
        began = time.monotonic()
        for number, micro_batches in batches.ahead(config, here, data, numbers(), skipped):
            step = number - guard.passed_over
            watchdog.beat(f"step {step}")
            profiler.before(step)
            try:
                metrics = train_step(run, micro_batches, step, guard)
            except RollBack as why:
                to = state.roll_back(run, saver, guard, step, why)
                out.say(f"step {step}: {why}; on from step {to}, with the data after this step's")
                began = time.monotonic()
                continue
            if metrics["loss"] is None and guard.empty == 1:
                out.say(
                    f"step {step}: no token of the batch has a label, so nothing was updated; "
                    "empty_steps in the metrics counts such steps"
                )
            profiler.after(step)
            seconds = time.monotonic() - began
            metrics["tokens_per_second"] = metrics["tokens"] / seconds
            metrics["mfu"] = metrics["model_flops"] / seconds / run.monitor.peak_flops
            if step % config.evaluation.every == 0 or step == config.steps:
                watchdog.beat(f"the evaluation after step {step}")
                metrics |= held_out_losses(run)
            out.write(metrics)
            watchdog.beat(f"the checkpoint of step {step}")
            unwritten, ends = processes.any_rank(saver.failed(), termination.asked)
            if unwritten:
                saver.wait()  # tells what failed
            if step % config.checkpoint.every == 0 or step == config.steps or ends:
                state.save(run, saver, guard, step)
            if ends and step < config.steps:
                saver.wait()
                out.say(f"SIGTERM: saved after step {step}; started again, the run goes on")
                out.close()
                raise SystemExit(TERMINATED)
            if step == config.steps:
                break
            began = time.monotonic()
        saver.wait()

    watchdog.beat("the transcription of held-out images")
    transcriptions = transcribe(run)
    out.save("transcriptions.json", json.dumps(transcriptions))
    out.close()
    if here.is_main:
        print(report.closing(read(out.path), transcriptions))
        print(f"curves: {plot(run_dir)}")


def evaluate(config: Config) -> None:
    """Print the held-out losses of a run's newest checkpoint, and what it reads.

    Raises:
        PretrainError: there is no checkpoint, or it cannot be taken up.
    """
    here, data = set_up(config)
    run = build(config, here, data)
    step = state.restore(run)
    if not checkpoint.steps(state.folder(run)):
        raise PretrainError(f"{config.run_dir} has no checkpoint to evaluate: train first")
    losses = {"step": step, **held_out_losses(run)}
    transcriptions = transcribe(run)
    if here.is_main:
        print(held_out_line(losses))
        print(report.readings(transcriptions))
    processes.stop()


def watch(config: Config, here: Processes) -> Watchdog:
    """This rank's watchdog; all ranks leave together where one cannot write its file."""
    failure: Exception | None = None
    try:
        watchdog = Watchdog(
            config.faults.hang_seconds, here.rank, here.world_size, Path(config.run_dir)
        )
    except OSError as error:
        failure = PretrainError(f"cannot write into run_dir={config.run_dir}: {error.strerror}")
    processes.agree(failure)
    return watchdog


def open_metrics(config: Config, here: Processes, done: int) -> MetricsWriter:
    """Open what the main rank writes; all ranks leave together where it cannot."""
    run_dir = Path(config.run_dir)
    wandb = partial(open_run, config.wandb, run_dir, to_dict(config))
    failure: Exception | None = None
    try:
        out = MetricsWriter(
            run_dir,
            config.steps,
            done,
            config.log_every,
            enabled=here.is_main,
            wandb=wandb if config.wandb.enabled else None,
        )
    except OSError as error:
        failure = PretrainError(f"cannot write into run_dir={run_dir}: {error.strerror}")
    except PretrainError as error:
        failure = error
    processes.agree(failure)
    return out


def set_up(config: Config) -> tuple[Processes, Data]:
    """Join the other processes, all of one mind, and open the data."""
    config.check_world_size(processes.world_size())
    here = processes.start(config.parallel, config.seed)
    processes.require_same("the configuration", repr(config))
    return here, prepare_data(config, here)


def prepare_data(config: Config, here: Processes) -> Data:
    """The main rank makes what is missing in the cache; then every rank opens it."""
    prepared, failure = None, None
    for turn in (here.is_main, not here.is_main):
        if turn:
            try:
                dealing = Dealing(here.data_rank, here.data_size, config.global_batch_size)
                prepared = prepare(settings(config), config.vision.patch_size, config.seed, dealing)
                _check_vocabulary(config, prepared)
            except Exception as error:
                failure = error
        processes.agree(failure)
    assert prepared is not None
    processes.require_same("the data", prepared.fingerprint)
    return prepared


def _check_vocabulary(config: Config, data: Data) -> None:
    if data.tokenizer.vocab_size % config.parallel.tensor:
        raise PretrainError(
            f"parallel.tensor={config.parallel.tensor} does not divide the "
            f"{data.tokenizer.vocab_size} tokens of {data.tokenizer.name}: choose a divisor"
        )
