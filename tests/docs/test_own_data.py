"""The commands of the guide to own data turn a folder of images and captions into a run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

from pretrain import config
from pretrain.metrics import read
from tests.pretrain.data import make

ROOT = Path(__file__).parent.parent.parent
GUIDE = (ROOT / "docs" / "trainer" / "data.md").read_text()
# The guide's commands train for minutes; two steps show that they do.
SHORTER = ("steps=2", "optimizer.warmup_steps=1", "optimizer.decay_steps=0")
LESS_TEXT = "data.max_corpus_mb=1.0"


def run(command: str, folder: Path, *more: str) -> str:
    words = shlex.split(command)
    if words[0] == "torchrun":
        rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
        words[:1] = [sys.executable, "-m", "torch.distributed.run", *rendezvous]
    else:
        assert words[0] == "python"
        words[0] = sys.executable
    ended = subprocess.run(
        [*words, *more],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_the_commands_inspect_a_folder_and_train_on_it(tmp_path: Path) -> None:
    make.captioned_folder(tmp_path / "pictures", 60)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    block, *_ = re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    inspect, train = block.replace("\\\n", " ").strip().splitlines()
    run(inspect, tmp_path, LESS_TEXT)
    assert "data:image/png" in (tmp_path / "inspect.html").read_text()
    output = run(train, tmp_path, LESS_TEXT, *SHORTER)
    assert "data.sources[0]: pictures, weight 1:" in output
    (start, *_, end) = read(tmp_path / "runs" / "mine" / "metrics.jsonl")
    assert end["step"] == 2 and end["caption_loss"] > 0
    assert start["right_caption_loss"] > 0


def test_the_configuration_of_the_guide_is_valid(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(block)
    loaded = config.load(path)
    assert len(loaded.data.sources) == len(yaml.safe_load(block)["data"]["sources"]) == 7
