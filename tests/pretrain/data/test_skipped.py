"""The list of skipped documents in a run's folder."""

import os
from pathlib import Path

import pytest

from pretrain.data import skipped
from pretrain.data.skipped import Skip


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_that_was_cut_short_affects_no_other(tmp_path: Path, cut: int) -> None:
    file = tmp_path / skipped.FILE
    skips = [Skip(f"{number}.jpg", "damaged: \udce9") for number in range(4)]
    skipped.write(file, skips[:2])
    os.truncate(file, file.stat().st_size - cut)
    skipped.write(file, skips[2:])
    skipped.write(file, [])
    whole = skips if cut == 1 else [skips[0], *skips[2:]]
    assert skipped.read(file) == whole
