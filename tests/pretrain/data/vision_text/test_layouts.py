"""Every layout gives the documents that its records mean, wherever the images are."""

import base64
import gzip
import io
import itertools
import json
import lzma
import os
import shutil
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import webdataset
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import feather, ipc, parquet

from pretrain.config import SourceConfig
from pretrain.data.media import frames
from pretrain.data.skipped import Skip
from pretrain.data.vision_text.document import Mixed
from pretrain.errors import PretrainError
from tests.pretrain.data.make import picture
from tests.pretrain.data.media.test_video import film, greys
from tests.pretrain.data.vision_text import make

Entry = dict[str, str]


def read(path: Path, **entry: str) -> list[Mixed | Skip]:
    """Every document of a source, and what is left out."""
    from pretrain.config import DataConfig
    from pretrain.data.sources import find_sources

    config = SourceConfig("images", str(path), **entry)  # type: ignore[arg-type]
    cache = str(path.parent / "cache")
    data = DataConfig(sources=(config,), max_corrupt=1000, cache_dir=cache)
    (source,) = find_sources(data, seed=0)
    return [*source.skips, *source.records()]  # type: ignore[attr-defined, list-item]


def shown(document: Mixed | Skip) -> list[Any]:
    """The parts of a document: text, or the pixels of the first frame."""
    assert isinstance(document, Mixed), document
    return [
        part if isinstance(part, str) else next(frames.read(part, 1)) for part in document.parts
    ]


def pixels(number: int) -> Any:
    return np.asarray(picture(number)[0])


def same(found: list[Any], expected: list[Any]) -> bool:
    return len(found) == len(expected) and all(
        one == other if isinstance(other, str) else np.array_equal(one, other)
        for one, other in zip(found, expected, strict=True)
    )


def arrow(path: Path, compression: str | None = None, stream: bool = False) -> None:
    table = make.dataset().data.table
    if not stream:
        feather.write_feather(table, str(path), compression=compression or "uncompressed")
        return
    with ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def tar_of_pngs(path: Path, compress: bool = False) -> None:
    with webdataset.TarWriter(str(path), compress=compress) as writer:
        for number in range(make.COUNT):
            caption = make.CAPTIONS[number]
            writer.write({"__key__": f"a/{number:03}", "png": make.encoded(number), "txt": caption})


