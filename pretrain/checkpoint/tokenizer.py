"""The tokenizer stored next to a run's checkpoints, to use the model without the data."""

from pathlib import Path

from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError


def tokenizer_file(run_dir: Path) -> Path:
    """The tokenizer.json that a run's model was trained with.

    Raises:
        PretrainError: the run has none.
    """
    path = run_dir / "tokenizer.json"
    if not path.is_file():
        raise PretrainError(
            f"{run_dir} has no tokenizer.json: start its training once more, which writes it"
        )
    return path


def write_tokenizer(tokenizer: Tokenizer, run_dir: Path) -> None:
    """Write a run's tokenizer.json unless it exists; for a single process.

    Raises:
        PretrainError: there is a different one, or the file cannot be written.
    """
    path = run_dir / "tokenizer.json"
    partial = path.with_suffix(".partial")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        tokenizer.save(partial)
        if not path.exists():
            partial.rename(path)
        elif Tokenizer.load(path).digest != tokenizer.digest:
            raise PretrainError(
                f"{path} differs from the data's tokenizer: train with the data that the run was "
                "started with, or choose another run_dir"
            )
        partial.unlink(missing_ok=True)
    except OSError as error:
        raise PretrainError(f"cannot write {path}: {error}") from error
