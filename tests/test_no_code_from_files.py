"""Files from others run no code, whatever is in them.

Each case writes files that would create a marker if a reader ran what they name, and opens them as
the project does. A refusal is one line. Every new kind of file that is read gets a case here.
"""

import gzip
import io
import json
import os
import pickle
import runpy
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jinja2
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from pretrain import config as configuration
from pretrain import generate, parallel
from pretrain.config import DataConfig, LanguageConfig, SourceConfig
from pretrain.data import RankShare, open_data
from pretrain.data.media import frames
from pretrain.data.media.frames import Media
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.tools.shards import _index, _Writer
from pretrain.errors import PretrainError
from pretrain.export.conversion import conversions
from pretrain.export.from_hf import import_hf
from pretrain.export.hf_config import to_hf_config
from pretrain.export.to_hf import export
from tests.distributed.launch import launch
from tests.pretrain.data import make

Bait = Callable[[Path, Path], None]
"""Writes a case's files into a folder; the marker is the second path."""


class Touch:
    """Unpickling it creates the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def shards(folder: Path, parts: dict[str, bytes] | None = None) -> Path:
    """Prepared shards of pictures whose samples have further parts; their description."""
    writer = _Writer(folder, "train", 100)
    for number in range(4):
        picture, caption = make.picture(number)
        content = io.BytesIO()
        picture.save(content, "PNG")
        files = {"png": content.getvalue(), "txt": caption.encode()}
        writer.add(f"{number}", files | (parts or {}))
    writer.close()
    _index(folder, ["train"], ["png"])
    return folder / ".nv-meta" / "dataset.yaml"


def read_shards(folder: Path, *, trust_code: bool = False) -> None:
    source = SourceConfig("energon", str(folder), trust_code=trust_code)
    cache = str(folder / "cache")
    config = DataConfig(seq_length=128, vocab_size=300, cache_dir=cache, sources=(source,))
    open_data(config, 14, 0, RankShare()).sample("train", 0)


def described(**settings: object) -> Bait:
    """Shards whose dataset.yaml has these settings; FOLDER stands for their folder."""

    def write(folder: Path, marker: Path) -> None:
        dataset = shards(folder)
        (folder / ".nv-meta" / "evil.py").write_text(
            f"open({str(marker)!r}, 'w')\n"
            "def sample_loader(sample):\n    return dict(image=sample['png'], caption='a')\n"
            "def part_filter(part):\n    return part == 'png'\n"
        )
        (folder / "evil_module.py").write_text(
            f"open({str(marker)!r}, 'w')\nfrom megatron.energon import CaptioningSample as Evil\n"
            "def evil(**settings):\n    raise ValueError\n"
        )
        text = yaml.safe_dump(yaml.safe_load(dataset.read_text()) | settings)
        text = text.replace("FOLDER", str(folder))
        if "sample_loader" in settings or "__module__" in settings:
            text = yaml.safe_dump({k: v for k, v in yaml.safe_load(text).items() if k in settings})
        dataset.write_text(text)

    return write


def pickled(suffix: str) -> Bait:
    """Shards whose captions are pickles."""

    def write(folder: Path, marker: Path) -> None:
        content = io.BytesIO()
        if suffix == "pth":
            torch.save(Touch(marker), content)
        else:
            pickle.dump(Touch(marker), content)
        part = content.getvalue()
        part = gzip.compress(part) if suffix.endswith(".gz") else part
        dataset = shards(folder, {suffix: part})
        dataset.write_text(dataset.read_text().replace("caption: txt", f"caption: {suffix}"))

    return write


ENERGON_TYPE = {"__module__": "megatron.energon", "__class__": "CaptioningSample"}
LOADER = {"sample_type": ENERGON_TYPE, "sample_loader": "evil.py", "part_filter": "evil.py"}
TOUCH = {"__module__": "evil_module", "__function__": "evil"}
SHARDS: dict[str, Bait] = {
    "sample_loader": described(**LOADER),
    "sample_loader elsewhere": described(
        **LOADER | {"sample_loader": "FOLDER/.nv-meta/evil.py:sample_loader"}
    ),
    "sample_type of a module": described(
        sample_type={"__module__": "evil_module", "__class__": "Evil"}
    ),
    "a class of a module": described(__module__="evil_module", __class__="Evil"),
    "a function that is called": described(**TOUCH),
    "a function in another setting": described(part_filter=TOUCH),
    "a pickle": pickled("pkl"),
    "a pickle called pickle": pickled("pickle"),
    "a pickle called pyd": pickled("pyd"),
    "a compressed pickle": pickled("pkl.gz"),
    "a torch file": pickled("pth"),
}


def check(marker: Path, read: Callable[[], object]) -> None:
    try:
        read()
    except (PretrainError, ValueError) as error:
        assert str(error) and "\n" not in str(error)
    assert not marker.exists()


@pytest.mark.parametrize("name", SHARDS)
def test_shards_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder, marker = tmp_path / "shards", tmp_path / "marker"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    SHARDS[name](folder, marker)
    check(marker, lambda: read_shards(folder))
    sys.modules.pop("evil_module", None)
    with suppress(PretrainError):
        read_shards(folder, trust_code=True)
    assert marker.exists()  # the bait is alive: with trust, energon takes it
    sys.modules.pop("evil_module", None)


@pytest.mark.parametrize("file", ["split.yaml", "dataset.yaml"])
def test_descriptions_of_shards_run_no_code(tmp_path: Path, file: str) -> None:
    folder, marker = tmp_path / "shards", tmp_path / "marker"
    folder.mkdir()
    shards(folder)
    tag = f"!!python/object/apply:os.system ['touch {marker}']\n"
    (folder / ".nv-meta" / file).write_text(f"split_parts: {tag}")
    check(marker, lambda: read_shards(folder))
    check(marker, lambda: read_shards(folder, trust_code=True))


@pytest.mark.parametrize("name", ["a.eps", "a.ps", "a.jpg", "a"])
def test_postscript_is_given_to_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Pillow runs Ghostscript for it, whatever the file is called."""
    marker, program = tmp_path / "marker", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    path = tmp_path / name
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    media = Media((str(path),), moving=False)
    check(marker, lambda: frames.measure(media, 1))
    check(marker, lambda: list(frames.read(media, 1)))
    with pytest.raises(OSError), Image.open(path) as image:  # the bait is alive
        image.load()
    assert marker.exists()


