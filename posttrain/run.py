"""A run's folder, its settings and checkpoints, and what is shown of its progress."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from posttrain import evaluate, metrics, report
from posttrain.config import SHARES_OF_DEMONSTRATIONS, Config
from posttrain.model import TRAINED, Exported, save, writing
from pretrain.config import to_dict
from pretrain.data import Data
from pretrain.errors import PretrainError
from pretrain.metrics import Record
from pretrain.runtime import atomic, stopping
from pretrain.runtime.metrics_writer import AppendedFile
from pretrain.runtime.progress import duration
from pretrain.runtime.run_lock import RunLock, require_folder
from pretrain.runtime.stopping import Termination

_CHECKPOINTS = "checkpoints"
_CONFIG = "config.json"
# Of this package's runs, and of pretraining's.
_RESULTS = ("metrics.jsonl", _CHECKPOINTS, TRAINED, "start")
# Settings that may change when a run resumes.
_FREE = ("steps", "log_every", "save_every", "evaluation")


@dataclass
class Run:
    """A post-training run.

    Attributes:
        command: ``sft`` or ``rl``.
        config: its settings.
        exported: the model that is trained.
        data: the data of its pretraining.
        lock: of the run's folder.
        termination: requests to end the process.
        images: data of the images of ``rl.tasks.read.images``.
    """

    command: str
    config: Config
    exported: Exported
    data: Data
    lock: RunLock
    termination: Termination
    images: Data | None = None
    _metrics: AppendedFile = field(init=False)

    def __post_init__(self) -> None:
        self._metrics = AppendedFile(self.folder / "metrics.jsonl")

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def checkpoints(self) -> Path:
        return self.folder / _CHECKPOINTS

    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint: the Trainer writes its state last."""
        found = [
            path
            for path in self.checkpoints.glob("checkpoint-*")
            if re.fullmatch(r"checkpoint-\d+", path.name) and _is_json(path / "trainer_state.json")
        ]
        return max(found, key=_step_of, default=None)

    def write(self, record: Record) -> None:
        """Append a record to metrics.jsonl."""
        self._metrics.append(json.dumps(record).encode() + b"\n")

    def require_folder(self, step: int) -> None:
        """
        Raises:
            PretrainError: metrics.jsonl was deleted, alone or with the folder, or another job has
                taken the folder.
        """
        require_folder(
            self.config.run_dir,
            step,
            metrics_deleted=self._metrics.deleted,
            lock_lost=self.lock.lost,
        )

    def say(self, text: str) -> None:
        print(text, flush=True)

    def evaluate(self, step: int) -> dict[str, Any]:
        """Evaluate the model; its transcriptions are for the report."""
        found, readings = evaluate.held_out(self.exported, self.data, self.config, self.images)
        record = {"step": step, **found}
        self.write(record)
        name = "transcriptions.json" if step else "transcriptions_before.json"
        atomic.write_text(self.folder / name, json.dumps(readings))
        self.say(f"held out after step {step}: {' | '.join(metrics.cells(found)) or 'no data'}")
        return record

    def train(self, trainer: Any, template: str | None = None) -> Path:
        """Train, or resume, and write the trained model and the report.

        Args:
            template: chat template of the trained model; None: that of the model.

        Returns:
            The folder of the trained model.

        Raises:
            PretrainError: the run has more steps already.
            SystemExit: a signal ended the training, after a checkpoint.
        """
        resumed = self.newest_checkpoint()
        if resumed and _step_of(resumed) > self.config.steps:
            raise PretrainError(
                f"{resumed} has more than steps={self.config.steps}: raise steps, or choose "
                "another run_dir"
            )
        origin = f"resuming from {resumed}" if resumed else f"starting from {self.config.model}"
        self.say(f"{origin}, with the data of {self.config.pretraining}")
        if resumed is None:
            self.evaluate(0)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Progress(self, trainer))
        self.termination.saves = True
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        self.termination.saves = False
        if trainer.state.global_step < self.config.steps:
            number = self.termination.signal
            self.say(
                f"{stopping.name(number)}: saved after step {trainer.state.global_step}; start it "
                "again to continue"
            )
            raise SystemExit(stopping.status(number))
        self.evaluate(self.config.steps)
        out = save(self.exported, self.exported.model, self.folder / TRAINED, template)
        with writing(f"the report of {self.folder}"):
            self.say(f"wrote {out} and {report.write(self.folder)}")
        return out


