"""Images that records name by URL are copied from hosts that the source allows."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pretrain.config import DataConfig, SourceConfig
from pretrain.data import open_data
from pretrain.data.media import frames
from pretrain.data.skipped import Skip
from pretrain.data.sources import find_sources, source_types
from pretrain.data.vision_text.document import Mixed
from pretrain.errors import PretrainError
from tests.pretrain.data import stores
from tests.pretrain.data.make import picture
from tests.pretrain.data.test_remote import Handler
from tests.pretrain.data.vision_text import make

COUNT = 4


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address of a folder of images."""
    (tmp_path / "served").mkdir()
    for number in range(COUNT):
        picture(number)[0].save(tmp_path / f"served/{number}.png")
    Handler.broken, Handler.sent = "", []
    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
    with stores.serving(handler) as port:
        yield f"http://127.0.0.1:{port}"


def captions(path: Path, urls: list[str]) -> None:
    pd.DataFrame({"image": urls, "text": make.CAPTIONS[:COUNT]}).to_parquet(path)


def laion(path: Path, urls: list[str]) -> None:
    columns = {"URL": urls, "TEXT": make.CAPTIONS[:COUNT], "WIDTH": [9] * COUNT}
    pd.DataFrame(columns).to_parquet(path)


def lines(path: Path, urls: list[str]) -> None:
    make.jsonl(path, [{"image": u, "text": t} for u, t in zip(urls, make.CAPTIONS, strict=False)])


def obelics(path: Path, urls: list[str]) -> None:
    rows = {
        "images": [[url, None] for url in urls],
        "texts": [[None, text] for text in make.CAPTIONS[:COUNT]],
    }
    pd.DataFrame(rows).to_parquet(path)


Write = Callable[[Path, list[str]], None]
LAYOUTS: dict[str, tuple[Write, dict[str, Any]]] = {
    "a.parquet": (captions, {}),
    "laion.parquet": (laion, {"field": "TEXT", "image_field": "URL"}),
    "a.jsonl": (lines, {}),
    "obelics.parquet": (obelics, {}),
}


def settings(path: Path, **entry: Any) -> DataConfig:
    source = SourceConfig("images", str(path), **entry)
    cache = str(path.parent / "cache")
    return DataConfig(sources=(source,), cache_dir=cache, seq_length=256, held_out=0.0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_images_at_urls_are_those_of_the_server(tmp_path: Path, address: str, name: str) -> None:
    write, entry = LAYOUTS[name]
    write(tmp_path / name, [f"{address}/{number}.png" for number in range(COUNT)])
    config = settings(tmp_path / name, media_urls=("127.0.0.1",), **entry)
    for _ in range(2):
        (source,) = find_sources(config, seed=0)
        found = list(source.records())
        assert len(found) == COUNT
        for number, document in enumerate(found):
            assert isinstance(document, Mixed) and document.text == make.CAPTIONS[number]
            (media,) = document.media
            shown = next(frames.read(media, 1))
            assert np.array_equal(shown, np.asarray(picture(number)[0]))
    assert sorted(Handler.sent) == [f"{number}.png" for number in range(COUNT)]


def test_other_hosts_and_broken_images_are_skipped(tmp_path: Path, address: str) -> None:
    Handler.broken = "1.png"
    urls = [f"{address}/0.png", f"{address}/1.png", "https://a.org/2.png", f"{address}/none.png"]
    captions(tmp_path / "a.parquet", urls)
    data = open_data(settings(tmp_path / "a.parquet", media_urls=("127.0.0.1",)), 14, 0)
    reasons = [skip.reason for skip in data.take_skipped()]
    assert all(skip.startswith(url) for skip, url in zip(reasons, urls[1:], strict=True))
    ends = ("", "a.org is not in media_urls", "HTTP Error 404: File not found")
    assert all(skip.endswith(end) for skip, end in zip(reasons, ends, strict=True))


def test_no_url_is_read_without_the_setting(tmp_path: Path, address: str) -> None:
    captions(tmp_path / "a.parquet", [f"{address}/{number}.png" for number in range(COUNT)])
    with pytest.raises(PretrainError, match=r"sources\[0\]\.media_urls: .* to \[127.0.0.1\]") as e:
        open_data(settings(tmp_path / "a.parquet"), 14, 0)
    assert "\n" not in str(e.value) and not Handler.sent


def test_a_changed_setting_reads_the_records_again(tmp_path: Path, address: str) -> None:
    urls = [
        f"{address}/0.png",
        *(f"{address}/{n}.png".replace("127.0.0.1", "localhost") for n in range(1, COUNT)),
    ]
    captions(tmp_path / "a.parquet", urls)
    for hosts, count in (["127.0.0.1"], 1), (["127.0.0.1", "localhost"], COUNT):
        data = open_data(settings(tmp_path / "a.parquet", media_urls=tuple(hosts)), 14, 0)
        assert f"{count} documents" in data.describe()


def test_the_setting_is_checked() -> None:
    with pytest.raises(ValueError, match="media_urls must be names of hosts"):
        SourceConfig("images", "a", media_urls=("https://a.org",))
    config = DataConfig(sources=(SourceConfig("text", "a", media_urls=("a.org",)),))
    with pytest.raises(PretrainError, match="media_urls applies to sources of type vision"):
        source_types(config)


def test_nothing_is_left_out_silently(tmp_path: Path, address: str) -> None:
    captions(tmp_path / "a.parquet", ["s3://a/0.png"] * COUNT)
    (source,) = find_sources(settings(tmp_path / "a.parquet"), seed=0)
    found = list(source.records())
    assert all(isinstance(one, Skip) and "only URLs of http" in one.reason for one in found)
