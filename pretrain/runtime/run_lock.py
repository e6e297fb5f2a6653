"""A lock that lets one job at a time write into a run's folder.

``run.lock`` names the process that owns the lock. The lock of a dead process does not block: on the
same machine, the operating system knows whether the process still runs; on other machines, the
process counts as alive while it updates the time of the file, which it does every few seconds.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import subprocess
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pretrain.errors import PretrainError

FILE = "run.lock"
# Larger files are not locks.
_MAX_BYTES = 4096


class RunLock:
    """Context manager that locks a run's folder for this process.

    Args:
        run_dir: the run's folder; created if it does not exist.

    Attributes:
        lost: whether another job has taken the lock after somebody deleted the file.

    Raises:
        PretrainError: another job writes into the folder, or the folder cannot be written.
    """

    BEAT_SECONDS = 5.0
    PATIENCE_SECONDS = 30.0
    """Time without an update after which a process on another machine counts as dead."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._path = run_dir, run_dir / FILE
        self._content = {
            "host": platform.node(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "since": datetime.now(UTC).isoformat(sep=" ", timespec="seconds"),
            "token": uuid.uuid4().hex,
        }
        self.lost = False
        self._released = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def __enter__(self) -> "RunLock":
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            if self._path.exists() and not self._path.is_file():
                # Reading a pipe could block forever.
                raise OSError(errno.EINVAL, f"{FILE} is not a file")
            with self._path.open("a+b", buffering=0) as file:
                with contextlib.suppress(OSError):  # the file system may not support locks
                    fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
                owner = _content(self._path)
                if owner is not None and self._is_alive(owner):
                    raise PretrainError(
                        f"another job is writing into run_dir={self._run_dir}: process "
                        f"{owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}; "
                        "wait for it or stop it, or choose another run_dir "
                        f"({self._path} is its lock)"
                    )
                file.truncate(0)
                file.write(json.dumps(self._content).encode())
                os.fsync(file)
        except OSError as error:
            raise PretrainError(
                f"cannot write into run_dir={self._run_dir}: {error.strerror}"
            ) from error
        self._beats.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._released.set()
        self._beats.join()
        # Empty the file instead of deleting it: another process may be waiting for its lock.
        with contextlib.suppress(OSError):
            if not self.lost and self._is_ours():
                os.truncate(self._path, 0)

    def _is_alive(self, owner: dict[str, Any]) -> bool:
        if owner.get("machine") == self._content["machine"]:
            started = _started(int(owner.get("pid", 0)))
            return started is not None and started == owner.get("started")
        # Clocks of machines differ: check only whether the time of the file changes.
        before, deadline = self._path.stat().st_mtime_ns, time.monotonic() + self.PATIENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(0.5, self.PATIENCE_SECONDS / 10))
            if self._path.stat().st_mtime_ns != before:
                return True
        return False

    def _is_ours(self) -> bool:
        owner = _content(self._path)
        return owner is not None and owner.get("token") == self._content["token"]

    def _beat(self) -> None:
        while not self._released.wait(self.BEAT_SECONDS):
            with contextlib.suppress(OSError):  # an unavailable disk must not stop the run
                owner = _content(self._path)
                if owner is None:  # someone deleted the file
                    self._path.write_text(json.dumps(self._content))
                elif owner.get("token") == self._content["token"]:
                    os.utime(self._path)
                elif owner:
                    self.lost = True
                    return


def require_folder(run_dir: str, step: int, *, metrics_deleted: bool, lock_lost: bool) -> None:
    """End a run after a step if its folder is not its own any more.

    Raises:
        PretrainError: metrics.jsonl was deleted, alone or with the folder, or another job has
            taken the folder.
    """
    if metrics_deleted:
        raise PretrainError(
            f"{run_dir}/metrics.jsonl was deleted during the run: it ends after step {step}, "
            "without saving; start it again, which continues from its newest checkpoint if there "
            "is one"
        )
    if lock_lost:
        raise PretrainError(
            f"another job has taken run_dir={run_dir} since its run.lock was deleted: this one "
            f"ends after step {step}, without saving"
        )


def _content(path: Path) -> dict[str, Any] | None:
    """The owner of a lock; None if it is free, {} if the file cannot be parsed."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return None
    if not text.strip():
        return None
    try:
        owner = json.loads(text)
        return owner if isinstance(owner, dict) and isinstance(owner.get("pid"), int) else {}
    except ValueError:
        return {}


def _machine() -> str:
    """Identifier of the process number space: the boot and the container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{platform.node()} {uuid.getnode():x}"


def _started(pid: int) -> str | None:
    """Start time of a process on this machine, in the system's format; None if it has ended."""
    if Path("/proc/self/stat").exists():
        try:
            # Fields after the name, which may contain spaces: 0 is the state, 19 the start time.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    ps = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return ps.stdout.strip() or None
