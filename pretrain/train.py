"""Training, from top to bottom."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pretrain import batches, checkpoint, console, parallel
from pretrain.build import Run, build
from pretrain.checkpoint import storage
from pretrain.config import Config, to_dict
from pretrain.data import Data, RankShare, data_config, open_data
from pretrain.data.sources import source_types
from pretrain.errors import PretrainError
from pretrain.evaluate import held_out_losses, transcribe
from pretrain.metrics import read
from pretrain.parallel import ParallelContext
from pretrain.plots import save_curves
from pretrain.runtime import stopping
from pretrain.runtime.faults import Guard, RollBack, Watchdog
from pretrain.runtime.metrics_writer import MetricsWriter
from pretrain.runtime.output import warn
from pretrain.runtime.profiler import Profiler
from pretrain.runtime.run_lock import RunLock
from pretrain.runtime.stopping import Termination
from pretrain.runtime.terminal import held_out_line
from pretrain.runtime.wandb_run import open_run
from pretrain.step import train_step

# Seconds between lines about a preparation that other ranks wait for.
_NEWS_SECONDS = 60.0


def train(config: Config) -> None:
    """Train to ``config.steps``, from the run's newest checkpoint if it has one.

    Raises:
        PretrainError: anything that the user can put right; all ranks raise the same.
        SystemExit: after SIGTERM, SIGINT or SIGHUP, with status 128 + the signal's number. A step
            that had begun was finished and saved.
    """
    with stopping.on_signals() as termination:
        context = join(config)
        with lock(config, context) as run_lock:
            data = prepare_data(config, context)
            with watch(config, context) as watchdog:
                _train(config, context, data, watchdog, termination, run_lock)
        parallel.stop()


def _train(
    config: Config,
    context: ParallelContext,
    data: Data,
    watchdog: Watchdog,
    termination: Termination,
    run_lock: RunLock | None,
) -> None:
    run = build(config, context, data)
    guard = Guard(config.faults)
    watchdog.beat("taking up the newest checkpoint")
    done = checkpoint.restore(run, guard)
    checkpoint.keep_tokenizer(run)

    run_dir = Path(config.run_dir)
    out = open_metrics(run, done)
    profiler = Profiler(config.profile.steps, run_dir / "traces", context.rank)
    out.say(console.opening(run, done))
    skipped = batches.SkippedSamples(config, context, data)
    skipped.synchronize()

    def numbers() -> Iterator[int]:
        """Numbers of the batches, one more than needed so far: a step may be taken back."""
        number = done + guard.skipped_batches
        while done < config.steps and number <= config.steps + guard.skipped_batches:
            yield (number := number + 1)

    with contextlib.closing(checkpoint.saver(run)) as saver:
        if done == 0:
            watchdog.beat("the evaluation before the first step")
            out.write({"step": 0, **held_out_losses(run)})
        began = time.monotonic()
        termination.saves = True
        for number, micro_batches in batches.prefetch(config, context, data, numbers(), skipped):
            step = number - guard.skipped_batches
            watchdog.beat(f"step {step}")
            profiler.before(step)
            try:
                metrics = train_step(run, micro_batches, step, guard)
            except RollBack as why:
                to = checkpoint.roll_back(run, saver, guard, step, why)
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
            metrics["mfu"] = metrics["model_flops"] / seconds / run.step_metrics.peak_flops
            if step % config.evaluation.every == 0 or step == config.steps:
                watchdog.beat(f"the evaluation after step {step}")
                metrics |= held_out_losses(run)
            out.write(metrics)
            watchdog.beat(f"the checkpoint of step {step}")
            unwritten, taken, ends = parallel.max_over_ranks(
                saver.failed(), run_lock is not None and run_lock.lost, termination.signal
            )
            if taken:
                raise PretrainError(
                    f"another job has taken run_dir={run_dir} since its run.lock was deleted: "
                    f"this one ends at step {step}, without saving"
                )
            if unwritten:
                saver.wait()  # tells what failed
            if step % config.checkpoint.every == 0 or step == config.steps or ends:
                checkpoint.save(run, saver, guard, step)
            if ends and step < config.steps:
                saver.wait()
                out.say(
                    f"{stopping.name(ends)}: saved after step {step}; start it again to continue"
                )
                out.close()
                raise SystemExit(stopping.status(ends))
            if step == config.steps:
                break
            began = time.monotonic()
        saver.wait()
    termination.saves = False  # all is saved

    watchdog.beat("the transcription of held-out images")
    transcriptions = transcribe(run)
    out.save("transcriptions.json", json.dumps(transcriptions))
    out.close()
    if context.is_main:
        records, curves = read(out.path), run_dir / "curves.png"
        print(console.closing(records, transcriptions))
        try:
            save_curves(records, curves)
            print(f"curves: {curves}")
        except OSError as error:
            warn(f"cannot write {curves}: {error.strerror}")


def evaluate(config: Config) -> None:
    """Print the held-out losses of a run's newest checkpoint, and what it reads.

    Raises:
        PretrainError: there is no checkpoint, or it cannot be taken up.
    """
    context, data = set_up(config)
    run = build(config, context, data)
    step = checkpoint.restore(run)
    if not storage.steps(checkpoint.folder(run)):
        raise PretrainError(f"{config.run_dir} has no checkpoint to evaluate: train first")
    losses = {"step": step, **held_out_losses(run)}
    transcriptions = transcribe(run)
    if context.is_main:
        print(held_out_line(losses))
        print(console.readings(transcriptions))
    parallel.stop()


def join(config: Config) -> ParallelContext:
    """Join the other processes, which have the same configuration."""
    config.check_world_size(parallel.world_size())
    source_types(config.data)  # raises if a source is misconfigured
    context = parallel.start(config.parallel, config.seed, config.faults.hang_seconds)
    parallel.require_same("the configuration", repr(config))
    return context


def set_up(config: Config) -> tuple[ParallelContext, Data]:
    """Join the other processes, and open the data."""
    context = join(config)
    return context, prepare_data(config, context)


@contextlib.contextmanager
def lock(config: Config, context: ParallelContext) -> Iterator[RunLock | None]:
    """Within, no other job writes into the run's folder; all ranks fail together if one does.

    Yields:
        The main rank's lock; None on other ranks.
    """
    with contextlib.ExitStack() as stack:

        def acquire() -> RunLock | None:
            run_lock = RunLock(Path(config.run_dir)) if context.is_main else None
            return stack.enter_context(run_lock) if run_lock else None

        yield parallel.call_on_all_ranks(acquire, context.patient_group)


def watch(config: Config, context: ParallelContext) -> Watchdog:
    """This rank's watchdog; all ranks fail together if one cannot write its file."""

    def make() -> Watchdog:
        run_dir, seconds = Path(config.run_dir), config.faults.hang_seconds
        try:
            return Watchdog(seconds, context.rank, context.world_size, run_dir)
        except OSError as error:
            raise unwritable(run_dir, error) from error

    return parallel.call_on_all_ranks(make)


