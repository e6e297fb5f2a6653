"""Settings of an imported model that its run keeps, so that ``export`` writes them again."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain import untrusted_files
from pretrain.errors import PretrainError
from pretrain.runtime import atomic

_FILE = "imported.json"
_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class ImportedSettings:
    """Settings that the trainer itself does not use; the defaults are those of a new model.

    Attributes:
        max_position_embeddings: length of the longest sequence that the model can read, in tokens.
        chat_template: in Jinja; None for a model without one. The trainer never renders it.
        generation: content of generation_config.json; None without one.
        vocab_size: rows of the embedding; the run's may have more. 0: as many as the run's.
    """

    max_position_embeddings: int = 0
    chat_template: str | None = None
    generation: dict[str, Any] | None = None
    vocab_size: int = 0

    @classmethod
    def read(cls, run_dir: Path) -> "ImportedSettings":
        """Read the settings from a run's folder; the defaults if the run was not imported.

        Raises:
            PretrainError: the file is damaged.
        """
        file = run_dir / _FILE
        damaged = PretrainError(f"{file} is damaged: remove it, or import the model again")
        try:
            settings = cls(**json.loads(untrusted_files.read_text(file, _MAX_BYTES)))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise damaged from error
        if (
            type(settings.max_position_embeddings) is not int
            or type(settings.vocab_size) is not int
            or not isinstance(settings.chat_template, str | None)
            or not isinstance(settings.generation, dict | None)
        ):
            raise damaged
        return settings

    def write(self, run_dir: Path) -> None:
        """Write the settings into a run's folder.

        Raises:
            PretrainError: the file cannot be written.
        """
        atomic.write_text(run_dir / _FILE, json.dumps(asdict(self), indent=1) + "\n")
