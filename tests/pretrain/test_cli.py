"""Every command answers bad input with one line on stderr and a status above 0."""

import gc
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain import cli, config
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError

BAD: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "latin": lambda path: path.write_bytes(b"caf\xe9: 1\n"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "caf\udce9": lambda path: path.write_bytes(b"\xff\xfe"),
    "two\nlines": lambda path: path.write_text("a: b: c"),
    "x" * 300: lambda path: None,
    "binary/below": lambda path: None,
    "circle": lambda path: path.symlink_to(path),
}
COMMANDS = [
    *(["plan", "{}"], ["data", "inspect", "{}"], ["report", "{}"], ["export", "{}", "--to", "hf"]),
    *(["import", "{}", "run"], ["sample", "{}"], ["data", "make-shards", "{}", "shards"]),
    *(["train", "{}"], ["eval", "{}"]),
    *(["data", "inspect", "ok.yaml", "SOURCE " + kind] for kind in ("chat", "images", "energon")),
    ["data", "inspect", "ok.yaml", "TOKENIZER"],
]


def argument(text: str, bad: str) -> str:
    kind, _, source = text.partition(" ")
    if kind == "SOURCE":
        return "data.sources=" + json.dumps([{"type": source, "path": bad}])
    return "data.tokenizer=" + json.dumps(bad) if kind == "TOKENIZER" else text.replace("{}", bad)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_bad_paths_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ok.yaml").write_text("run_dir: run\ndata: {cache_dir: cache, seq_length: 128}\n")
    for bad, make in BAD.items():
        if "/" not in bad:
            make(Path(bad))
        status = cli.main([argument(text, bad) for text in command])
        out, err = capsys.readouterr()
        assert status == 1 and out == "", bad
        assert err.startswith("error: ") and err.count("\n") == 1 and err[:-1].isprintable(), bad


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "a\nb"), "a b: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed"),
            "'utf-8' codec can",
        ),
        (MemoryError("9 TB"), "out of memory 9 TB"),
        (PretrainError("x\x1b[2J"), "x\\x1b[2J"),
    ],
)
def test_system_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    line: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(config, "load", fail)
    assert cli.main(["plan", "a.yaml"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {line}")


@pytest.mark.parametrize("setting", ["--steps=8", "--run_dir"])
def test_settings_with_dashes_are_explained(
    capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "configs/laptop.yaml", setting])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"arguments: {setting} (settings have no dashes: key.sub=value)")
    with pytest.raises(SystemExit):
        cli.main(["report", "runs/laptop", setting])
    assert "settings" not in capsys.readouterr().err


def test_a_folder_instead_of_a_configuration_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands that use a trained model take the run's folder."""
    assert cli.main(["eval", str(tmp_path)]) == 1
    assert "it is a folder: give the YAML file that the run was" in capsys.readouterr().err


def test_a_prompt_among_the_images_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "a.png"
    image.touch()
    assert cli.main(["sample", str(tmp_path), "--image", str(image), "What is it?"]) == 1
    assert capsys.readouterr().err == (
        "error: What is it? does not exist: --image and --video name files, --prompt text\n"
    )


def test_internal_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(config, "load", fail)
    with pytest.raises(KeyError):
        cli.main(["plan", "a.yaml"])


def test_file_names_that_are_not_utf_8_are_shown_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for name, content in ((b"a\xe9.txt", b"some words " * 99), (b"b\xe9.txt", b"\xe9")):
        with open(folder + b"/" + name, "wb") as file:
            file.write(content)
    Tokenizer.train(["some words"], 300).save(tmp_path / "tokenizer.json")
    Path("a.yaml").write_text("data: {cache_dir: cache, tokenizer: tokenizer.json}\n")
    source = json.dumps([{"path": os.fsdecode(folder)}])
    assert cli.main(["data", "inspect", "a.yaml", f"data.sources={source}"]) == 0
    out, _ = capsys.readouterr()
    assert "b\\udce9.txt (not UTF-8 (byte 0xe9 at 0)" in out
    assert "caf\\udce9" in Path("inspect.html").read_text(encoding="utf-8")


def test_collectives_of_megatron_core_cause_no_warning() -> None:
    """torch has given them other names, and warns about those that megatron-core calls."""
    with warnings.catch_warnings(record=True) as caught:
        assert cli.main(["settings"]) == 0
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        for collective in (dist.all_gather_into_tensor, dist.reduce_scatter_tensor):
            collective(torch.empty(2), torch.ones(2))
        dist.destroy_process_group()
    assert not caught


def test_imports_are_not_searched_for_garbage() -> None:
    before = gc.get_freeze_count()
    with cli._without_garbage():
        assert not gc.isenabled()
        imported = [[] for _ in range(1000)]  # type: ignore[var-annotated]
    assert gc.isenabled()
    assert gc.get_freeze_count() - before >= len(imported)
