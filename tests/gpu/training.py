"""``python -m tests.gpu.training DEVICE FOLDER [OVERRIDE …]``: train in a separate process.

DEVICE is ``cuda``, ``cpu`` (a rehearsal of ``cuda``, see :mod:`tests.pretrain.runtime.cuda_on_cpu`)
or ``reference``, the same run on a CPU in float64.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pretrain.train import train
from tests.distributed.training import EXACT, comparable, tiny, tiny_file
from tests.pretrain.runtime.cuda_on_cpu import cuda_on_cpu

ROOT = Path(__file__).parent.parent.parent
SCHEDULE = (
    *("steps=10", "optimizer.warmup_steps=2", "optimizer.decay_steps=2", "log_every=1"),
    *("checkpoint.every=5", "evaluation.every=10"),
)
# The widths of heads that kernels are written for.
SIZES = {
    "cuda": (
        *("language.hidden_size=256", "language.num_heads=4", "language.q_lora_rank=128"),
        *("language.kv_lora_rank=128", "language.qk_nope_head_dim=128"),
        *("language.qk_rope_head_dim=64", "language.v_head_dim=128", "data.seq_length=512"),
        *("language.ffn_hidden_size=512", "language.expert_ffn_hidden_size=128"),
        *("language.shared_expert_ffn_hidden_size=128", "language.num_experts=8"),
    ),
    "cpu": (),
}


def prepare(folder: Path, cache: Path) -> Path:
    """A folder for runs, with the cache of the built-in data."""
    tiny_file(folder, cache)
    return folder


def run(
    folder: Path, device: str, run_dir: str, *overrides: str, processes: int = 1
) -> list[dict[str, Any]]:
    """Train with one or more processes and return the metrics of every step."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    done = subprocess.run(
        [
            *(sys.executable, *(launcher if processes > 1 else [])),
            *("-m", "tests.gpu.training", device, str(folder)),
            *(f"run_dir={folder / run_dir}", *SCHEDULE, *overrides),
        ],
        cwd=ROOT,
        env=os.environ if device == "cuda" else os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return comparable(folder / run_dir / "metrics.jsonl")


def main(device: str, folder: str, *overrides: str) -> None:
    if device == "cpu":
        with cuda_on_cpu():
            train(tiny(folder, *overrides))
    else:
        train(tiny(folder, *overrides, *([EXACT] if device == "reference" else [])))


if __name__ == "__main__":
    main(*sys.argv[1:])
