"""The HTML report of a run."""

from pathlib import Path


def write(run_dir: Path) -> Path:
    return run_dir / "report.html"
