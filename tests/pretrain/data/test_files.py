"""Every file is read according to its content, or listed with the reason."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.config import SourceConfig
from pretrain.data import files
from pretrain.data.skipped import Skip, within_limit
from pretrain.data.sources.chat import Chat
from pretrain.data.sources.images import Mixed
from pretrain.data.sources.text import Text
from pretrain.errors import PretrainError
from tests.pretrain.data import make

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".zstd": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
OBJECTS = [{"text": f"Document {number}: é, \u2028 and {{braces}}."} for number in range(30)]
LINES = "".join(json.dumps(one) + "\n" for one in OBJECTS).encode()
EXPECTED = [one["text"] for one in OBJECTS]


def read(path: Path | str) -> tuple[list[str], list[Skip]]:
    records = make.records(SourceConfig("text", str(path)), max_corrupt=10**6)
    texts = [record.text for record in records if isinstance(record, Text)]
    return texts, [record for record in records if isinstance(record, Skip)]


@pytest.mark.parametrize("packed", COMPRESSIONS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "A.JSON", "a.txt"])
def test_json_lines_are_recognized_under_any_name(tmp_path: Path, name: str, packed: str) -> None:
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(COMPRESSIONS[packed](LINES))
    # By content: named, by a pattern, in a folder, and without any of the usual suffixes.
    for where in (path, tmp_path, f"{tmp_path}/*"):
        assert read(where) == (EXPECTED, [])
    bare = path.rename(tmp_path / "part-00000")
    assert read(bare) == (EXPECTED, [])


@pytest.mark.parametrize("packed", COMPRESSIONS)
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_of_objects_is_read_element_by_element(
    tmp_path: Path, packed: str, indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_HEAD", 64)  # smaller than an element
    path = tmp_path / f"alpaca.json{packed}"
    path.write_bytes(COMPRESSIONS[packed](json.dumps(OBJECTS, indent=indent).encode()))
    assert read(path) == (EXPECTED, [])
    # One that is cut off gives what is whole, and is listed.
    path.write_bytes(COMPRESSIONS[packed](json.dumps(OBJECTS, indent=indent).encode()[:-20]))
    texts, (skip,) = read(path)
    assert texts == EXPECTED[:-1]
    assert skip.reason.startswith("cannot be read after element 29: not JSON")


texts = st.text(st.sampled_from('ab\\"{}[],: té😀'), max_size=30)
damaged = st.sampled_from(
    [
        *(b'{"text": nope}', b'{"text": "a\tb"}', b'{"a" "b"}', b"{,}", b'{"text": "caf\xe9"}'),
        *(b'{"text": "a", "text": "b"}', b'{"a": {"b": 1, "b": 2}, c}', b"[" * 400 + b"]" * 400),
        *(b'{"text": ' + b"1" * 5000 + b"}", b"[[" * 60000 + b"]]" * 60000),
        *(b'{"text": "' + b"long " * 200 + b'"}', b'{"text": "' + b'\\"' * 500 + b'"}'),
        *(b"\0\0\0", b'{"text": "\0"}'),
    ]
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(texts, damaged), max_size=6), st.integers(1, 70), st.booleans())
def test_damaged_elements_and_lines_are_listed_and_others_are_read(
    tmp_path_factory: pytest.TempPathFactory,
    elements: list[str | bytes],
    head: int,
    is_array: bool,
) -> None:
    """Also if they are too large, and wherever a part of the file that is read at once ends."""
    written = [
        one
        if isinstance(one, bytes)
        else json.dumps({"text": f"{one}."}, ensure_ascii=False).encode()
        for one in ["first", *elements]
    ]
    path = tmp_path_factory.mktemp("damaged") / ("a.json" if is_array else "a.jsonl")
    path.write_bytes(b"[" + b",\n".join(written) + b"]" if is_array else b"\n".join(written))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_HEAD", max(head, len('[{"text": "first."}')))
        patch.setattr(files, "MAX_DOCUMENT_BYTES", 900)
        found, skips = read(path)
    assert found == [f"{one}." for one in ["first", *elements] if isinstance(one, str)]
    bad = [number for number, one in enumerate(elements, 2) if isinstance(one, bytes)]
    assert [skip.name for skip in skips] == [
        f"{path}[{n}]" if is_array else f"{path}:{n}" for n in bad
    ]


@pytest.mark.parametrize("content", ['[{"text": "a"}}, 1]', '[{"text": "a"}, "', '[{"text": "a"}'])
def test_what_follows_a_damaged_array_is_listed(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    texts, (skip,) = read(tmp_path / "a.json")
    assert texts == ["a"] and skip.reason.startswith("cannot be read after element 1: ")


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return out.getvalue()


def archive() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a.txt", "text")
    return out.getvalue()


def array() -> bytes:
    out = io.BytesIO()
    np.save(out, np.arange(100))
    return out.getvalue()


FOREIGN: dict[str, tuple[bytes, str]] = {
    "a.parquet": (b"PAR1\x15\x04", "a damaged table"),
    "a.arrow": (b"ARROW1\0\0", "a damaged table"),
    "a.parquet.gz": (gzip.compress(b"PAR1\x15\x04"), "a compressed or damaged Parquet file"),
    "a.arrow.gz": (gzip.compress(b"ARROW1\0\0"), "a compressed or damaged Arrow file"),
    "a.feather": (b"FEA1\0\0", "Feather version 1|a compressed or damaged Arrow file"),
    "encrypted.bin": (b"PARE\x15\x04", "encrypted Parquet|binary data"),
    "a.orc": (b"ORC\n\x12", "ORC"),
    "a.npy": (array(), "NumPy"),
    "a.pdf": (b"%PDF-1.7\n", "PDF"),
    "a.html": (b"<!DOCTYPE html><p>hello", "HTML"),
    "a.htm": (b"\n<html lang=en><p>hello", "HTML"),
    "a.warc": (b"WARC/1.0\r\n", "WARC"),
    "a.tar": (tar(), "a tar archive"),
    "a.zip": (archive(), "a ZIP archive"),
    "utf-16.csv": ("text".encode("utf-16"), "UTF-16LE|CSV"),
    "a.bin": (np.arange(5000, dtype=np.uint16).tobytes(), "binary data"),
    "twice.gz": (gzip.compress(gzip.compress(b"text")), "compressed twice"),
    "pretty.json": (json.dumps(OBJECTS[0], indent=1).encode(), "a JSON object over several lines"),
    "large.json": (
        json.dumps({str(n): "x" * 99 for n in range(999)}, indent=1).encode(),
        "a JSON object over several lines",
    ),
    "numbers.json": (b"[1, 2, 3]", "neither JSON lines nor"),
    "latin.txt": ("caf\xe9".encode("latin-1"), "not UTF-8 .byte 0xe9 at 3.: convert it"),
    "utf-16-be.txt": ("\ufefftext".encode("utf-16-be"), "UTF-16BE, not UTF-8: convert it"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_unsupported_formats_are_skipped_with_advice(tmp_path: Path, name: str) -> None:
    content, kind = FOREIGN[name]
    for path in (tmp_path / name, tmp_path / "renamed.txt"):
        path.write_bytes(content)
        if "neither" in kind and path.suffix == ".txt":
            continue  # some numbers are a text
        texts, (skip,) = read(path)
        assert texts == []
        assert Path(skip.name) == path and re.match(kind, skip.reason)
    # By name: tables differ from text only by their names.
    for table in ("a.csv", "a.tsv", "a.csv.gz"):
        (tmp_path / table).write_bytes(b"a,b\n1,2\n")
        texts, (skip,) = read(tmp_path / table)
        assert texts == [] and "which is not read: convert it to JSON lines" in skip.reason


def test_byte_order_marks_and_windows_line_ends_are_removed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"))
    assert read(tmp_path) == (["one\r\ntwo", *EXPECTED], [])


def test_text_that_resembles_another_format_is_read_as_text(tmp_path: Path) -> None:
    beginnings = ["BZhang wrote", "PAR1 is a receptor", "{x} is a set", "[a link](b)", "GIF8 is"]
    for number, text in enumerate(beginnings):
        (tmp_path / f"{number}.md").write_text(text)
    assert read(tmp_path) == (beginnings, [])


BAD_LINES = {
    "[" * 200_000: "not JSON: nested too deeply",
    '{"a":' * 200_000: "not JSON: nested too deeply",
    '{"text": "\\ud800"}': "half a surrogate pair",
    '{"text": "a", "text": "b"}': "the key 'text' is repeated",
    '{"text": "a", "images": ["a.jpg"]}': "its 'images' would be lost",
    '{"text": ' + "9" * 5000 + "}": "not JSON: Exceeds the limit",
    '{"text": NaN}': "has no text in its field",
    '{"text": null}': "has no text in its field",
    '{"body": "a"}': "has no field 'text', only body: set the source's field",
    "\x00": "not JSON",
    "text": "not JSON",
    '"text"': "not a JSON object",
}


def test_a_bad_line_skips_only_that_line(tmp_path: Path) -> None:
    lines = [line for bad in BAD_LINES for line in (json.dumps(OBJECTS[0]), bad)]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "caf\xe9"}\n' + LINES)
    texts, skips = read(path)
    assert len(texts) == len(BAD_LINES) + 30
    reasons = [*BAD_LINES.values(), "not UTF-8 (byte 0xe9"]
    for number, (skip, reason) in enumerate(zip(skips, reasons, strict=True), 1):
        assert skip.name == f"{path}:{2 * number - (number > len(BAD_LINES))}"
        assert skip.reason.startswith(reason) and len(skip.reason) < 400


def test_repeated_keys_are_found_in_linear_time() -> None:
    """A quadratic search would need minutes."""
    pairs = [*(f'"{number}": 0' for number in range(200_000)), '"199999": 0']
    with pytest.raises(ValueError, match="the key '199999' is repeated"):
        files.from_json(f"{{{', '.join(pairs)}}}")


def test_endless_lines_are_skipped_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_DOCUMENT_BYTES", 1 << 20)
    monkeypatch.setattr(files, "_MAX_PASSED_BYTES", 8 << 20)
    good = LINES.splitlines()[0] + b"\n"
    long = b'{"text": "' + b"x" * (2 << 20) + b'"}\n'
    for packed, compress in COMPRESSIONS.items():
        path = tmp_path / f"a.jsonl{packed}"
        path.write_bytes(compress(good + long + good))
        texts, (skip,) = read(path)
        assert texts == [EXPECTED[0]] * 2 and skip == Skip(f"{path}:2", "larger than 1 MiB")
        # If the end of a line is not found in reasonable time, the rest of the file is skipped.
        path.write_bytes(compress(good + b"x" * (20 << 20) + b"\n" + good))
        texts, skips = read(path)
        assert texts == [EXPECTED[0]]
        assert [skip.name for skip in skips] == [f"{path}:2", str(path)]
        assert skips[1].reason.startswith("cannot be read after line 2: the line is longer than")
        plain = tmp_path / f"a.txt{packed}"
        plain.write_bytes(compress(b"x" * (2 << 20)))
        texts, (skip,) = read(plain)
        assert texts == [] and "larger than 1 MiB: split it" in skip.reason


def test_decompression_is_incremental(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.zst"
    path.write_bytes(zstandard.compress(bytes(1 << 28)))
    assert path.stat().st_size < 1 << 20
    largest = 0
    with files.open_file(path) as stream:
        raw: Any = stream.raw  # type: ignore[attr-defined]
        for _ in range(100):
            stream.read(1 << 16)
            largest = max(largest, len(raw._ready))
    assert largest <= 64 << 20


@pytest.mark.parametrize("packed", [name for name in COMPRESSIONS if name])
def test_truncated_compressed_files_are_read_as_far_as_possible(
    tmp_path: Path, packed: str
) -> None:
    path = tmp_path / f"a.jsonl{packed}"
    content = COMPRESSIONS[packed](LINES[: len(LINES) // 2]) + COMPRESSIONS[packed](
        LINES[len(LINES) // 2 :]
    )
    path.write_bytes(content)
    assert read(path) == (EXPECTED, []), "several frames are one stream"
    path.write_bytes(content + bytes(512))
    assert read(path) == (EXPECTED, []), "padding"
    path.write_bytes(content[:-12])
    texts, skips = read(path)
    assert texts == EXPECTED[: len(texts)]
    assert any("it ends in the middle of a frame" in skip.reason for skip in skips)


def test_linked_folders_are_read_once_and_cycles_end(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    for folder in (data / "a", other / "deep"):
        folder.mkdir(parents=True)
        (folder / "x.txt").write_text(f"text in {folder.name}")
    (data / "link").symlink_to(other)
    (data / "again").symlink_to(data / "a")
    (data / "a" / "circle").symlink_to(data)
    (data / "broken.txt").symlink_to(tmp_path / "nowhere")
    texts, skips = read(data)
    assert texts == ["text in a", "text in deep"]
    reasons = {str(Path(skip.name).relative_to(data)): skip for skip in skips}
    assert reasons.keys() == {"again", "a/circle", "broken.txt"}
    assert reasons["again"].reason == "a link to a folder that is read already"
    assert "No such file" in reasons["broken.txt"].reason and reasons["broken.txt"].corrupt
    texts, skips = read(f"{data}/**/*.txt")
    assert sorted(texts) == ["text in a", "text in deep"]
    assert {Path(skip.name).name for skip in skips} == {"again", "circle", "broken.txt"}


def test_unreadable_folders_and_files_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.txt").write_text(f"{name}{number}")
    scandir, opened = os.scandir, Path.open

    def no_folder(path: Any = ".") -> Any:
        if os.fspath(path) == str(tmp_path / "b"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    def no_file(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == "1.txt":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(os, "scandir", no_folder)
    monkeypatch.setattr(Path, "open", no_file)
    for where in (tmp_path, f"{tmp_path}/*/*.txt", f"{tmp_path}/**/*.txt"):
        texts, skips = read(where)
        assert texts == ["a0"]
        assert {Path(skip.name).name: skip.reason for skip in skips} == {
            "1.txt": "Permission denied",
            "b": "the folder cannot be read: Permission denied",
        }
    with pytest.raises(PretrainError, match=r"has no files of text .* in it \(\S*b: the folder"):
        read(tmp_path / "b")


names = st.one_of(
    st.sampled_from([b"a.jsonl", b"b.json", b"c.txt", b".hidden", b"d.csv", b"e", b"\xe9.txt"]),
    st.binary(min_size=1, max_size=12).map(lambda b: b.translate(None, b"/\0:[") or b"x"),
)
contents = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace")),
    st.lists(st.sampled_from([*LINES.splitlines(), b"{", b"[", b"\xff", b"1"])).map(b"\n".join),
    st.sampled_from([content for content, _ in FOREIGN.values()]),
)
packings = st.sampled_from(list(COMPRESSIONS.values()))


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(names, st.tuples(contents, packings, st.integers(0, 30)), max_size=5))
def test_every_file_of_a_folder_is_read_or_listed(
    tmp_path_factory: pytest.TempPathFactory, made: dict[bytes, Any]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name, (content, pack, cut) in made.items():
        if name in (b".", b".."):
            continue
        data = pack(content)
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(data[: len(data) - cut] if cut > 20 else data)
    present = {str(path) for path in folder.iterdir()}
    for kind in ("text", "chat"):
        try:
            records = make.records(SourceConfig(kind, str(folder)), max_corrupt=10**6)
        except PretrainError as error:
            assert "\n" not in str(error)
            continue
        seen = set()
        for record in records:
            assert isinstance(record, Text | Chat | Skip)
            name = record.name
            seen.add(next(path for path in present if name == path or _within(name, path)))
            if isinstance(record, Text):
                assert record.text.strip() and record.hash >= 0
            elif isinstance(record, Skip):
                assert record.reason.isprintable() and len(record.reason) < 500
                json.dumps(record._asdict())
        assert seen == present


def _within(name: str, path: str) -> bool:
    return name.startswith((f"{path}:", f"{path}["))


def test_reading_stops_at_the_limit_of_corrupt_records() -> None:
    def endless() -> Any:
        number = 0
        while True:
            yield Skip(str(number := number + 1), "damaged")

    with pytest.raises(
        PretrainError, match=r"4 samples are corrupt, more than data\.max_corrupt=3"
    ):
        list(within_limit(endless(), 3))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"image": "a.png", "caption": "a", "images": ["b.png"]}, "has 'image' and 'images'"),
        ({"parts": ["a", {"image": "a.png"}], "image": "b.png"}, "its 'image' would be lost"),
        ({"parts": ["a"], "video": "b.mp4"}, "its 'video' would be lost"),
        ({"image": "a.png", "caption": "a", "audio": "a.wav"}, "its 'audio' would be lost"),
        ({"image": "a.png", "caption": "a", "image_url": "http://a.org/a.png", "images": []}, ""),
    ],
)
def test_documents_lose_no_images_silently(
    tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(fields))
    (record,) = make.records(SourceConfig("images", str(path)))
    if reason:
        assert isinstance(record, Skip) and reason in record.reason
    else:
        assert isinstance(record, Mixed)
