"""Prompts of tasks, as the model reads them."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from posttrain import model, modes
from posttrain.environment.core import Task


def test_the_longest_prompt_is_found_without_converting_images(
    image_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = model.load(image_export)
    mode = modes.find(exported, "document")
    tasks = [
        Task("0", "knowledge", question, "", lambda answer, truth: 0.0, image=image)
        for question in ("", "some text")
        for image in (None, Image.new("RGB", (40, 70)), Image.new("L", (99, 28)))
    ]
    lengths = [
        modes._inputs(exported, mode, *modes._asked([task]))["input_ids"].shape[1] for task in tasks
    ]

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(exported.processor.image_processor, "patches", refuse)
    assert [modes.longest_prompt(exported, mode, [task]) for task in tasks] == lengths
    assert modes.longest_prompt(exported, mode, tasks) == max(lengths)
    assert len(set(lengths)) > 3
    assert modes.longest_prompt(exported, mode, []) == 0