LANGUAGE = LanguageConfig(
    **{"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_heads": 1, "num_experts": 2},
    **{"q_lora_rank": 4, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4},
    **{"v_head_dim": 4, "expert_ffn_hidden_size": 8, "shared_expert_ffn_hidden_size": 8},
)


def hf_folder(folder: Path) -> None:
    """A model of text as transformers publishes it."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.train(["some text"], 300)
    tokenizer.save(folder / "tokenizer.json")
    size = tokenizer.vocab_size
    described = to_hf_config(LANGUAGE, None, size, 64, {}, -1)
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "generation_config.json").write_text("{}")
    shapes = {
        k: shape
        for item in conversions(LANGUAGE, None, size)
        for k, shape in item.published.items()
    }
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def python(marker: Path) -> str:
    """A module that creates the marker, under every name that a class could have."""
    return f"open({str(marker)!r}, 'w')\nclass Evil: pass\nKimiProcessor = Evil\n"


def python_files(folder: Path, marker: Path) -> Path:
    """Code for everything that transformers loads by auto_map."""
    kinds = ("Config", "Model", "ModelForCausalLM", "Tokenizer", "Processor", "ImageProcessor")
    mapped: dict[str, object] = {f"Auto{kind}": "evil.Evil" for kind in kinds}
    mapped["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        file = folder / name
        values = json.loads(file.read_text()) if file.exists() else {}
        values |= {"auto_map": mapped, "tokenizer_class": "evil.Evil", "trust_remote_code": True}
        file.write_text(json.dumps(values))
    for name in ("__init__", "modeling_deepseek", "kimi_k25_processor", "tokenization_kimi"):
        (folder / f"{name}.py").write_text(python(marker))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(python(marker))
    (folder / "evil.py").write_text(python(marker))
    return folder / "evil.py"


def pickle_as(name: str, *removed: str) -> Callable[[Path, Path], Path]:
    """A pickle in place of a file."""

    def write(folder: Path, marker: Path) -> Path:
        for file in removed:
            (folder / file).unlink()
        (folder / name).write_bytes(pickle.dumps(Touch(marker)))
        return folder / name

    return write


def torch_weights(folder: Path, marker: Path) -> Path:
    file = folder / "pytorch_model.bin"
    torch.save({"model.norm.weight": Touch(marker)}, file)
    (folder / "model.safetensors").unlink()
    return file


def torch_weights_in_the_index(folder: Path, marker: Path) -> Path:
    file = torch_weights(folder, marker)
    index = {"weight_map": {"model.norm.weight": file.name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return file


def template(folder: Path, marker: Path) -> Path:
    file = folder / "chat_template.jinja"
    file.write_text(f"{{{{ cycler.__init__.__globals__.os.system('touch {marker}') }}}}")
    return file


def template_of_the_tokenizer(folder: Path, marker: Path) -> Path:
    text = template(folder, marker).read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
    return folder / "chat_template.jinja"


def tagged(name: str) -> Callable[[Path, Path], Path]:
    """YAML's tag that calls a function, in a file of JSON."""

    def write(folder: Path, marker: Path) -> Path:
        (folder / name).write_text(f"a: !!python/object/apply:os.system ['touch {marker}']\n")
        return folder / name

    return write


