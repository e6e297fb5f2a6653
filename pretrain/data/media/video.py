"""Read video files with PyAV at a fixed frame rate, by presentation times."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.data.media.pixels import MAX_FILM_FRAMES, MAX_PIXELS, Pixels
from pretrain.data.media.span import Place
from pretrain.errors import PretrainError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
# FFmpeg detects formats by content: a playlist named .mp4 could open other files and addresses.
_SAFE_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
    "protocol_whitelist": "file",
}
# Seconds that may be missing at the end of a video: headers round, and include the sound.
_TOLERANCE = 1
_CLOCK = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")


def is_video(path: str) -> bool:
    """Whether a file is a video, by suffix."""
    return path.lower().endswith(SUFFIXES)


def require_av(path: str) -> None:
    """
    Args:
        path: the file that requires PyAV.

    Raises:
        PretrainError: PyAV is not installed.
    """
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise PretrainError(
            f"{path} is a video file: these need PyAV, which is not installed: "
            "pip install '.[video]'"
        ) from error


def measure(path: Place, fps: float) -> tuple[int, int, int]:
    """(frames, height, width) of what :func:`frames` yields, in upright pixels.

    Reads the header, and decodes the first frame, which contains the rotation. There is a frame for
    every time k / fps before the end given in the header. If the header gives none (in streamed
    recordings), the times of all packets are read, without decoding.

    Raises:
        ValueError: the file is missing or not a video.
        PretrainError: PyAV is not installed.
    """
    with _opened(path) as (container, stream):
        first = next(_decoded(path, container, stream), None)
        if first is None:
            raise ValueError(f"{path}: no frame can be decoded")
        height, width, _ = _upright(first, path, stream).shape
    return _count(path, fps), height, width


def frames(path: Place, fps: float) -> Iterator[Pixels]:
    """Decode the frame shown at each time k / fps, starting at the first frame; upright.

    Yields as many as :func:`measure` returns, repeating the last frame if the video ends early.

    Yields:
        uint8 [height, width, 3].

    Raises:
        ValueError: the file is missing, damaged or cut off.
        PretrainError: PyAV is not installed.
    """
    count = _count(path, fps)
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        step = 1 / (_exact(fps) * _time_base(stream))
        shown, start, end, yielded = None, 0, 0, 0
        # Always decode to the end: threads decode ahead, and whether damage is found must not
        # depend on how far.
        for number, frame in enumerate(_decoded(path, container, stream)):
            time = _time(frame, number, stream)
            start = time if shown is None else start
            while shown is not None and yielded < count and yielded * step < time - start:
                yield _upright(shown, path, stream)
                yielded += 1
            shown, end = frame, max(end, time - start + (frame.duration or 0))
        if shown is None:
            raise ValueError(f"{path}: no frame can be decoded")
        if (count - 1) * step > end + _TOLERANCE / _time_base(stream):
            seconds = float(end * _time_base(stream))
            raise ValueError(f"{path} is cut off: its frames end after {seconds:.3g} seconds")
        for _ in range(count - yielded):
            yield _upright(shown, path, stream)


@contextmanager
def _opened(path: Place) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """Open a video; errors of PyAV become ValueErrors with the path."""
    if isinstance(path, str) and not Path(path).exists():
        raise ValueError(f"{path} does not exist")
    require_av(str(path))
    import av

    try:
        with ExitStack() as stack:
            source = path if isinstance(path, str) else stack.enter_context(path.open())
            container = stack.enter_context(av.open(source, "r", options=_SAFE_OPTIONS))
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream):
                raise ValueError(f"{path}: no video stream")
            codec: Any = stream.codec_context
            if codec is None:
                raise ValueError(f"{path}: its video is in a format that is not read")
            _check_pixels(path, codec.width, codec.height)
            yield container, stream
    except av.ArgumentError as error:  # a format that is not whitelisted
        raise ValueError(f"{path}: not a video in a format that is read") from error
    except (av.FFmpegError, OSError) as error:  # OSError: of the file that contains it
        raise ValueError(f"{path}: {error.strerror}") from error


def _check_pixels(path: Place, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{path}: frames of {width} x {height} pixels, more than the {MAX_PIXELS:,} that are "
            "read"
        )


def _decoded(
    path: Place, container: "InputContainer", stream: "VideoStream"
) -> Iterator["VideoFrame"]:
    decoded = 0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise ValueError(f"{path} is damaged or cut off")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise ValueError(f"{path} is damaged")
            decoded += 1
            if decoded > MAX_FILM_FRAMES:
                raise ValueError(f"{path} has more than {MAX_FILM_FRAMES:,} frames")
            _check_pixels(path, frame.width, frame.height)
            yield frame


def _time(frame: "VideoFrame", number: int, stream: "VideoStream") -> int:
    """Presentation time of a frame in time base units; derived from its number if unknown."""
    if frame.pts is not None:
        return frame.pts
    rate = stream.average_rate
    return round(number / rate / _time_base(stream)) if rate else 0


def _upright(frame: "VideoFrame", path: Place, stream: "VideoStream") -> Pixels:
    """RGB with square pixels, rotated and mirrored by the display matrix (phones write one)."""
    width, height = frame.width, frame.height
    aspect = stream.sample_aspect_ratio or 1
    if aspect > 1:
        width = round(width * aspect)
    elif 0 < aspect < 1:
        height = round(height / aspect)
    _check_pixels(path, width, height)
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height, threads=1)
    sides: Any = frame.side_data  # its types lack most kinds
    if (matrix := sides.get("DISPLAYMATRIX")) is not None:  # x' = a x + c y, y' = b x + d y
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
        if abs(b) > abs(a):
            pixels, a, d = pixels.swapaxes(0, 1), c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(pixels, np.uint8)


def _count(path: Place, fps: float) -> int:
    """Number of times k / fps before the end, at least one."""
    with _opened(path) as (container, stream):
        count = max(1, -(-_duration(container, stream) * _exact(fps) // 1))
    if count > MAX_FILM_FRAMES:
        raise ValueError(
            f"{path} has {count:,} frames by its header, more than {MAX_FILM_FRAMES:,}"
        )
    return int(count)


def _duration(container: "InputContainer", stream: "VideoStream") -> Fraction:
    """Seconds of the video stream: the container's duration may be that of the sound."""
    base = _time_base(stream)
    # Matroska stores the duration of a stream in a tag; without it, FFmpeg estimates one from the
    # bit rate.
    matroska = "matroska" in container.format.name
    if stream.duration is not None and stream.duration > 0 and not matroska:
        return stream.duration * base
    if clock := _CLOCK.fullmatch(stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(Fraction, clock.groups())
        return 3600 * hours + 60 * minutes + seconds - (stream.start_time or 0) * base
    times = [(p.pts, p.duration or 0) for p in container.demux(stream) if p.pts is not None]
    first = min((start for start, _ in times), default=0)
    return (max((start + length for start, length in times), default=0) - first) * base


def _time_base(stream: "VideoStream") -> Fraction:
    return stream.time_base or Fraction(1, 1)


def _exact(fps: float) -> Fraction:
    """The decimal number as written: 0.1 is a tenth."""
    return Fraction(str(fps))