def _step_of(checkpoint: Path) -> int:
    """The number of steps after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


@contextmanager
def locked(config: Config, command: str) -> Iterator[tuple[RunLock, Termination]]:
    """Context in which this process alone writes into the run's folder, and signals end it softly.

    Raises:
        PretrainError: another job writes into the folder, or it contains a run with other settings.
    """
    folder = Path(config.run_dir)
    with RunLock(folder) as lock, stopping.on_signals() as termination:
        _require_same(folder, {"command": command, **to_dict(config)})  # type: ignore[arg-type]
        yield lock, termination


def _require_same(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a run, or compare them with those that it was started with.

    A run that ended before its first result may be started with others.
    """
    file = folder / _CONFIG
    settings = json.loads(json.dumps(settings))
    has_results = any(_has_content(folder / name) for name in _RESULTS)
    try:
        started = json.loads(file.read_text())
    except FileNotFoundError:
        started = {} if has_results else settings
    except ValueError as error:
        raise PretrainError(f"{file} is damaged: remove the folder, or choose another") from error
    if not isinstance(started, dict) or "command" not in started:
        raise PretrainError(
            f"{folder} contains something else than a run of posttrain: choose another run_dir"
        )
    if settings["command"] != "sft" and isinstance(started.get("sums"), dict):
        # They have no effect in the other commands, which did not always refuse them.
        started["sums"] |= {name: settings["sums"][name] for name in SHARES_OF_DEMONSTRATIONS}
    changed = [
        name for name in settings if name not in _FREE and started.get(name) != settings[name]
    ]
    if changed and has_results:
        raise PretrainError(
            f"{folder} contains a run with another {', '.join(changed)}: choose another run_dir, "
            "or remove that folder"
        )
    atomic.write_text(file, json.dumps(settings, indent=2) + "\n")


def _has_content(path: Path) -> bool:
    return path.is_dir() or (path.is_file() and path.stat().st_size > 0)


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return False
    return True


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Records every step, prints some, evaluates, and saves when a signal asks for the end."""

    def __init__(self, run: Run, trainer: Any) -> None:
        self._run, self._trainer = run, trainer
        self._start = self._began = time.monotonic()
        self._seconds = 0.0
        self._first: int | None = None
        self._rollout: dict[str, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.monotonic()
        if self._first is None:
            self._first, self._start = state.global_step, self._began

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        state.log_history.clear()  # each checkpoint would contain all of it
        if not logs or "grad_norm" not in logs:  # such as the summary at the end
            return
        now, config = time.monotonic(), self._run.config
        record = {"step": state.global_step, **metrics.from_trl(logs), "seconds": self._seconds}
        self._run.write(record)
        step, steps = state.global_step, config.steps
        # Steps after the first of a batch have no rollout.
        self._rollout |= record
        if step % config.log_every == 0 or step == steps:
            left = (now - self._start) / (step - (self._first or 0)) * (steps - step)
            shown = " | ".join(metrics.cells(self._rollout))
            self._run.say(
                f"step {step:>{len(str(steps))}}/{steps} | {shown} | ETA {duration(left)}"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, config = state.global_step, self._run.config
        self._seconds = time.monotonic() - self._began  # this comes before the log
        self._run.require_folder(step)
        if self._run.termination.signal and step % self._trainer.steps_per_rollout == 0:
            control.should_save = control.should_training_stop = True
        every = config.evaluation.every
        if every and step % every == 0 and step < config.steps:
            self._run.evaluate(step)