CAPTIONED: dict[str, tuple[str, Callable[[Path], object], Entry]] = {
    "metadata.jsonl": ("a", make.imagefolder, {}),
    "Parquet": ("a.parquet", lambda path: make.dataset().to_parquet(path), {}),
    "small row groups": (
        "a.parquet", lambda path: make.dataset().to_parquet(path, batch_size=5), {},
    ),
    "a saved dataset": ("a", lambda path: make.dataset().save_to_disk(str(path)), {}),
    "an Arrow stream": ("a.arrow", lambda path: arrow(path, stream=True), {}),
    "an Arrow file": ("a.arrow", arrow, {}),
    "a compressed Arrow file": ("a.feather", lambda path: arrow(path, "lz4"), {}),
    "a shard": ("a.tar", tar_of_pngs, {}),
    "a compressed shard": ("a.tar.gz", lambda path: tar_of_pngs(path, compress=True), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CAPTIONED)
def test_images_and_captions_are_those_that_were_written(tmp_path: Path, name: str) -> None:
    file, write, entry = CAPTIONED[name]
    write(tmp_path / file)
    documents = read(tmp_path / file, **entry)
    documents = [one for one in documents if isinstance(one, Mixed) or one.corrupt]
    assert len(documents) == make.COUNT
    for number, document in enumerate(documents):
        assert same(shown(document), [pixels(number), make.CAPTIONS[number]])
    assert len({document.hash for document in documents}) == make.COUNT  # type: ignore[union-attr]


@pytest.mark.parametrize("write", [make.mds, make.plain_mds])
def test_shards_of_mosaicml_are_read(tmp_path: Path, write: Callable[[Path], object]) -> None:
    write(tmp_path / "mds")
    documents = [one for one in read(tmp_path / "mds") if isinstance(one, Mixed)]
    assert [shown(one)[1] for one in documents] == make.CAPTIONS
    assert [shown(one)[0].shape for one in documents] == [
        pixels(number).shape for number in range(make.COUNT)
    ]


@pytest.mark.parametrize("field", ["images", "scans"])
def test_lists_of_images_in_shards_of_mosaicml_are_read(tmp_path: Path, field: str) -> None:
    make.mds_of_lists(tmp_path / "mds")
    found = read(tmp_path / "mds", image_field=field)
    documents = [one for one in found if isinstance(one, Mixed)]
    assert [shown(one)[-1] for one in documents] == make.CAPTIONS[:6]
    for number, document in enumerate(documents):
        sizes = [part.shape for part in shown(document)[:-1]]
        assert sizes == [pixels(number).shape, pixels(number + 1).shape]
    if field == "images":
        assert same(shown(documents[0])[:2], [pixels(0), pixels(1)])


@pytest.mark.parametrize("write", [make.mmc4, make.mmc4_archived])
def test_images_of_mmc4_precede_their_sentences(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    write(tmp_path / "mmc4")
    documents = [one for one in read(tmp_path / "mmc4") if isinstance(one, Mixed)]
    for number, document in enumerate(documents):
        before = pixels((number - 1) % make.COUNT)
        expected = [before, f"Sentence {number}.", pixels(number), "Another one. The last one."]
        assert same(shown(document), expected)
    assert len(documents) == make.COUNT


@pytest.mark.parametrize("file", ["a.parquet", "lines"])
def test_obelics_is_read_in_order(tmp_path: Path, file: str) -> None:
    (make.obelics_parquet if file == "a.parquet" else make.obelics_lines)(tmp_path / file)
    documents = [one for one in read(tmp_path / file) if isinstance(one, Mixed)]
    rows = make.obelics_rows([pixels(number) for number in range(make.COUNT)])
    assert len(documents) == make.COUNT - 1
    for number, document in enumerate(documents):
        texts, images = rows["texts"][number], rows["images"][number]
        expected = [texts[0].strip(), images[1], texts[2].strip(), images[3]]
        assert same(shown(document), expected)


def test_several_images_have_one_caption(tmp_path: Path) -> None:
    make.image_lists(tmp_path / "lists.parquet")
    make.several_images(tmp_path / "folder")
    for number, document in enumerate(read(tmp_path / "lists.parquet", field="summary")):
        if number < make.COUNT:
            expected = [pixels(number), pixels(number + 1), make.CAPTIONS[number]]
            assert same(shown(document), expected)
    (first, *_) = (one for one in read(tmp_path / "folder") if isinstance(one, Mixed))
    assert same(shown(first), [pixels(0), pixels(1), make.CAPTIONS[1]])
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        images = {f"{n}.png": make.encoded(n) for n in range(3)}
        writer.write({"__key__": "a", **images, "txt": "three"})
    (document,) = read(tmp_path / "a.tar")
    assert same(shown(document), [*map(pixels, range(3)), "three"])


def test_each_of_several_captions_is_a_document(tmp_path: Path) -> None:
    images, captions = [picture(0)[0], picture(1)[0]], [["a", "b"], ["c"]]
    features = datasets.Features(
        image=datasets.Image(), captions=datasets.List(datasets.Value("string"))
    )
    table = datasets.Dataset.from_dict({"image": images, "captions": captions}, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    found = [shown(one) for one in read(tmp_path / "a.parquet", field="captions")]
    expected = [[pixels(0), "a"], [pixels(0), "b"], [pixels(1), "c"]]
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


def test_fields_choose_captions_and_images(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write(
            {
                "__key__": "a",
                "png": make.encoded(0),
                "mask.png": make.encoded(1),
                "txt": "txt",
                "json": {"caption": "caption", "alt": "alt"},
            }
        )
    for entry, expected in (
        ({}, [pixels(0), pixels(1), "txt"]),
        ({"field": "alt"}, [pixels(0), pixels(1), "alt"]),
        ({"image_field": "png"}, [pixels(0), "txt"]),
        ({"field": "missing", "image_field": "mask.png"}, [pixels(1), "txt"]),
    ):
        (document,) = read(tmp_path / "a.tar", **entry)
        expected = sorted(expected[:-1], key=lambda one: one.shape) + expected[-1:]
        found = shown(document)
        found = sorted(found[:-1], key=lambda one: one.shape) + found[-1:]
        assert same(found, expected)


# ---------------------------------------------------------------------- bad input


def table(path: Path, **columns: Any) -> Path:
    parquet.write_table(pa.table(columns), path)
    return path


IMAGE = {"bytes": make.encoded(0), "path": "a.png"}


@pytest.mark.parametrize(
    ("columns", "entry", "message"),
    [
        ({"image": [IMAGE]}, {}, "has no column 'text' of captions; its columns are image"),
        (
            {"image": [IMAGE], "summary": ["a"]},
            {},
            "has no column 'text' of captions; set field to 'summary', the likely one",
        ),
        (
            {"image": [IMAGE], "text": [1], "body": ["a"]},
            {},
            "has 'text' of type int64, not text: set field to 'body'",
        ),
        ({"image": [5], "text": ["a"]}, {"image_field": "image"}, "type int64, not images"),
        ({"image": [IMAGE], "text": ["a"]}, {"image_field": "b"}, "no column 'b' of images"),
        (
            {"left": [IMAGE], "right": [IMAGE], "text": ["a"]},
            {},
            "the images left, right: set image_field to one",
        ),
        ({"number": [5], "text": ["a"]}, {}, "has no column of images: set image_field"),
    ],
)
def test_a_table_without_the_columns_stops_with_one_line(
    tmp_path: Path, columns: dict[str, Any], entry: Entry, message: str
) -> None:
    path = table(tmp_path / "a.parquet", **columns)
    with pytest.raises(PretrainError, match=message) as raised:
        read(path, **entry)
    assert "\n" not in str(raised.value) and str(raised.value).startswith("data.sources[0]: ")


def test_a_schema_that_changes_stops_before_anything_is_read(tmp_path: Path) -> None:
    from pretrain.config import DataConfig
    from pretrain.data import open_data

    (tmp_path / "a").mkdir()
    table(tmp_path / "a" / "1.parquet", image=[IMAGE], text=["a"])
    table(tmp_path / "a" / "2.parquet", image=[IMAGE], caption_of_it=["a"])
    config = DataConfig(
        cache_dir=str(tmp_path / "cache"),
        sources=(SourceConfig("images", str(tmp_path / "a")),),
        max_corpus_mb=0.1,
    )
    with pytest.raises(PretrainError, match=r"2\.parquet .*different columns are different source"):
        open_data(config, 14, 0)


def reasons(documents: list[Mixed | Skip]) -> list[str]:
    return [one.reason for one in documents if isinstance(one, Skip)]


def test_single_rows_are_skipped_with_the_reason(tmp_path: Path) -> None:
    rows = [
        (IMAGE, "good"),
        (None, "no image"),
        (IMAGE, None),
        (IMAGE, "  "),
        ({"bytes": None, "path": "../a.png"}, "outside"),
        ({"bytes": None, "path": "ftp://a.org/a.png"}, "elsewhere"),
        ({"bytes": b"", "path": None}, "empty"),
        (None, None),
    ]
    images, texts = zip(*rows, strict=True)
    found = read(table(tmp_path / "a.parquet", image=list(images), text=list(texts)))
    assert isinstance(found[0], Mixed) and len(found) == len(rows)
    # Failed downloads and images without a caption are usual in what img2dataset writes.
    empty = [
        one.name.rpartition(":")[2] for one in found if isinstance(one, Skip) and not one.corrupt
    ]
    assert empty == ["2", "3", "4"]
    for reason, expected in zip(
        reasons(found),
        (
            *("no image in it", "no caption in 'text' or 'caption'", "no caption"),
            *("lies outside", "only URLs of http and https are copied"),
            *("neither an image, a video nor text", "an empty or damaged row"),
        ),
        strict=True,
    ):
        assert expected in reason


def test_documents_without_their_images_are_skipped(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"images": ["a.png"], "texts": [None, "b"]},
        {"images": ["a.png", None], "texts": [None, None]},
        {"images": ["ftp://a.org/a.png", None], "texts": [None, "b"]},
        {"images": [None, 5], "texts": ["b", None]},
        {"text_list": ["a"], "image_info": [{"image_name": "a", "matched_text_index": 1}]},
        {"text_list": ["a"], "image_info": [{"image_name": "a"}]},
        {"text_list": ["a"], "image_info": "a"},
        {"text_list": ["a"], "image_info": ["a"]},
        {"file_name": "a.png", "image": "b.png", "text": "two images"},
        {"image": ["a.png", "b.png"], "audio": "a.wav", "text": "a"},
        {"image": base64.b64encode(bytes(300)).decode(), "text": "a"},
    ]
    (tmp_path / "lines").mkdir()
    make.jsonl(tmp_path / "lines" / "a.jsonl", rows)
    found = read(tmp_path / "lines")
    assert len(found) == len(rows) and all(isinstance(one, Skip) for one in found)
    for reason, expected in zip(
        reasons(found),
        (
            *("not lists of the same length", "no text in it", "only URLs of", "neither an image"),
            *("no 'matched_text_index' below 1", "no 'matched_text_index'", "not lists"),
            *("not an object", "'file_name' and 'image': set image_field", "'audio' would be lost"),
            "its image is in base64, AAAAAAAAAAAAAAAAAAAA…: store its bytes in Parquet",
        ),
        strict=True,
    ):
        assert expected in reason


def test_samples_of_shards_are_skipped_with_the_reason(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        png = make.encoded(0)
        for key, sample in {
            "a": {"png": png},
            "b": {"txt": b"no image", "cls": b"1"},
            "c": {"png": png, "txt": b"\xe9"},
            "d": {"png": png, "json": b"{"},
            "e": {"png": png, "json": b'{"caption": 5}'},
            "f": {"png": png, "json": b'{"caption": "a", "caption": "b"}'},
            "g": {"png": png, "txt": b"good"},
        }.items():
            writer.write({"__key__": key, **sample})
    found = read(tmp_path / "a.tar")
    assert [isinstance(one, Skip) for one in found] == [True] * 6 + [False]
    json_errors = ("not JSON: Expecting", "no caption", "the key 'caption' is repeated")
    for reason, expected in zip(
        reasons(found),
        ("no caption", "no image in it, only ", "not UTF-8", *json_errors),
        strict=True,
    ):
        assert expected in reason


def test_files_with_the_same_name_in_a_sample_are_not_chosen_from(tmp_path: Path) -> None:
    png = make.encoded(0)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in [("a.png", png), ("a.txt", b"one"), ("a.txt", b"two"), ("b.png", png),
                              ("b.txt", b"b")]:  # fmt: skip
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    skip, document = read(tmp_path / "a.tar")
    assert isinstance(skip, Skip) and skip.reason == "its .txt is repeated"
    assert isinstance(document, Mixed) and document.text == "b"


def test_an_archive_after_the_end_of_another_is_listed(tmp_path: Path) -> None:
    """`cat a.tar b.tar` has a second archive, which tar ignores, too."""
    tar_of_pngs(tmp_path / "a.tar")
    assert not reasons(read(tmp_path / "a.tar"))
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(2 * content)
    assert "there is more after its end" in reasons(read(tmp_path / "b.tar"))[-1]
    (tmp_path / "b.tar").write_bytes(content + bytes(1 << 20))  # padding
    assert not reasons(read(tmp_path / "b.tar"))


@pytest.mark.parametrize("name", ["a.tar.gz", "a.parquet"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_a_copy_that_is_cut_off_is_made_again(tmp_path: Path, name: str, share: float) -> None:
    file, write, _ = CAPTIONED["a compressed shard" if name == "a.tar.gz" else "Parquet"]
    write(tmp_path / file)
    found = list(map(shown, read(tmp_path / file)))
    (copy,) = (tmp_path / "cache").rglob("content")
    os.truncate(copy, int(copy.stat().st_size * share))
    again = list(map(shown, read(tmp_path / file)))
    assert all(itertools.starmap(same, zip(found, again, strict=True)))


def test_a_table_without_rows_does_not_affect_others(tmp_path: Path) -> None:
    make.dataset().to_parquet(tmp_path / "a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet")
    parquet.write_table(table.slice(0, 0), tmp_path / "b.parquet")
    found = read(tmp_path)
    assert len(found) == make.COUNT + 1 and reasons(found) == ["no rows in it"]


CUT: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a shard": ("a.tar", tar_of_pngs),
    "a compressed shard": ("a.tar.gz", lambda path: tar_of_pngs(path, compress=True)),
    "Parquet": ("a.parquet", lambda path: make.dataset().to_parquet(path)),
    "an Arrow stream": ("a.arrow", lambda path: arrow(path, stream=True)),
    "MDS": ("shard.00000.mds", lambda path: (make.plain_mds(path.parent / "m"), shutil.copy(
        path.parent / "m" / path.name, path))),
}  # fmt: skip


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7])
def test_files_that_are_cut_off_are_listed(tmp_path: Path, name: str, share: float) -> None:
    file, write = CUT[name]
    write(tmp_path / file)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: int(share * len(content))] or b"\0")
    found = []
    try:
        found = read(tmp_path / file)
    except PretrainError as error:  # not recognized any more
        assert "\n" not in str(error)
        return
    assert any(isinstance(one, Skip) and one.corrupt for one in found)
    good = [one for one in found if isinstance(one, Mixed)]
    for number, document in enumerate(good):
        assert same(shown(document)[1:], [make.CAPTIONS[number]])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(st.data())
@pytest.mark.parametrize("name", CUT)
def test_damage_never_ends_in_another_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    file, write = CUT[name]
    write(folder / file)
    content = bytearray((folder / file).read_bytes())
    places = st.integers(0, 10**6)
    changes = st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=9)
    for place, value in data.draw(changes):
        content[place % len(content)] = value
    (folder / file).write_bytes(content)
    with suppress(PretrainError):
        for document in read(folder / file):
            if isinstance(document, Mixed):
                with suppress(ValueError):
                    shown(document)


