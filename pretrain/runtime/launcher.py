"""Starting the processes of a run on one machine, as torchrun does.

torchrun itself ends with a traceback if a process has failed or Ctrl-C was pressed, after the
error line or the traceback of that process. This launcher uses its agent and prints only what the
processes have not printed.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

from pretrain.errors import PretrainError
from pretrain.runtime import footer, live, stopping


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run ``python -m pretrain`` in several processes and wait for all of them.

    When one of them fails, the others are ended. Signals are passed on to all of them.

    Args:
        arguments: command line of every process.
        processes: their number.

    Returns:
        The exit status: that of the process that failed first, or 128 + a signal's number.

    Raises:
        PretrainError: a launcher has already started this process.
    """
    if "RANK" in os.environ:
        raise PretrainError(
            "a launcher such as torchrun has already started the processes: leave --processes out"
        )
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The default of torchrun, which it otherwise prints in a box of stars.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Have malloc use huge pages, which saves processor time of a step on a CPU. glibc reads this
    # before the process starts, so the process cannot set it itself.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    # It reports failures and signals, too.
    logging.disable(logging.ERROR)
    try:
        run.main(["--nproc-per-node", str(processes), "-m", "pretrain", *arguments])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _status(rank, failure.exitcode)
    except SignalException as error:
        return stopping.status(error.sigval)
    finally:
        logging.disable(logging.NOTSET)
        _restore_terminal()
    return 0


def _restore_terminal() -> None:
    """Remove the live view of a process that was killed; without one, nothing changes."""
    if (stream := live.terminal()) is not None:
        with contextlib.suppress(OSError):  # the terminal is closed
            stream.write(footer.RELEASE)
            stream.flush()


def _status(rank: int, exit_code: int) -> int:
    """Exit status after a process failed; name the signal that ended it, if any."""
    if exit_code >= 0:  # the process has printed an error or a traceback
        return exit_code
    number = -exit_code
    hint = " (is there enough memory?)" if number == signal.SIGKILL else ""
    print(
        f"error: rank {rank} was ended by {stopping.name(number)}{hint}",
        file=sys.stderr,
        flush=True,
    )
    return stopping.status(number)