HF_FOLDERS: dict[str, Callable[[Path, Path], Path]] = {
    "code named by auto_map": python_files,
    "a chat template": template,
    "a chat template of the tokenizer": template_of_the_tokenizer,
    "pickled weights": torch_weights,
    "pickled weights in the index": torch_weights_in_the_index,
    "a pickle called safetensors": pickle_as("model.safetensors"),
    "a pickle called tokenizer.json": pickle_as("tokenizer.json"),
    "a pickle called tiktoken.model": pickle_as("tiktoken.model", "tokenizer.json"),
    "a pickle called config.json": pickle_as("config.json"),
    "a pickle called generation_config.json": pickle_as("generation_config.json"),
    "tags in config.json": tagged("config.json"),
    "tags in generation_config.json": tagged("generation_config.json"),
    "tags in tokenizer_config.json": tagged("tokenizer_config.json"),
}
"""Each writes its bait into a folder that can be imported otherwise, and returns the live file."""


def use(folders: list[str]) -> dict[str, str]:
    """Import the model in each folder, export it again and let it write; the errors."""
    errors = {}
    for name in folders:
        folder = Path(name)
        try:
            import_hf(next(folder.glob("hf*")), folder / "run")
            parallel.stop()
            configuration.load(folder / "run" / "config.yaml")
            export(folder / "run", folder / "again", text_only=True)
            list(generate.sample(generate.load(folder / "run"), "a", max_tokens=1))
        except PretrainError as error:
            errors[name] = str(error)
        finally:
            parallel.stop()
    return errors


def set_off(file: Path) -> None:
    """Do what the project must not do with a file."""
    content = file.read_bytes()
    with suppress(Exception):
        if file.suffix == ".py":
            runpy.run_path(str(file))
        elif file.suffix == ".jinja":
            jinja2.Environment().from_string(content.decode()).render()
        elif b"!!python" in content:
            yaml.unsafe_load(content)
        elif file.suffix == ".bin":
            torch.load(file, weights_only=False)
        else:
            pickle.loads(content)


def test_hugging_face_folders_run_no_code(tmp_path: Path) -> None:
    folders = {name: tmp_path / str(number) for number, name in enumerate(HF_FOLDERS)}
    for name, folder in folders.items():
        hf_folder(folder / "hf")
        HF_FOLDERS[name](folder / "hf", folder / "marker")
    (errors,) = launch(use, 1, [str(folder) for folder in folders.values()])
    for name, folder in folders.items():
        # Text alone is imported, exported and used; other files are refused.
        error = errors.get(str(folder), "")
        assert bool(error) == ("pickle" in name or "tags" in name), name
        assert "\n" not in error, name
        assert not (folder / "marker").exists(), name
        hf_folder(folder / "alive")
        set_off(HF_FOLDERS[name](folder / "alive", folder / "marker"))
        assert (folder / "marker").exists(), f"{name}: the bait is alive"


