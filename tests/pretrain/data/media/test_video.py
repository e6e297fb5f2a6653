"""Videos are sampled at the right times, upright; damage and a missing PyAV are reported."""

import json
import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain import cli
from pretrain.config import DataConfig, SourceConfig
from pretrain.data import open_data
from pretrain.data.media import video
from pretrain.data.mixture.data import MixtureData
from pretrain.errors import PretrainError
from tests.pretrain.data.builtin.test_dataset import same
from tests.pretrain.data.test_packing import check_with

PATCH = 14
HEIGHT, WIDTH = 48, 64


def film(
    path: Path,
    pictures: Sequence[Any],
    rate: int,
    *,
    times: Sequence[int] | None = None,
    codec: str = "mpeg4",
    turned: float | None = None,
    mirrored: bool = False,
    aspect: Fraction | None = None,
    sound: int = 0,
    **options: str,
) -> Path:
    """A video file of levels of grey or pixels, each shown from a time on, in units of 1 / rate.

    Args:
        aspect: width of a pixel over its height.
        turned: degrees counterclockwise that a player is to turn it by, then mirroring it.
        sound: seconds of sound.
        options: the container's.
    """
    with av.open(path, "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 4_000_000  # greys stay what they are, nearly
        if aspect is not None:
            stream.sample_aspect_ratio = aspect
        if turned is not None:
            stream.set_display_rotation(turned, hflip=mirrored)
        noise = container.add_stream("pcm_s16le", rate=8000, layout="mono") if sound else None
        for second in range(sound):
            assert noise is not None
            heard = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
            heard.sample_rate, heard.pts = 8000, second * 8000
            container.mux(noise.encode(heard))
        for number, picture in enumerate(pictures):
            pixels = np.broadcast_to(np.array(picture, np.uint8), (HEIGHT, WIDTH, 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
            frame.pts, frame.time_base = (times or range(10**6))[number], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if noise is not None:
            container.mux(noise.encode())
    return path


def greys(count: int) -> list[int]:
    return [12 + 216 * number // max(1, count - 1) for number in range(count)]


def seen(path: Path, fps: float) -> list[npt.NDArray[np.uint8]]:
    found = list(video.frames(str(path), fps))
    assert all(frame.dtype == np.uint8 for frame in found)
    assert {frame.shape for frame in found} == {(*video.measure(str(path), fps)[1:], 3)}
    assert len(found) == video.measure(str(path), fps)[0]
    return found


def check_greys(path: Path, fps: float, expected: Sequence[int]) -> None:
    levels = [frame.mean() for frame in seen(path, fps)]
    assert levels == pytest.approx(expected, abs=4)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),  # with frames that are stored in another order
        ("a.mov", "mpeg4"),
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx"),
        ("A.AVI", "mpeg4"),
    ],
)
def test_frames_are_sampled_every_half_second(tmp_path: Path, name: str, codec: str) -> None:
    levels = greys(21)
    path = film(tmp_path / name, levels, 10, codec=codec)
    assert video.measure(str(path), 2) == (5, HEIGHT, WIDTH)
    check_greys(path, 2, levels[::5])
    check_greys(path, 0.1, levels[:1])
    check_greys(path, 20, [level for level in levels for _ in range(2)])


@given(
    rate=st.integers(1, 60),
    count=st.integers(1, 20),
    fps=st.fractions("1/10", 20, max_denominator=20).map(lambda f: round(float(f), 3)),
    name=st.sampled_from(["a.mp4", "a.avi"]),
)
@settings(deadline=None, max_examples=40)
def test_the_measured_number_of_frames_is_read_at_any_rate(
    tmp_path_factory: pytest.TempPathFactory, rate: int, count: int, fps: float, name: str
) -> None:
    levels = greys(count)
    path = film(tmp_path_factory.getbasetemp() / name, levels, rate)
    exact = Fraction(str(fps))
    taken = math.ceil(Fraction(count, rate) * exact)
    assert video.measure(str(path), fps)[0] == taken
    check_greys(path, fps, [levels[math.floor(k / exact * rate)] for k in range(taken)])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_frame_rates_follow_the_presentation_times(tmp_path: Path, name: str) -> None:
    # One frame at 0 s, three shortly after, one shown for 1.5 s, and a last one.
    times, levels = [0, 1, 2, 3, 18, 22], greys(6)
    path = film(tmp_path / name, levels, 10, times=times)
    check_greys(path, 2, [levels[n] for n in (0, 3, 3, 3, 4)])


def test_videos_with_a_late_start_are_sampled_from_their_first_frame(tmp_path: Path) -> None:
    levels = greys(20)
    path = film(tmp_path / "a.mkv", levels, 10, times=range(37, 57), sound=6)
    check_greys(path, 2, levels[::5])


@pytest.mark.parametrize("turned", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_videos_are_rotated_upright(tmp_path: Path, turned: int, mirrored: bool) -> None:
    picture = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    picture[:16, :16], picture[:16, -16:] = 230, 130
    path = film(tmp_path / "a.mp4", [picture] * 2, 10, turned=turned, mirrored=mirrored)
    (frame,) = seen(path, 2)
    upright = np.rot90(picture, turned // 90)
    upright = upright[:, ::-1] if mirrored else upright
    assert frame.shape == upright.shape
    assert np.abs(frame.astype(int) - upright).mean() < 6


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("turned", [0, 90])
@pytest.mark.parametrize(
    ("aspect", "size"), [(Fraction(4, 3), (48, 85)), (Fraction(8, 9), (54, 64))]
)
def test_non_square_pixels_are_stretched(
    tmp_path: Path, name: str, turned: int, aspect: Fraction, size: tuple[int, int]
) -> None:
    picture = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    picture[:, : WIDTH // 2] = 200
    if name == "a.mkv" and turned:
        pytest.skip("PyAV writes no display matrix there")
    path = film(tmp_path / name, [picture] * 2, 10, aspect=aspect, turned=turned)
    (frame,) = seen(path, 2)
    frame = np.rot90(frame, -turned // 90)
    assert frame.shape[:2] == size
    assert frame[:, : size[1] // 2 - 4].mean() > 190 and frame[:, size[1] // 2 + 4 :].mean() < 50


@pytest.mark.parametrize(
    "listed", ["ffconcat version 1.0\nfile secret.mp4\n", "#EXTM3U\n#EXTINF:1,\nsecret.mp4\n"]
)
def test_a_playlist_named_like_a_video_opens_no_other_file(tmp_path: Path, listed: str) -> None:
    film(tmp_path / "secret.mp4", greys(5), 10)
    path = tmp_path / "list.mp4"
    path.write_text(listed)
    for read in (video.measure, lambda *given: list(video.frames(*given))):
        with pytest.raises(ValueError, match=r"list\.mp4: ") as error:
            read(str(path), 2)
        assert "secret" not in str(error.value)


def test_too_large_frames_are_rejected_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path / "a.mp4", greys(5), 10)
    wide = film(tmp_path / "wide.mp4", greys(5), 10, aspect=Fraction(4, 1))
    monkeypatch.setattr(video, "MAX_PIXELS", HEIGHT * WIDTH)
    assert video.measure(str(path), 2) == (1, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="frames of 256 x 48 pixels, more than the 3,072"):
        video.measure(str(wide), 2)
    monkeypatch.setattr(video, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    monkeypatch.setattr(video, "_decoded", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"a\.mp4: frames of 64 x 48 pixels"):
        video.measure(str(path), 2)


def test_videos_with_too_many_frames_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path / "a.mp4", greys(20), 10)
    monkeypatch.setattr(video, "MAX_FILM_FRAMES", 10)
    with pytest.raises(ValueError, match="40 frames by its header, more than 10"):
        video.measure(str(path), 20)
    with pytest.raises(ValueError, match="has more than 10 frames"):
        list(video.frames(str(path), 1))


@given(st.binary(min_size=1, max_size=12), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_damaged_videos_raise_only_a_value_error_of_one_line(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, place: float, share: float
) -> None:
    folder = tmp_path_factory.getbasetemp()
    whole = folder / "whole.mp4"
    content = bytearray((whole if whole.exists() else film(whole, greys(6), 10)).read_bytes())
    start = int(place * (len(content) - 1))
    content[start : start + len(noise)] = noise
    path = folder / "noise.mp4"
    path.write_bytes(content[: max(1, int((1 - share**4) * len(content)))])
    try:
        count, _, _ = video.measure(str(path), 2)
        assert len(list(video.frames(str(path), 2))) == count
    except ValueError as error:
        assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize("options", [{}, {"live": "1"}])
def test_sound_and_missing_durations_do_not_change_the_count(
    tmp_path: Path, options: dict[str, str]
) -> None:
    levels = greys(23)
    path = film(tmp_path / "a.mkv", levels, 10, sound=5, **options)
    with av.open(path) as container:
        assert ("DURATION" in container.streams.video[0].metadata) == (not options)
    check_greys(path, 2, levels[::5])


def test_truncated_and_damaged_videos_are_named(tmp_path: Path) -> None:
    # Of noise, so that frames are of a size in the file.
    noise = np.random.default_rng(0).integers(0, 255, (40, HEIGHT, WIDTH, 3), np.uint8)
    whole = {
        "end.mp4": film(tmp_path / "1.mp4", list(noise), 10),  # its header is at the end
        "begin.mp4": film(tmp_path / "2.mp4", list(noise), 10, movflags="faststart"),
        "cut.mkv": film(tmp_path / "3.mkv", list(noise), 10),
    }
    for name, path in whole.items():
        content = path.read_bytes()
        for share in (0.3, 0.6):
            cut = tmp_path / name
            cut.write_bytes(content[: int(len(content) * share)])
            with pytest.raises(ValueError, match=name) as error:
                list(video.frames(str(cut), 2))
            assert "\n" not in str(error.value) and "Errno" not in str(error.value)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.webm").write_text("no video" * 99)
    film(tmp_path / "silent.mkv", [], 10, sound=1)
    for name in ("empty.mp4", "text.webm", "silent.mkv", "none.mp4"):
        for read in (video.measure, lambda *given: list(video.frames(*given))):
            with pytest.raises(ValueError, match=name):
                read(str(tmp_path / name), 2)


def test_the_last_frame_is_repeated_if_the_video_ends_early(tmp_path: Path) -> None:
    levels = greys(22)
    path = film(tmp_path / "a.mkv", levels, 10)
    content = path.read_bytes()
    with av.open(path) as container:
        last = [p.pos for p in container.demux(video=0) if p.pts is not None and p.pts >= 1900]
    # A Matroska file ends after any block; here before the frame of 1.9 seconds.
    path.write_bytes(content[: last[0]])
    check_greys(path, 2, [*levels[:16:5], levels[18]])


def sources(folder: Path, *lines: dict[str, Any]) -> SourceConfig:
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SourceConfig("images", str(path))


def opened(folder: Path, source: SourceConfig, **options: Any) -> MixtureData:
    options = {"seq_length": 128, "vocab_size": 300, "held_out": 0, "max_image_tokens": 8} | options
    config = DataConfig(sources=(source,), cache_dir=str(folder / "cache"), **options)
    data = open_data(config, PATCH, 3)
    assert isinstance(data, MixtureData)
    return data


def both(folder: Path) -> SourceConfig:
    """A pair of 2.5 seconds, turned, and a document of text, an image and a video of a second."""
    film(folder / "pair.mp4", greys(25), 10, turned=90)
    film(folder / "part.webm", greys(10), 10, codec="libvpx")
    Image.new("RGB", (28, 28), "red").save(folder / "a.png")
    return sources(
        folder,
        {"video": "pair.mp4", "caption": "grey grows bright"},
        {"parts": ["before ", {"image": "a.png"}, " between ", {"video": "part.webm"}]},
    )


def grids(data: MixtureData) -> set[tuple[int, ...]]:
    return {tuple(g) for n in range(2) for g in data.sample("train", n).grids.tolist()}


def test_documents_contain_videos_text_and_images(tmp_path: Path) -> None:
    source = both(tmp_path)
    data = opened(tmp_path, source)
    for number in range(4):
        check_with(data.tokenizer, data.sample("train", number))
    # Five frames of 64 x 48, upright: a group of four, and one. Two frames of 48 x 64.
    assert grids(data) == {(4, 6, 4), (1, 6, 4), (1, 2, 2), (2, 4, 6)}
    state = json.loads(json.dumps(data.state_dict(2)))
    resumed = opened(tmp_path, source)
    resumed.load_state_dict([state])
    assert same(resumed.sample("train", 2), data.sample("train", 2))


def test_another_frame_rate_makes_another_index(tmp_path: Path) -> None:
    source = both(tmp_path)
    for fps, groups in ((2.0, {4, 1, 2}), (1.0, {3, 1}), (2.0, {4, 1, 2})):
        assert {grid[0] for grid in grids(opened(tmp_path, source, video_fps=fps))} == groups
    assert len(list((tmp_path / "cache").glob("vision-*"))) == 2
    state = opened(tmp_path, source).state_dict(2)
    with pytest.raises(PretrainError, match=r"data\.video_fps has changed"):
        opened(tmp_path, source, video_fps=1.0).load_state_dict([state])


def test_videos_that_do_not_fit_are_listed_and_not_decoded(tmp_path: Path) -> None:
    path = film(tmp_path / "long.mp4", greys(60), 1, movflags="faststart")
    path.write_bytes(path.read_bytes()[:-300])  # damage that reading it would meet
    with pytest.raises(ValueError, match="damaged"):
        list(video.frames(str(path), 2))
    film(tmp_path / "short.mp4", greys(10), 10)
    data = opened(
        tmp_path,
        sources(
            tmp_path,
            {"video": "long.mp4", "caption": "too long"},
            {"video": "short.mp4", "caption": "short"},
        ),
    )
    data.sample("train", 0)
    (skip,) = data.take_skipped()
    assert "tokens do not fit data.seq_length=128" in skip.reason and not skip.corrupt


def test_problems_of_lines_are_listed(tmp_path: Path) -> None:
    for name in ("a.mp4", "cut.mp4"):
        film(tmp_path / name, greys(10), 10, movflags="faststart")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:-100])
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    lines = [
        ({"video": "a.mp4"}, ""),
        ({"image": "a.mp4"}, "a.mp4 is a video: write 'video', not 'image'"),
        ({"video": ["a.png", "a.mp4"]}, "a frame of it is a video"),
        ({"video": "cut.mp4"}, "cut.mp4 is damaged or cut off"),  # only when it is read
        ({"video": "b.mp4"}, "b.mp4 does not exist"),
    ]
    source = sources(tmp_path, *({**line, "caption": "grey"} for line, _ in lines))
    data = opened(tmp_path, source)
    for number in range(4):
        check_with(data.tokenizer, data.sample("train", number))
    found = {skip.name.rpartition(":")[2]: skip.reason for skip in data.take_skipped()}
    assert found.keys() == {"2", "3", "4", "5"}
    for number, reason in found.items():
        assert reason.endswith(lines[int(number) - 1][1])


def test_a_video_without_pyav_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = both(tmp_path)
    opened(tmp_path, source)
    monkeypatch.setitem(sys.modules, "av", None)  # which makes its import fail
    message = r"\S+/pair.mp4 is a video file: these need PyAV, .*: pip install '.\[video\]'$"
    for fps in (2.0, 1.0):  # indexed before, elsewhere; and not yet
        with pytest.raises(PretrainError, match=message):
            opened(tmp_path, source, video_fps=fps)
    opened(tmp_path, sources(tmp_path, {"image": "a.png", "caption": "red"}))


def test_inspect_shows_the_frames_of_videos(tmp_path: Path) -> None:
    source = both(tmp_path)
    config, page = tmp_path / "run.yaml", tmp_path / "page.html"
    config.write_text(
        "data: {seq_length: 128, vocab_size: 300, held_out: 0, max_image_tokens: 8, video_fps: 1, "
        f"cache_dir: {tmp_path}/cache, sources: [{{type: images, path: {source.path}}}]}}\n"
    )
    options = ["seed=3", "--out", str(page), "--count", "1"]
    assert cli.main(["data", "inspect", str(config), *options]) == 0
    sample = opened(tmp_path, source, video_fps=1.0).sample("train", 0)
    assert page.read_text().count("<img src=data:image/png") == int(sample.grids[:, 0].sum()) > 3


@pytest.mark.parametrize("fps", [0.0, -1.0, math.inf, math.nan])
def test_the_frame_rate_must_be_positive(fps: float) -> None:
    with pytest.raises(ValueError, match="video_fps must be in "):
        DataConfig(video_fps=fps)
