"""Images and videos within other files are read as if they were files themselves."""

import io
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.media import frames
from pretrain.data.media.frames import Media
from pretrain.data.media.span import Span
from tests.pretrain.data import make
from tests.pretrain.data.media.test_video import film, greys


def within(path: Path, content: bytes, name: str) -> Span:
    path.write_bytes(b"before" + content + b"after")
    return Span(str(path), 6, len(content), name)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif", ".tiff"])
def test_a_range_of_a_file_is_read_like_an_image_file(tmp_path: Path, suffix: str) -> None:
    make.picture(0)[0].save(tmp_path / f"a{suffix}")
    span = within(tmp_path / "pack", (tmp_path / f"a{suffix}").read_bytes(), "a picture")
    for moving in (False, True):
        whole, part = (Media((p,), moving) for p in (str(tmp_path / f"a{suffix}"), span))
        assert frames.measure(whole, 1) == frames.measure(part, 1)
        pairs = zip(frames.read(whole, 1), frames.read(part, 1), strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_a_range_of_a_file_is_read_like_a_video_file(tmp_path: Path, name: str) -> None:
    path = film(tmp_path / name, greys(5), 10)
    span = within(tmp_path / "pack", path.read_bytes(), name)
    whole, part = (Media((p,), moving=True) for p in (str(path), span))
    assert frames.measure(whole, 4) == frames.measure(part, 4)
    pairs = zip(frames.read(whole, 4), frames.read(part, 4), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("name", ["a.png", "a.mp4"])
def test_damage_is_named_by_the_span(tmp_path: Path, name: str) -> None:
    media = Media((within(tmp_path / "pack", b"damaged", f"pack:{name}"),), name.endswith("4"))
    with pytest.raises(ValueError, match=f"^pack:{name}: "):
        frames.measure(media, 1)
    gone = Media((Span(str(tmp_path / "gone"), 0, 9, name),), name.endswith("4"))
    with pytest.raises(ValueError, match=f"^{name}: No such file"):
        frames.measure(gone, 1)


def test_a_span_ends_where_it_ends(tmp_path: Path) -> None:
    with within(tmp_path / "pack", b"0123456789", "digits").open() as file:
        assert file.read(4) == b"0123" and file.read() == b"456789" and file.read() == b""
        assert file.seek(-3, io.SEEK_END) == 7 and file.read() == b"789"
        assert file.seek(99) == 99 and file.read(1) == b""
