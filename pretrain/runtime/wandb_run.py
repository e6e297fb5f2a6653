"""Weights & Biases; imported only if the configuration enables it."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.config import WandbConfig
from pretrain.errors import PretrainError, first_line


def open_run(config: WandbConfig, run_dir: Path, settings: Mapping[str, Any]) -> Any:
    """Start or resume the run in Weights & Biases; run_dir/wandb_id.txt stores its id.

    Args:
        config: project and mode.
        run_dir: folder of the run; wandb writes into its folder ``wandb``.
        settings: configuration of the run, shown on its page.

    Returns:
        A ``wandb.Run``: ``log(scalars, step=...)`` and ``finish()``.

    Raises:
        PretrainError: wandb is not installed or cannot start.
    """
    try:
        import wandb
    except ImportError as error:
        raise PretrainError(
            "wandb.enabled=true needs Weights & Biases: pip install 'muonclip[wandb]', or set it "
            "to false"
        ) from error
    id_file = run_dir / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8])
    try:
        return wandb.init(
            project=config.project,
            name=run_dir.name,
            id=id_file.read_text(),
            resume="allow",
            mode=config.mode,
            dir=run_dir,
            config=dict(settings),
            # Do not capture the terminal, which has its own live view.
            settings=wandb.Settings(console="off", silent=True),
        )
    except Exception as error:  # network, login or version: the remedy is the same
        raise PretrainError(
            f"Weights & Biases cannot start ({first_line(error)}): set "
            "wandb.mode=offline, or wandb.enabled=false"
        ) from error
