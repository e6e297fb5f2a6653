"""Small files for sources of data, and their records."""

import gzip
import json
from pathlib import Path

import numpy as np
import zstandard
from PIL import Image

from pretrain.config import DataConfig, SourceConfig
from pretrain.data.skipped import Skip
from pretrain.data.sources import find_sources
from pretrain.data.sources.interface import Record

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (128,) * 3}
SHAPES = ("square", "stripe", "spot")


def picture(number: int) -> tuple[Image.Image, str]:
    """A picture and its caption, a different one for each number."""
    rng = np.random.default_rng(number)
    colour = list(COLOURS)[number % 4]
    shape = SHAPES[number // 4 % 3]
    height, width = rng.integers(20, 90, 2)
    pixels = np.full((height, width, 3), 255, np.uint8)
    if shape == "square":
        pixels[height // 4 : -height // 4, width // 4 : -width // 4] = COLOURS[colour]
    elif shape == "stripe":
        pixels[:, width // 3 : width // 2] = COLOURS[colour]
    else:
        pixels[height // 2 - 3 : height // 2 + 3, width // 2 - 3 : width // 2 + 3] = COLOURS[colour]
    return Image.fromarray(pixels), f"a {colour} {shape}, number {number}"


def captioned_folder(folder: Path, count: int) -> Path:
    """Images, each with its caption in a text file of the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, caption = picture(number)
        image.save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(caption + "\n")
    return folder


def text(number: int) -> str:
    """A document of some sentences, a different one for each number."""
    rng = np.random.default_rng([7, number])
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "rain",
        "falls",
        "on",
        "green",
        "hills",
    ]
    sentences = (" ".join(rng.choice(words, 9)) + "." for _ in range(int(rng.integers(1, 12))))
    return f"Document {number}. " + " ".join(sentences)


def jsonl(path: Path, numbers: range, field: str = "text") -> Path:
    """JSON lines, compressed as the file name says."""
    lines = "".join(json.dumps({field: text(number)}) + "\n" for number in numbers)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_packed(path, lines.encode())
    return path


def records(config: SourceConfig, max_corrupt: int = 1000) -> list[Record | Skip]:
    """Every document of a source, and what is left out."""
    (source,) = find_sources(DataConfig(sources=(config,), max_corrupt=max_corrupt), seed=0)
    return [*getattr(source, "skips", ()), *source.records()]


def write_packed(path: Path, content: bytes) -> None:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.ZstdCompressor().compress(content)
    path.write_bytes(content)
