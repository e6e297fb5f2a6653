"""The training loop, from top to bottom."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from pretrain import batches, checkpoint, console, parallel, startup
from pretrain.build import Run, build
from pretrain.checkpoint import storage
from pretrain.checkpoint.saver import Saver
from pretrain.config import Config
from pretrain.data import Data
from pretrain.errors import PretrainError
from pretrain.evaluate import held_out, held_out_losses, transcribe
from pretrain.metrics import read
from pretrain.parallel import ParallelContext
from pretrain.plots import save_curves
from pretrain.reading import Reading, listing
from pretrain.runtime import stopping, stragglers
from pretrain.runtime.faults import Guard, RollBack, Watchdog, naming_lost_ranks
from pretrain.runtime.machine import cores_per_process
from pretrain.runtime.metrics_writer import MetricsWriter
from pretrain.runtime.output import warn
from pretrain.runtime.profiler import Profiler
from pretrain.runtime.progress import Progress
from pretrain.runtime.run_lock import RunLock, require_folder
from pretrain.runtime.stopping import Termination
from pretrain.runtime.stragglers import StepClock
from pretrain.runtime.terminal import held_out_line
from pretrain.step import check_weights, plan_images, train_step


def train(config: Config) -> None:
    """Train to ``config.steps``, from the run's newest checkpoint if it has one.

    Raises:
        PretrainError: an error that the user can resolve; the same on all ranks.
        LostRankError: another rank has ended or does not answer.
        SystemExit: after SIGTERM, SIGINT or SIGHUP, with status 128 + the signal's number. The
            current step has been finished and saved.
    """
    with stopping.on_signals() as termination:
        context = startup.join(config)
        with (
            naming_lost_ranks(Path(config.run_dir), context.rank, "the start of the run"),
            startup.lock(config, context) as run_lock,
        ):
            data = startup.prepare_data(config, context)
            with startup.watch(config, context) as watchdog:
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
    watchdog.beat("loading the newest checkpoint")
    checkpoint.flush_local_tier(run)
    steps_done = checkpoint.restore(run, guard)
    checkpoint.keep_tokenizer(run)

    writer = startup.open_metrics(run, steps_done, lambda: watchdog.activity)
    profiler = Profiler(config.profile.steps, Path(config.run_dir, "traces"), context.rank)
    writer.say(console.opening(run, steps_done))
    skipped = batches.SkippedSamples(config, context, data)
    skipped.synchronize()
    readings: list[Reading] | None = None

    with (
        checkpoint.saver(run) as saver,
        contextlib.closing(
            StepClock(context.device, config.parallel.pipeline, config.log_every)
        ) as clock,
        contextlib.ExitStack() as stack,
    ):
        if steps_done == 0:
            watchdog.beat("the evaluation before the first step")
            writer.write({"step": 0, **held_out_losses(run)})
        clock.start(steps_done + 1)
        termination.saves = True
        numbers = _batch_numbers(config, guard, steps_done)
        plan_ahead = partial(plan_images, run, ahead=True)
        prefetch = batches.prefetch(
            config, context, data, numbers, skipped, plan_ahead,
            in_background=_prefetches_in_background(config, context.device),
        )  # fmt: skip
        prefetched = stack.enter_context(contextlib.closing(prefetch))
        for number, micro_batches, plan in prefetched:
            step = number - guard.skipped_batches
            watchdog.beat(f"step {step}")
            profiler.before(step)
            is_last = step == config.steps
            saves = is_last or step % config.checkpoint.every == 0
            try:
                metrics = train_step(run, micro_batches, step, guard, plan)
                if saves:
                    check_weights(run, step, config.faults.non_finite)
            except RollBack as why:
                to = checkpoint.roll_back(run, saver, guard, step, why)
                writer.say(
                    f"step {step}: {why}; continuing from step {to} with the data after this step's"
                )
                clock.start(to + 1)
                continue
            if metrics["loss"] is None and guard.empty == 1:
                writer.say(
                    f"step {step}: no token of the batch has a label, so nothing was updated; "
                    "empty_steps in the metrics counts such steps"
                )
            profiler.after(step)
            seconds, comparison = clock.stop()
            metrics |= comparison
            metrics["tokens_per_second"] = metrics["tokens"] / seconds
            metrics["mfu"] = metrics["model_flops"] / seconds / run.step_metrics.peak_flops
            if is_last or step % config.evaluation.every == 0:
                watchdog.beat(f"the evaluation after step {step}")
                scores, readings = held_out(run)
                metrics |= scores
                writer.save("transcriptions.json", json.dumps(readings))
            writer.write(metrics)
            if slow := stragglers.report(metrics, config.faults.straggler_ratio):
                writer.say(slow)

            watchdog.beat(f"the checkpoint of step {step}")
            signal = _agree_on_end(config, step, saver, run_lock, writer, termination)
            if signal and not saves:
                check_weights(run, step, "stop")
            if saves or signal:
                checkpoint.save(run, saver, guard, step)
            if is_last:
                break
            if signal:
                saver.wait()
                writer.say(
                    f"{stopping.name(signal)}: saved after step {step}; start it again to continue"
                )
                writer.close()
                raise SystemExit(stopping.status(signal))
            clock.start(step + 1)
        saver.wait()
    termination.saves = False  # everything is saved

    if readings is None:  # the run had ended before
        watchdog.beat("the transcription of held-out images")
        readings = transcribe(run)
    _finish(run, writer, readings)


def _prefetches_in_background(config: Config, device: torch.device) -> bool:
    """Whether a thread prepares the next batch during a step.

    The built-in data is drawn without waiting for anything. Where all cores compute the step, a
    thread that draws it interrupts them, and the step takes longer.
    """
    has_idle_core = device.type != "cpu" or cores_per_process() > torch.get_num_threads()
    return has_idle_core or bool(config.data.sources)


def _batch_numbers(config: Config, guard: Guard, steps_done: int) -> Iterator[int]:
    """Numbers of the batches to prefetch.

    One more than the steps need: the last step may be rolled back, and the next batch is then used.
    """
    number = steps_done + guard.skipped_batches
    while steps_done < config.steps and number <= config.steps + guard.skipped_batches:
        yield (number := number + 1)


def _agree_on_end(
    config: Config,
    step: int,
    saver: Saver,
    run_lock: RunLock | None,
    writer: MetricsWriter,
    termination: Termination,
) -> int:
    """Exchange reasons to end the run early; the result is the same on all ranks.

    Returns:
        The number of a received signal; 0: none.

    Raises:
        PretrainError: a checkpoint could not be written, another job has taken the run's folder, or
            it was deleted.
    """
    save_failed, lock_lost, deleted, signal = parallel.max_over_ranks(
        saver.failed(), run_lock is not None and run_lock.lost, writer.deleted, termination.signal
    )
    require_folder(config.run_dir, step, metrics_deleted=bool(deleted), lock_lost=bool(lock_lost))
    if save_failed:
        saver.wait()  # raises the error
    return signal


def _finish(run: Run, writer: MetricsWriter, readings: Sequence[Reading]) -> None:
    """Write and print the summary of the run."""
    writer.close()
    if run.context.is_main:
        records, curves = read(writer.path), Path(run.config.run_dir, "curves.png")
        print(console.closing(records, readings))
        try:
            save_curves(records, curves)
            print(f"curves: {curves}")
        except OSError as error:
            warn(f"cannot write {curves}: {error.strerror}")


def evaluate(config: Config) -> None:
    """Print the held-out losses of a run's newest checkpoint, and its transcriptions.

    Raises:
        PretrainError: there is no checkpoint, or it cannot be loaded.
    """
    context = startup.join(config)
    with naming_lost_ranks(Path(config.run_dir), context.rank, "the evaluation"):
        _evaluate(config, context)
    parallel.stop()


def _evaluate(config: Config, context: ParallelContext) -> None:
    run = build(config, context, startup.prepare_data(config, context))
    step = checkpoint.restore(run)
    if not storage.steps(checkpoint.folder(run)):
        raise PretrainError(f"{config.run_dir} has no checkpoint to evaluate: train first")
    with Progress("evaluating held-out data"):
        scores, readings = held_out(run)
    if context.is_main:
        print(held_out_line({"step": step, **scores}))
        if readings:
            print(listing(readings))