def test_pickled_columns_are_not_loaded(tmp_path: Path) -> None:
    make.plain_mds(tmp_path / "mds")
    shard = tmp_path / "mds" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes().replace(b'"str"', b'"pkl"', 1))
    with pytest.raises(PretrainError, match="has 'caption' of type pkl, not text"):
        read(shard)


def test_names_in_archives_are_found_by_an_index(tmp_path: Path) -> None:
    make.mmc4_archived(tmp_path / "mmc4")
    first = [one for one in read(tmp_path / "mmc4") if isinstance(one, Mixed)]
    (tmp_path / "mmc4" / "000.png").write_bytes(make.encoded(5))  # a file comes first
    again = [one for one in read(tmp_path / "mmc4") if isinstance(one, Mixed)]
    assert same(shown(first[0])[2:3], [pixels(0)]) and same(shown(again[0])[2:3], [pixels(5)])
    assert all(
        same(shown(one), shown(other))
        for one, other in itertools.islice(zip(first[2:], again[2:], strict=True), 9)
    )


BAD_ROWS = {
    "too short": (b"000.png", "has more or fewer values"),
    "Latin-1": (b"000.png,caf\xe9", "not UTF-8 (byte 0xe9"),
    "a quote that ends early": (b'000.png,"a" cat', "not CSV: "),
}


