"""Reading an untrusted run folder runs no code: exporting, sampling, reporting, loading.

``torch.distributed.checkpoint`` unpickles ``.metadata``, which ran code in earlier versions.
"""

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pretrain import config, generate, html_report, parallel
from pretrain.checkpoint import storage, tensor_files
from pretrain.errors import PretrainError
from pretrain.export.to_hf import export
from tests.pretrain.saved_run import STEP, Made
from tests.test_no_code_from_files import Touch

Craft = Callable[[bytes, Touch], bytes]
"""Returns a crafted file, from the file's content and an object that runs code."""


def pickled(_content: bytes, touch: Touch) -> bytes:
    return pickle.dumps(touch)


def torch_saved(_content: bytes, touch: Touch) -> bytes:
    file = io.BytesIO()
    torch.save({"matrix": touch}, file)
    return file.getvalue()


def pickled_array(_content: bytes, touch: Touch) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([touch], dtype=object), allow_pickle=True)
    return file.getvalue()


def python_tag(_content: bytes, touch: Touch) -> bytes:
    return f"!!python/object/apply:os.system ['touch {touch.marker}']\n".encode()


def tagged_config(content: bytes, touch: Touch) -> bytes:
    manifest = json.loads(content)
    manifest["facts"]["config"] = python_tag(b"", touch).decode()
    return json.dumps(manifest).encode()


def is_alive(content: bytes, touch: Touch) -> bool:
    """Whether a reader that trusts the file runs its code; the marker is removed again."""
    with suppress(Exception):
        np.load(io.BytesIO(content), allow_pickle=True)
    with suppress(Exception):
        torch.load(io.BytesIO(content), weights_only=False)
    with suppress(Exception):
        yaml.unsafe_load(content.decode())
    found = touch.marker.exists()
    touch.marker.unlink(missing_ok=True)
    return found


FILES: dict[str, list[Craft]] = {
    ".metadata": [pickled],
    "__0_0.distcp": [torch_saved],
    "rank-00000-0.safetensors": [pickled, torch_saved, pickled_array],
    "manifest.json": [pickled, python_tag, tagged_config],
    "../../tokenizer.json": [pickled, python_tag],
    "../../config.yaml": [python_tag],
    "../../metrics.jsonl": [pickled, python_tag],
    "../../starts.jsonl": [pickled],
    "../../encoder_cost.json": [pickled],
}


@pytest.mark.parametrize(("name", "craft"), [(n, c) for n, crafts in FILES.items() for c in crafts])
def test_a_run_folder_runs_no_code(
    made: Made, run_folder: Path, tmp_path: Path, name: str, craft: Craft
) -> None:
    run_dir, touch = tmp_path / "run", Touch(tmp_path / "marker")
    shutil.copytree(run_folder / "run", run_dir)
    path = storage.path_of(run_dir / "checkpoints", STEP)
    file = (path / name).resolve()
    content = craft(file.read_bytes() if file.exists() else b"", touch)
    file.write_bytes(content)
    manifest = path / "manifest.json"
    if file.parent == path and file != manifest:  # an attacker can write the digest too
        values = json.loads(manifest.read_text())
        values["files"][name] = storage._checksum(file)
        manifest.write_text(json.dumps(values))
    assert craft is tagged_config or is_alive(content, touch)
    for read in (
        lambda: export(run_dir),
        lambda: generate.load(run_dir),
        lambda: html_report.write(run_dir),
        lambda: config.load(run_dir / "config.yaml", []),
    ):
        try:
            read()
        except PretrainError as error:
            assert "\n" not in str(error)
        finally:
            parallel.stop()
        assert not touch.marker.exists()


def test_a_zip_of_pickles_is_not_read(tmp_path: Path) -> None:
    """torch.save writes zip files; the reader of tensor files does not open archives."""
    file = tmp_path / "rank-00000-0.safetensors"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Touch(tmp_path / "marker")))
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        tensor_files.read(file, [tensor_files.Read("matrix", (0,), torch.zeros(1))])
    assert not (tmp_path / "marker").exists()
