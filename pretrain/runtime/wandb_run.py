"""Weights & Biases, for those who ask for it in the configuration; imported then and not before."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.config import WandbConfig
from pretrain.errors import PretrainError


def open_run(config: WandbConfig, run_dir: Path, settings: Mapping[str, Any]) -> Any:
    """Start, or go on with, the run's page. Its id is kept in run_dir/wandb_id.txt.

    Args:
        config: how.
        run_dir: the run's folder; files of wandb are in its folder ``wandb``.
        settings: the run's configuration, shown there.

    Returns:
        A ``wandb.Run``: ``log(scalars, step=...)`` and ``finish()``.

    Raises:
        PretrainError: wandb is not installed, or refuses.
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
            # Its terminal would be in the way of ours.
            settings=wandb.Settings(console="off", silent=True),
        )
    except Exception as error:  # what a network, a login or a version did has one answer here
        raise PretrainError(
            f"Weights & Biases does not start ({str(error).splitlines()[0]}): set "
            "wandb.mode=offline, or wandb.enabled=false"
        ) from error