def test_a_folders_name_adds_no_settings(tmp_path: Path) -> None:
    """It is written into config.yaml, which train reads."""
    hf_folder(tmp_path / "hf\nsteps: 7")
    (errors,) = launch(use, 1, [str(tmp_path)])
    assert not errors
    assert "steps" not in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())


TOKENIZERS: dict[str, bytes | None] = {
    "tokenizer.json": None,
    "tiktoken.model": None,
    "a.model": b"!!python/object/apply:os.system ['true']",
    "b.json": b'{"__reduce__": "os.system"}',
    "deep.json": b"[" * 10**6,
    "object.json": b'{"a":' * 10**5,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_run_no_code(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    file = tmp_path / name
    file.write_bytes(TOKENIZERS[name] or pickle.dumps(Touch(marker)))
    check(marker, lambda: Tokenizer.load(file))
    with pytest.raises(PretrainError):
        Tokenizer.load(file)
    if TOKENIZERS[name] is None:
        pickle.loads(file.read_bytes())
        assert marker.exists()


def test_tokenizers_do_not_take_more_memory_than_there_is(tmp_path: Path) -> None:
    Tokenizer.train(["some text"], 300).save(tmp_path / "tokenizer.json")
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    described["model"]["vocab"]["huge"] = 1 << 31
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(PretrainError, match="a token has the id 2147483648"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "line",
    [
        "steps: !!python/object/apply:os.system ['touch {marker}']",
        "run_dir: !!python/object/new:os.system ['touch {marker}']",
        "data: !!python/object/apply:subprocess.getoutput ['touch {marker}']",
    ],
)
def test_configurations_run_no_code(tmp_path: Path, line: str) -> None:
    marker, file = tmp_path / "marker", tmp_path / "a.yaml"
    file.write_text(line.format(marker=marker))
    check(marker, lambda: configuration.load(file))
    set_off(file)
    assert marker.exists()


@pytest.mark.parametrize("name", ["imported.json", "tokenizer.json"])
def test_files_of_a_run_run_no_code(tmp_path: Path, name: str) -> None:
    hf_folder(tmp_path / "hf")
    (errors,) = launch(use, 1, [str(tmp_path)])
    assert not errors
    run, marker = tmp_path / "run", tmp_path / "marker"
    (run / name).write_bytes(pickle.dumps(Touch(marker)))
    check(marker, lambda: export(run, tmp_path / "out", text_only=True))
    assert not (tmp_path / "out").exists()
    set_off(run / name)
    assert marker.exists()


@pytest.mark.parametrize("kind", ["text", "chat", "images"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.pkl", "a.jsonl.gz", "a.npy"])
def test_text_and_conversations_run_no_code(tmp_path: Path, kind: str, name: str) -> None:
    """A pickle under any name, and JSON that asks for a class, are bytes and values."""
    marker = tmp_path / "marker"
    folder = tmp_path / "data"
    folder.mkdir()
    attack = pickle.dumps(Touch(marker))
    (folder / name).write_bytes(gzip.compress(attack) if name.endswith(".gz") else attack)
    asks = {"__reduce__": ["os.system", [f"touch {marker}"]], "text": f"{{{{cycler({marker})}}}}"}
    (folder / "b.jsonl").write_text(json.dumps(asks) + "\n")
    for path in (folder, folder / name, folder / "b.jsonl"):
        source = SourceConfig(kind, str(path))  # type: ignore[arg-type]
        cache = str(tmp_path / "cache")
        config = DataConfig(
            seq_length=128, vocab_size=300, held_out=0, cache_dir=cache, sources=(source,)
        )

        def read(config: DataConfig = config) -> None:
            open_data(config, 14, 0, RankShare()).sample("train", 0)

        check(marker, read)
    pickle.loads(attack)
    assert marker.exists()
