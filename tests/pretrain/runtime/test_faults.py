"""Bad steps are detected, also after resuming, and hung or lost ranks end a run."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import FaultConfig
from pretrain.errors import LostRankError, PretrainError
from pretrain.runtime import faults, without_cuda
from pretrain.runtime.faults import Guard, Watchdog, is_spike, naming_lost_ranks

LOSSES = st.lists(st.floats(0.5, 12), min_size=4, max_size=64)


@given(LOSSES, st.floats(1, 20))
def test_spikes_exceed_previous_losses_and_outliers_do_not_hide_spikes(
    losses: list[float], deviations: float
) -> None:
    assert not is_spike(min(losses), losses, deviations)
    assert is_spike(1e6, losses, deviations)
    steady = [4.0, 4.1, 3.9, 4.05, 3.95, 4.0, 4.1]
    assert is_spike(6.0, [*steady, 50.0], deviations=10)
    assert not is_spike(4.3, [*steady, 50.0], deviations=10)


def test_rounding_of_constant_losses_is_no_spike() -> None:
    assert not is_spike(3.0001, [3.0] * 8, deviations=10)
    assert is_spike(3.1, [3.0] * 8, deviations=10)


@given(st.lists(st.sampled_from([4.0, 4.1, 3.9, 9.0, math.nan, None]), max_size=30), st.data())
def test_restored_guards_decide_as_uninterrupted_ones(
    losses: list[float | None], data: st.DataObject
) -> None:
    config = FaultConfig(non_finite="skip", spike="skip", spike_window=4, max_in_a_row=99)
    saved_at = data.draw(st.integers(0, len(losses)))
    guard, restored = Guard(config), Guard(config)
    for loss in losses[:saved_at]:
        guard.judge(loss, 1.0)
    restored.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    for loss in losses[saved_at:]:
        assert str(guard.judge(loss, 1.0)) == str(restored.judge(loss, 1.0))
    assert guard.state_dict() == restored.state_dict()


def test_steps_are_skipped_up_to_the_limit() -> None:
    guard = Guard(FaultConfig(non_finite="skip", max_in_a_row=2))
    for _ in range(3):  # a good step resets the count
        assert guard.judge(4.0, 1.0) is None
        for _ in range(2):
            fault = guard.judge(4.0, math.inf)
            assert fault is not None and fault.action == "skip"
    assert guard.skipped == 6
    fault = guard.judge(math.nan, 1.0)
    assert fault is not None and (fault.action, fault.skipped) == ("stop", 2)


def test_steps_without_labels_are_always_skipped() -> None:
    for action in ("stop", "skip", "roll_back"):
        guard = Guard(FaultConfig(non_finite=action, spike=action, spike_window=4))
        for _ in range(9):
            fault = guard.judge(None, math.nan)
            assert fault is not None and (fault.kind, fault.action) == ("empty", "skip")
        assert (guard.empty, guard.skipped) == (9, 0)
        assert guard.judge(4.0, 1.0) is None


def test_rolling_back_skips_data_and_gives_up_after_returning_too_often() -> None:
    guard = Guard(FaultConfig(non_finite="roll_back", max_in_a_row=2))
    guard.roll_back(7, 5, {})
    assert guard.skipped_batches == 2
    guard.roll_back(6, 5, {"passed_over": 0})  # saved before the first roll back
    assert guard.skipped_batches == 3
    with pytest.raises(PretrainError, match="rolled back to step 5 2 times"):
        guard.roll_back(9, 5, {})
    guard.roll_back(12, 10, {"passed_over": 3})
    assert guard.skipped_batches == 5


HANG = """
import resource, sys, time
from pathlib import Path
from pretrain.runtime.faults import Watchdog

def stuck():
    time.sleep(60)

Watchdog._GRACE_SECONDS = 1.0
with Watchdog(2.0, rank=3, world_size=5, run_dir=Path(sys.argv[1])) as watchdog:
    for step in range(8):
        watchdog.beat(f"step {step}")
        time.sleep(0.3)  # in total longer than the limit
    if sys.argv[2] != "progress":
        if sys.argv[2] == "hang on a full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        stuck()
"""


@pytest.mark.parametrize("scenario", ["hang", "hang on a full disk", "progress"])
def test_hung_ranks_end_with_their_number_and_stack(tmp_path: Path, scenario: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HANG, str(tmp_path), scenario],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    stacks = tmp_path / "stacks-rank3.txt"
    if scenario == "progress":
        assert (ended.returncode, ended.stderr, stacks.exists()) == (0, "", False)
        return
    assert ended.returncode == 1
    if scenario == "hang on a full disk":
        assert "made no progress for 2 seconds" in ended.stderr
        return
    for text in (ended.stderr, stacks.read_text()):
        assert "rank 3 (process " in text
        assert "made no progress for 2 seconds (faults.hang_seconds) in step 7" in text
        assert "in stuck" in text
    assert "no sign of life from rank 0, 1, 2, 4" in ended.stderr


ABORT = """
import os, sys
from pathlib import Path
from pretrain.runtime.faults import Watchdog

