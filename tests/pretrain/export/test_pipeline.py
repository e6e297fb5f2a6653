"""Transformers' pipeline gives the replies of `sample --chat --image`, by the code in the docs."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from pretrain import generate
from pretrain.data.media.frames import Media
from pretrain.data.sources.vision_chat import VisionChatSource
from pretrain.export import to_hf
from tests.distributed.launch import launch
from tests.docs.commands import ROOT, blocks
from tests.pretrain.data import make
from tests.pretrain.saved_run import Made

PAGE = ROOT / "docs" / "trainer" / "conversations.md"


def reply(run_dir: str, image: str) -> str:
    model = generate.load(Path(run_dir))
    media = [Media((image,), moving=False)]
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "reply": True}
    return "".join(generate.sample(model, "How many letters?", media, **options))


def test_a_reply_about_an_image_is_reproduced(
    made: Made, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", minversion="5.23")
    # As of a run that was finetuned on such a source.
    monkeypatch.setattr(to_hf, "source_types", lambda _data: [VisionChatSource])
    hf = to_hf.export(run_folder / "run", tmp_path / "hf")
    make.picture(0)[0].save(tmp_path / "cat.jpg")
    (expected,) = launch(reply, 1, str(run_folder / "run"), str(tmp_path / "cat.jpg"))
    (tmp_path / "runs" / "laptop_vision_sft").mkdir(parents=True)
    shutil.move(hf, tmp_path / "runs" / "laptop_vision_sft" / "hf")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(blocks(PAGE.read_text(), "python")[-1], names)
    assert names["answers"][0]["generated_text"] == expected != ""
