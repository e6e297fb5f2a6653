"""Start of a run on all ranks: process groups, lock, data, watchdog and output files.

Each step succeeds on all ranks or raises the same error on all of them.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from pretrain import console, parallel
from pretrain.build import Run
from pretrain.config import Config, to_dict
from pretrain.data import Data, RankShare, data_config, open_data
from pretrain.data.sources import source_types
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from pretrain.model.attention import slow_attention
from pretrain.model.kernels import transformer_engine_problem
from pretrain.model.megatron_config import check_megatron
from pretrain.parallel import ParallelContext
from pretrain.runtime import live, without_cuda
from pretrain.runtime.faults import Watchdog, record_collectives
from pretrain.runtime.metrics_writer import MetricsWriter
from pretrain.runtime.output import warn
from pretrain.runtime.progress import Progress
from pretrain.runtime.run_lock import RunLock
from pretrain.runtime.wandb_run import open_run

# Seconds between progress messages while the data is prepared.
_PROGRESS_SECONDS = 60.0


def set_up(config: Config) -> tuple[ParallelContext, Data]:
    """Join the other processes and open the data."""
    context = join(config)
    return context, prepare_data(config, context)


def join(config: Config) -> ParallelContext:
    """Join the other processes, which must have the same configuration."""
    config.check_world_size(parallel.world_size())
    source_types(config.data)  # raises if a source is misconfigured
    record_collectives(Path(config.run_dir))
    context = parallel.start(config.parallel, config.seed, config.faults.collective_limit)
    parallel.require_same("the configuration", repr(config))
    kernels = parallel.call_on_all_ranks(lambda: check_megatron(config))
    parallel.require_same(f"the selection of kernels={config.kernels}", kernels)
    if kernels == "torch" and context.is_main:
        _warn_of_slow_kernels(config, context)
    return context


def _warn_of_slow_kernels(config: Config, context: ParallelContext) -> None:
    if slow := slow_attention(config, context.device):
        warn(slow)
    if without_cuda.USE_CUDA and config.kernels == "auto":
        problem = transformer_engine_problem(config)
        warn(f"Transformer Engine is not used: {problem}; or set kernels=torch")


@contextlib.contextmanager
def lock(config: Config, context: ParallelContext) -> Iterator[RunLock | None]:
    """Keep other jobs from writing into the run's folder.

    Yields:
        The main rank's lock; None on other ranks.
    """
    with contextlib.ExitStack() as stack:

        def acquire() -> RunLock | None:
            run_lock = RunLock(Path(config.run_dir)) if context.is_main else None
            return stack.enter_context(run_lock) if run_lock else None

        yield parallel.call_on_all_ranks(acquire, context.patient_group)


def prepare_data(config: Config, context: ParallelContext) -> Data:
    """Complete the cache on the main rank, then open the data on every rank.

    Indexing and training a tokenizer can take hours, for which the other ranks wait.
    """

    def opened() -> Data:
        share = RankShare(context.data_rank, context.data_size, config.global_batch_size)
        data = open_data(data_config(config), config.vision.patch_size, config.seed, share)
        _check_vocabulary(config, data.tokenizer)
        return data

    with _progress_messages(context), Progress("preparing the data"):
        prepared = parallel.call_on_all_ranks(
            lambda: opened() if context.is_main else None, context.patient_group
        )
    data = parallel.call_on_all_ranks(
        lambda: opened() if prepared is None else prepared, context.patient_group
    )
    parallel.require_same("the data", data.fingerprint)
    return data


def _check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    tokens, tensor = tokenizer.vocab_size, config.parallel.tensor
    rows = config.language.vocab_rows(tokens)
    if rows < tokens:
        raise PretrainError(
            f"language.vocab_size={rows} is less than the {tokens} tokens of {tokenizer.name}: "
            "raise it, or leave it out"
        )
    if rows % tensor:
        raise PretrainError(
            f"parallel.tensor={tensor} does not divide the {tokens} tokens of {tokenizer.name}: "
            f"choose a divisor, or set language.vocab_size={-(-tokens // tensor) * tensor}"
        )


@contextlib.contextmanager
def _progress_messages(context: ParallelContext) -> Iterator[None]:
    """Print from time to time, on the main rank, that the data is being prepared."""
    done = threading.Event()

    def print_messages() -> None:
        started = time.monotonic()
        while not done.wait(_PROGRESS_SECONDS):
            minutes = (time.monotonic() - started) / 60
            print(f"preparing the data for {minutes:.0f} minutes so far", flush=True)

    if context.is_main and live.terminal() is None:
        threading.Thread(target=print_messages, name="progress", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def watch(config: Config, context: ParallelContext) -> Watchdog:
    """Create this rank's watchdog, which ends a run that hangs."""
    run_dir, seconds = Path(config.run_dir), config.faults.hang_seconds

    def create() -> Watchdog:
        with _writing_to(run_dir):
            return Watchdog(seconds, context.rank, context.world_size, run_dir)

    return parallel.call_on_all_ranks(create)


def open_metrics(run: Run, steps_done: int, activity: Callable[[], str]) -> MetricsWriter:
    """Open the files that the main rank writes, and the live view.

    Args:
        steps_done: number of updates in the checkpoint that the run resumes from.
        activity: returns what the run is doing.
    """
    config, run_dir = run.config, Path(run.config.run_dir)
    wandb = partial(open_run, config.wandb, run_dir, to_dict(config))

    def create() -> MetricsWriter:
        with _writing_to(run_dir):
            writer = MetricsWriter(
                run_dir,
                config.steps,
                steps_done,
                config.log_every,
                enabled=run.context.is_main,
                wandb=wandb if config.wandb.enabled else None,
                activity=activity,
            )
            writer.begin(run.assignment, console.start_record(run, steps_done))
            return writer

    return parallel.call_on_all_ranks(create)


@contextlib.contextmanager
def _writing_to(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PretrainError(
            f"cannot write into run_dir={run_dir}: {error.strerror or error}"
        ) from error
