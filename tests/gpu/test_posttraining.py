"""Post-training on a GPU. The tests in ``tests/posttrain`` use a GPU, too, where there is one."""

from pathlib import Path

import pytest

from posttrain import evaluate, model
from posttrain.config import Config
from pretrain import config as configuration
from tests.gpu.devices import DEVICES
from tests.posttrain.conftest import image_export  # noqa: F401 (a fixture)

SETTINGS = """\
model: {export}
pretraining: {folder}/pretraining.yaml
run_dir: {folder}/run
evaluation: {{images: 8, text_sequences: 2, problems: 0, max_tokens: 4}}
"""
PRETRAINING = """\
vision: {{patch_size: 14}}
data:
  cache_dir: {folder}/cache
  max_corpus_mb: 0.1
  seq_length: 64
  images: {{min_chars: 3, max_chars: 4, max_words: 1, min_font_size: 10, max_font_size: 12}}
"""


@DEVICES
def test_evaluations_equal_those_of_a_cpu(
    device: str,
    image_export: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "pretraining.yaml").write_text(PRETRAINING.format(folder=tmp_path))
    (tmp_path / "run.yaml").write_text(SETTINGS.format(export=image_export, folder=tmp_path))
    settings = configuration.load_as(Config, tmp_path / "run.yaml", [])
    exported = model.load(image_export)
    assert device == "cpu" or exported.model.device.type == "cuda"
    exported.model.to(device)
    data = evaluate.open_pretraining_data(settings.pretraining, exported.folder)
    found, readings = evaluate.held_out(exported, data, settings)
    exported.model.cpu()
    expected, expected_readings = evaluate.held_out(exported, data, settings)
    assert found["held_out_text_loss"] == pytest.approx(expected["held_out_text_loss"], rel=1e-4)
    assert readings == expected_readings
