"""The page shows what the model receives."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain import cli
from pretrain.data import skipped
from pretrain.data.builtin.dataset import BuiltIn
from pretrain.data.media.patches import patchify
from pretrain.data.tools.inspect import images
from tests.pretrain.data import make
from tests.pretrain.data.conftest import PATCH


def test_images_are_reassembled_from_patches(data: BuiltIn) -> None:
    for index in range(10):
        sample = data.sample("train", index)
        found = images(sample, PATCH)
        assert len(found) == len(sample.grids)
        cut = [patchify(pixels, PATCH)[0] for pixels in found]
        if cut:
            assert np.array_equal(np.concatenate(cut), sample.patches.numpy())


def test_the_command_writes_one_page_with_pictures_tokens_and_documents(tmp_path: Path) -> None:
    folder = make.captioned_folder(tmp_path / "pictures", 12)
    (folder / "000.txt").write_text("<b>bold</b>")
    config, page = tmp_path / "run.yaml", tmp_path / "page.html"
    made: list[str] = []
    config.write_text(
        f"data: {{seq_length: 128, vocab_size: 300, held_out: 0, cache_dir: {tmp_path}/cache, "
        f"sources: [{{type: images, path: {folder}}}]}}\n"
    )
    options = ["--out", str(page), "--count", "4"]
    for order in (["seed=5", *options], [*options, "seed=5"], ["seed=1", *options, "seed=5"]):
        page.unlink(missing_ok=True)
        assert cli.main(["data", "inspect", str(config), *order]) == 0
        made.append(page.read_text())
    assert len(set(made)) == 1
    text = page.read_text()
    assert text.count("<h2>train sequence ") == 4
    assert text.count("class=document") >= 8
    shown = re.findall(r"<img src=data:image/png;base64,([^>]*)>", text)
    sizes = {Image.open(io.BytesIO(base64.b64decode(one))).size for one in shown}
    assert all(side % (2 * PATCH) == 0 for size in sizes for side in size)
    assert "<b>" not in text  # captions are text
    assert re.search(r'class="t caption" title="\d+, label \d+, weight 1, position \d+"', text)


def test_the_page_names_the_file_that_lists_skipped_samples(tmp_path: Path) -> None:
    folder = make.captioned_folder(tmp_path / "pictures", 6)
    (folder / "001.txt").unlink()
    config, page = tmp_path / "run.yaml", tmp_path / "page.html"
    config.write_text(
        f"data: {{seq_length: 128, vocab_size: 300, held_out: 0, cache_dir: {tmp_path}/cache, "
        f"sources: [{{type: images, path: {folder}}}]}}\n"
    )
    assert cli.main(["data", "inspect", str(config), "--out", str(page), "--count", "1"]) == 0
    assert "see page-skipped.jsonl" in page.read_text()
    (skip,) = skipped.read(tmp_path / "page-skipped.jsonl")
    assert "no caption 001.txt" in skip.reason


def test_errors_are_reported_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("data: {sources: [{path: nowhere}]}\n")
    for arguments, message in (
        ([str(config)], "data.sources[0].path: nowhere does not exist"),
        ([str(tmp_path / "none.yaml")], "cannot read the configuration"),
        ([str(config), "--count", "0"], "--count must be > 0, not 0"),
    ):
        assert cli.main(["data", "inspect", *arguments]) == 1
        assert message in capsys.readouterr().err