def test_metadata_in_csv_may_have_rows_of_another_length(tmp_path: Path) -> None:
    make.pictures(tmp_path / "a", 2)
    lines = ["file_name,text", '000.png,"a, b"', "001.png", "001.png,c,d"]
    (tmp_path / "a" / "metadata.csv").write_text("\n".join(lines))
    documents = read(tmp_path / "a")
    assert [shown(one)[1] for one in documents if isinstance(one, Mixed)] == ["a, b"]
    assert reasons(documents)[-2:] == ["has more or fewer values than the first line"] * 2


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.sampled_from(["good", *BAD_ROWS]), max_size=8))
def test_a_bad_row_of_csv_skips_only_that_row(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("csv")
    good = b'000.png,"%d\n""%d"""'
    lines = [BAD_ROWS[row][0] if row in BAD_ROWS else good % (n, n) for n, row in enumerate(rows)]
    (folder / "metadata.csv").write_bytes(b"\n".join([b"file_name,text", *lines]))
    make.pictures(folder, 1)
    documents = read(folder)
    texts = [document.text for document in documents if isinstance(document, Mixed)]
    assert texts == [f'{n}\n"{n}"' for n, row in enumerate(rows) if row == "good"]
    skips = [one for one in documents if isinstance(one, Skip) and "metadata.csv" in one.name]
    bad = [(f":{n}", BAD_ROWS[row][1]) for n, row in enumerate(rows, 2) if row in BAD_ROWS]
    for skip, (place, why) in zip(skips, bad if rows else [("", "no rows in it")], strict=True):
        assert skip.name == f"{folder}/metadata.csv{place}"
        assert skip.reason.startswith(why)


def test_metadata_in_csv_have_no_value_that_would_be_lost(tmp_path: Path) -> None:
    make.pictures(tmp_path, 1)
    long = "long " * 40_000  # longer than csv's own limit
    (tmp_path / "metadata.csv").write_text(f"file_name,text,,\n000.png,{long},,\n")
    (document,) = read(tmp_path)
    assert isinstance(document, Mixed) and document.text == long.strip()
    (tmp_path / "metadata.csv").write_text("file_name,text,text\n000.png,first,second\n")
    assert "the column 'text' is repeated" in reasons(read(tmp_path))[-1]
    (tmp_path / "metadata.csv").write_text('file_name,text\n000.png,"no end\n001.png,other\n')
    assert reasons(read(tmp_path))[-1] == "not CSV: unexpected end of data"


@pytest.mark.parametrize("subfolder", ["a", "metadata.d"])  # sorted before both, and between them
def test_two_descriptions_of_a_folder_are_not_both_read(tmp_path: Path, subfolder: str) -> None:
    (name,) = make.pictures(tmp_path, 1)
    (tmp_path / subfolder).mkdir()
    make.jsonl(tmp_path / subfolder / "metadata.jsonl", [{"file_name": "other.png", "text": "b"}])
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{name},a\n")
    make.jsonl(tmp_path / "metadata.jsonl", [{"file_name": name, "text": "a"}])
    with pytest.raises(PretrainError, match=r"metadata\.csv and metadata\.jsonl describe the same"):
        read(tmp_path)


def test_any_file_that_names_images_decides_how_a_folder_is_read(tmp_path: Path) -> None:
    (name,) = make.pictures(tmp_path, 1)
    make.jsonl(tmp_path / "a.jsonl", [{"note": "x"}])
    make.jsonl(tmp_path / "b.jsonl", [{"image": name, "caption": "a picture"}])
    tar_of_pngs(tmp_path / "c.tar")
    document, *skips = sorted(read(tmp_path), key=lambda one: isinstance(one, Skip))
    assert isinstance(document, Mixed) and document.text == "a picture"
    assert set(reasons(skips)) == {
        "no image in it",
        "only images that the lines name are read from it",
    }


def test_splits_of_an_imagefolder_are_not_mixed(tmp_path: Path) -> None:
    make.imagefolder_splits(tmp_path / "a")
    with pytest.raises(PretrainError, match="has the splits test, train: set it to one of them"):
        read(tmp_path / "a")
    assert json.dumps(reasons(read(tmp_path / "a" / "test", field="additional_feature"))) == "[]"


@pytest.mark.parametrize("packed", ["gz", "zst", "xz"])
def test_the_beginning_of_a_compressed_shard_that_is_cut_off_is_read(
    tmp_path: Path, packed: str
) -> None:
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(8):
            sample = {"png": make.encoded(number), "txt": f"{number}", "bin": rng.bytes(1 << 18)}
            writer.write({"__key__": f"{number}", **sample})
    compress = {"gz": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress}[packed]
    content = compress((tmp_path / "a.tar").read_bytes())
    (tmp_path / f"b.tar.{packed}").write_bytes(content[: len(content) * 2 // 3])
    *found, skip = read(tmp_path / f"b.tar.{packed}")
    texts = [one.text for one in found if isinstance(one, Mixed)]
    assert texts == [str(number) for number in range(len(found))] and len(texts) > 2
    assert isinstance(skip, Skip) and skip.reason.startswith("cannot be read after ")


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    make.mds(tmp_path / "mds")
    (tmp_path / "mds" / "shard.00001.mds.zstd").unlink()
    missing = [one for one in read(tmp_path / "mds") if isinstance(one, Skip) and one.corrupt]
    assert [one.reason for one in missing] == ["listed in index.json, but missing"]
    (tmp_path / "mds" / "index.json").write_text('{"shards": [5]}')
    missing = [one for one in read(tmp_path / "mds") if isinstance(one, Skip) and one.corrupt]
    assert len(missing) == 1 and missing[0].name.endswith("index.json")


def test_a_file_that_a_pattern_of_numbers_names_twice_is_read_once(tmp_path: Path) -> None:
    make.pictures(tmp_path, 1)
    for number in (111, 12):
        make.jsonl(tmp_path / f"{number}.jsonl", [{"image": "000.png", "caption": f"{number}"}])
    found = read(tmp_path / "{1..11}{1..11}.jsonl")
    texts = [document.text for document in found if isinstance(document, Mixed)]
    assert sorted(texts) == ["111", "12"]


def test_patterns_of_numbers_are_expanded(tmp_path: Path) -> None:
    make.img2dataset_shards(tmp_path / "shards")
    found = read(tmp_path / "shards" / "{00000..00002}.tar")
    assert len(found) == make.COUNT + 1
    assert reasons(found) == ["does not exist"]
    assert len(read(tmp_path / "shards" / "*.tar")) == make.COUNT
    for pattern, message in (("{3..5}.tar", "no file matches"), ("{0..9999999}", "more than")):
        with pytest.raises(PretrainError, match=message):
            read(tmp_path / "shards" / pattern)


def test_an_animation_is_its_first_frame_or_a_clip_under_the_key_video(tmp_path: Path) -> None:
    first, second = (Image.fromarray(np.full((28, 28, 3), level, np.uint8)) for level in (9, 200))
    (tmp_path / "a").mkdir()
    first.save(tmp_path / "a" / "a.gif", save_all=True, append_images=[second])
    rows = [{"image": "a.gif", "text": "one"}, {"video": "a.gif", "text": "two"}]
    make.jsonl(tmp_path / "a" / "captions.jsonl", rows)
    stored = {"bytes": (tmp_path / "a" / "a.gif").read_bytes(), "path": "a.gif"}
    table(tmp_path / "a.parquet", image=[stored], text=["one"])
    table(tmp_path / "b.parquet", video=[stored], text=["two"])
    for path in ("a", "a.parquet", "b.parquet"):
        for document in read(tmp_path / path):
            assert isinstance(document, Mixed)
            count = len(list(frames.read(document.media[0], 1)))
            assert count == {"one": 1, "two": 2}[document.text]


@pytest.mark.parametrize("column", ["mp4", "clip"])
def test_videos_in_tables_are_read(tmp_path: Path, column: str) -> None:
    content = film(tmp_path / "a.mp4", greys(5), 10).read_bytes()
    value = content if column == "mp4" else {"bytes": content, "path": "a.mp4"}
    path = table(tmp_path / "a.parquet", **{column: [value]}, text=["a clip"])
    (document,) = read(path)
    assert isinstance(document, Mixed) and document.media[0].moving
    assert frames.measure(document.media[0], 10)[0] == 5