def unwritable(run_dir: Path, error: OSError) -> PretrainError:
    return PretrainError(f"cannot write into run_dir={run_dir}: {error.strerror or error}")


def open_metrics(run: Run, done: int) -> MetricsWriter:
    """Open the files that the main rank writes; all ranks fail together if it cannot.

    Args:
        done: steps that are in the checkpoint that the run continues from.
    """
    config, run_dir = run.config, Path(run.config.run_dir)
    wandb = partial(open_run, config.wandb, run_dir, to_dict(config))

    def make() -> MetricsWriter:
        try:
            out = MetricsWriter(
                run_dir,
                config.steps,
                done,
                config.log_every,
                enabled=run.context.is_main,
                wandb=wandb if config.wandb.enabled else None,
            )
            out.begin(run.assignment, console.start_record(run, done))
            return out
        except OSError as error:
            raise unwritable(run_dir, error) from error

    return parallel.call_on_all_ranks(make)


def prepare_data(config: Config, context: ParallelContext) -> Data:
    """The main rank makes what is missing in the cache; then every rank opens it.

    Indexing and training a tokenizer can take hours: other ranks wait for as long as that takes.
    """

    def opened() -> Data:
        share = RankShare(context.data_rank, context.data_size, config.global_batch_size)
        data = open_data(data_config(config), config.vision.patch_size, config.seed, share)
        _check_vocabulary(config, data)
        return data

    with _news_of_waiting(context):
        prepared = parallel.call_on_all_ranks(
            lambda: opened() if context.is_main else None, context.patient_group
        )
    data = parallel.call_on_all_ranks(
        lambda: opened() if prepared is None else prepared, context.patient_group
    )
    parallel.require_same("the data", data.fingerprint)
    return data


@contextlib.contextmanager
def _news_of_waiting(context: ParallelContext) -> Iterator[None]:
    """Within, say now and then that the data is being prepared."""
    done = threading.Event()

    def tell() -> None:
        began = time.monotonic()
        while not done.wait(_NEWS_SECONDS):
            minutes = (time.monotonic() - began) / 60
            print(f"preparing the data for {minutes:.0f} minutes so far", flush=True)

    thread = threading.Thread(target=tell, name="news", daemon=True)
    if context.is_main:
        thread.start()
    try:
        yield
    finally:
        done.set()


def _check_vocabulary(config: Config, data: Data) -> None:
    if data.tokenizer.vocab_size % config.parallel.tensor:
        raise PretrainError(
            f"parallel.tensor={config.parallel.tensor} does not divide the "
            f"{data.tokenizer.vocab_size} tokens of {data.tokenizer.name}: choose a divisor"
        )