def in_nccl():
    os.abort()

with Watchdog(60.0, rank=0, world_size=2, run_dir=Path(sys.argv[1])):
    in_nccl()
"""


def test_an_abort_by_nccl_leaves_stacks(tmp_path: Path) -> None:
    """NCCL aborts the process when a collective exceeds its time limit."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONFAULTHANDLER"}
    command = [sys.executable, "-c", ABORT, str(tmp_path)]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGABRT
    assert "in in_nccl" in (tmp_path / "stacks-rank0.txt").read_text()


def test_the_flight_recorder_writes_into_the_run_and_leaves_the_users_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7"})
    faults.record_collectives(tmp_path)
    assert os.environ == {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7"}
    monkeypatch.setattr(without_cuda, "USE_CUDA", True)
    faults.record_collectives(tmp_path)
    assert os.environ == {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "7",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{tmp_path}/flight_recorder/rank",
    }
    with Watchdog(0, 0, 1, tmp_path):
        assert (tmp_path / "flight_recorder").is_dir()


@pytest.mark.parametrize(
    ("hang", "collective", "limit"),
    [(1800, None, 600), (0, None, 0), (1800, 0, 0), (0, 50, 50), (100, 50, 50), (1.5, None, 1)],
)
def test_collectives_time_out_before_the_watchdog(
    hang: float, collective: float | None, limit: float
) -> None:
    config = FaultConfig(hang_seconds=hang, collective_seconds=collective)
    assert config.collective_limit == limit


@pytest.mark.parametrize(("hang", "collective"), [(99, 50), (10, 600), (600, 0.5)])
def test_a_watchdog_that_would_end_collectives_is_refused(hang: float, collective: float) -> None:
    with pytest.raises(ValueError, match="collective_seconds"):
        FaultConfig(hang_seconds=hang, collective_seconds=collective)


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] "
LOST = [
    RuntimeError(GLOO + "Read error [127.0.0.1]:3985: Connection reset by peer. This is typically"),
    RuntimeError(GLOO + "Connection closed by peer [127.0.0.1]:24276"),
    RuntimeError(GLOO + "writev [127.0.0.1]:24276: Broken pipe"),
    RuntimeError(GLOO + "Timed out waiting 8000ms for recv operation to complete"),
    dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
    dist.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0"),
    dist.DistBackendError("NCCL error in: a.cpp:1, remote process exited or there was a network "
                          "error\nncclRemoteError: A call failed possibly due to"),
]  # fmt: skip
BUGS = [
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    RuntimeError("the worker's connection timed out"),  # not of a process group
    RuntimeError(GLOO + "op.preamble.length <= op.nbytes. 8 vs 4"),  # ranks disagree about a size
    dist.DistBackendError("NCCL error in: a.cpp:1, unhandled cuda error"),
    ConnectionResetError("Connection reset by peer"),
    ValueError(GLOO + "Connection reset by peer"),
]


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("error", LOST + BUGS, ids=lambda error: str(error)[-24:])
def test_only_the_loss_of_another_rank_is_one_line(
    tmp_path: Path, error: Exception, watched: bool
) -> None:
    stacks, lost = tmp_path / "stacks-rank1.txt", error in LOST
    with pytest.raises(LostRankError if lost else type(error)) as raised:  # noqa: SIM117
        with contextlib.ExitStack() as stack:
            if watched:
                watchdog = stack.enter_context(Watchdog(0, 1, 2, tmp_path))
                watchdog._GRACE_SECONDS = 0.0  # type: ignore[misc]
                watchdog.beat("step 7")
            else:
                stack.enter_context(naming_lost_ranks(tmp_path, 1, "step 7"))
            raise error
    assert stacks.exists() == lost
    if not lost:
        assert raised.value is error
        return
    message = str(raised.value)
    assert re.match(r"rank 1 (lost|waits too long for) .* in step 7: see that rank's", message)
    assert message.endswith(str(stacks)) and "\n" not in message
    written = stacks.read_text()
    assert f'File "{__file__}"' in written and str(error) in written


def test_the_stack_of_a_lost_rank_is_raised_if_it_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as raised, naming_lost_ranks(tmp_path / "no", 0, "step 1"):
        raise LOST[0]
    assert raised.value is LOST[0]
