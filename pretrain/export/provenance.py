"""Facts of an imported folder that its run keeps, so that ``export`` writes them again."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain import untrusted_files
from pretrain.errors import PretrainError
from pretrain.export.hf_folder import HfFolder

_FILE = "imported.json"
_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Provenance:
    """
    Attributes:
        max_position_embeddings: the longest sequence that the model may read.
        chat_template: in Jinja; None for a model without one. It is never rendered here.
        generation: the content of generation_config.json.
    """

    max_position_embeddings: int = 0
    chat_template: str | None = None
    generation: dict[str, Any] | None = None

    @classmethod
    def of(cls, files: HfFolder, max_position_embeddings: int) -> "Provenance":
        """Read it from a Hugging Face folder.

        Raises:
            PretrainError: a file of it is unreadable.
        """
        template = files.text("chat_template.jinja")
        if template is None:
            named = (files.json("tokenizer_config.json") or {}).get("chat_template")
            if isinstance(named, list):  # several, by name
                named = next(
                    (one.get("template") for one in named if isinstance(one, dict)
                     and one.get("name") == "default"), None
                )  # fmt: skip
            template = named if isinstance(named, str) else None
        generation = files.json("generation_config.json")
        if generation is not None:
            generation.pop("transformers_version", None)
        return cls(max_position_embeddings, template, generation)

    @classmethod
    def read(cls, run_dir: Path) -> "Provenance":
        """That of a run; all None for one that was not imported.

        Raises:
            PretrainError: the file is damaged.
        """
        file = run_dir / _FILE
        try:
            values = json.loads(untrusted_files.read_text(file, _MAX_BYTES))
            found = cls(**values)
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise PretrainError(f"{file} is damaged: remove it, or import again") from error
        length, template, generation = asdict(found).values()
        if (
            type(length) is not int
            or not isinstance(template, str | None)
            or not isinstance(generation, dict | None)
        ):
            raise PretrainError(f"{file} is damaged: remove it, or import again")
        return found

    def write(self, run_dir: Path) -> None:
        """Keep it in a run's folder."""
        file = run_dir / _FILE
        try:
            file.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise PretrainError(f"cannot write {file}: {error.strerror}") from error
