"""Images and text in the layouts of public data sets, written by the libraries people use."""

import io
import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import webdataset
import zstandard

from pretrain import cli
from tests.pretrain.data.make import captioned_folder, picture, text
from tests.pretrain.data.media.test_video import film, greys

COUNT = 24
CAPTIONS = [picture(number)[1] for number in range(COUNT)]
MDS = Path(__file__).parent / "mds"
"""Shards that MDSWriter of mosaicml-streaming 0.13.0 wrote: 24 pictures and captions. (It requires
an older version of transformers than the trainer.)"""
MDS_LISTS = MDS.with_name("mds_lists")
"""The same, with two pictures for each caption, in columns `list[png]` and `jpeg_array`."""
PILLOW_FORMATS = {
    **{"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF"},
    **{"avif": "AVIF", "jp2": "JPEG2000", "ppm": "PPM", "tga": "TGA", "pcx": "PCX", "sgi": "SGI"},
    **{"ico": "ICO", "dds": "DDS", "dib": "DIB", "qoi": "QOI", "im": "IM"},
}
"""Formats that Pillow writes and reads, by suffix."""


def encoded(number: int, format: str = "PNG") -> bytes:
    """The file of a picture."""
    stream = io.BytesIO()
    picture(number)[0].save(stream, format)
    return stream.getvalue()


def pictures(folder: Path, count: int = COUNT, suffix: str = "png") -> list[str]:
    """Write image files, and return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:03}.{suffix}" for number in range(count)]
    for number, name in enumerate(names):
        picture(number)[0].save(folder / name)
    return names


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def dataset(count: int = COUNT) -> datasets.Dataset:
    """A dataset with a column of images."""
    images = [picture(number)[0] for number in range(count)]
    return datasets.Dataset.from_dict(
        {"image": images, "caption": CAPTIONS[:count], "label": [n % 4 for n in range(count)]},
        features=datasets.Features(
            image=datasets.Image(),
            caption=datasets.Value("string"),
            label=datasets.ClassLabel(4),
        ),
    )


def imagefolder(path: Path) -> None:
    names = pictures(path)
    jsonl(
        path / "metadata.jsonl",
        [{"file_name": n, "text": t} for n, t in zip(names, CAPTIONS, strict=True)],
    )


def captioned(path: Path) -> None:
    """An image and a text file of the same name for each document."""
    captioned_folder(path, COUNT)


def pillow_formats(path: Path) -> None:
    """An imagefolder of images in all formats."""
    path.mkdir()
    rows = []
    for number, (suffix, format) in enumerate(PILLOW_FORMATS.items()):
        picture(number)[0].save(path / f"{number}.{suffix}", format)
        rows.append({"file_name": f"{number}.{suffix}", "text": CAPTIONS[number]})
    jsonl(path / "metadata.jsonl", rows)


def several_captions(path: Path) -> None:
    features = datasets.Features(
        image=datasets.Image(), captions=datasets.List(datasets.Value("string"))
    )
    rows = {
        "image": [picture(number)[0] for number in range(COUNT)],
        "captions": [[caption, f"{caption} again"] for caption in CAPTIONS],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def compressed_shard(path: Path) -> None:
    with webdataset.TarWriter(str(path), compress=True) as writer:
        for number in range(COUNT):
            sample = {"__key__": str(number), "png": encoded(number), "txt": CAPTIONS[number]}
            writer.write(sample)


def energon_shards(path: Path) -> None:
    captioned_folder(path.parent / "captioned", COUNT)
    assert cli.main(["data", "make-shards", str(path.parent / "captioned"), str(path)]) == 0


def video_folder(path: Path) -> None:
    """An imagefolder of videos, of which every other one has pixels that are not square."""
    path.mkdir()
    rows = []
    for number in range(6):
        aspect = Fraction(4, 3) if number % 2 else None
        film(path / f"{number}.mp4", greys(5 + number), 10, aspect=aspect)
        rows.append({"file_name": f"{number}.mp4", "text": CAPTIONS[number]})
    jsonl(path / "metadata.jsonl", rows)


def imagefolder_splits(path: Path) -> None:
    """With CSV, a folder for each split."""
    for split, count in (("test", 4), ("train", COUNT)):
        names = pictures(path / split, count)
        table = pd.DataFrame({"file_name": names, "additional_feature": CAPTIONS[:count]})
        table.to_csv(path / split / "metadata.csv", index=False)


def several_images(path: Path) -> None:
    """An imagefolder with several images for each text, in Parquet."""
    names = pictures(path)
    rows = {
        "file_names": [names[number : number + 2] for number in range(COUNT - 1)],
        "caption": CAPTIONS[1:],
    }
    pd.DataFrame(rows).to_parquet(path / "metadata.parquet")


def saved_splits(path: Path) -> None:
    datasets.DatasetDict(train=dataset(), test=dataset(4)).save_to_disk(str(path))


def image_lists(path: Path) -> None:
    features = datasets.Features(
        images=datasets.List(datasets.Image()), texts=datasets.Value("string")
    )
    rows = {
        "images": [[picture(n)[0], picture(n + 1)[0]] for n in range(COUNT)],
        "texts": CAPTIONS,
    }
    columns = datasets.Dataset.from_dict(rows, features=features).rename_column("texts", "summary")
    columns.to_parquet(path)


def img2dataset_parquet(path: Path) -> None:
    """As img2dataset writes it with output_format=parquet: the bytes of files."""
    rows = {
        "key": [f"{number:09}" for number in range(COUNT)],
        "url": [f"https://a.org/{number}" for number in range(COUNT)],
        "caption": CAPTIONS,
        "status": ["success"] * COUNT,
        "jpg": [encoded(number, "JPEG") for number in range(COUNT)],
    }
    pd.DataFrame(rows).to_parquet(path)


def img2dataset_shards(path: Path) -> None:
    """As img2dataset writes it with output_format=webdataset: it uses webdataset's writer."""
    path.mkdir(parents=True)
    for shard in range(2):
        numbers = range(shard * COUNT // 2, (shard + 1) * COUNT // 2)
        with webdataset.TarWriter(str(path / f"{shard:05}.tar")) as writer:
            for number in numbers:
                writer.write(
                    {
                        "__key__": f"{shard:05}{number:04}",
                        "jpg": encoded(number, "JPEG"),
                        "txt": CAPTIONS[number],
                        "json": {"caption": CAPTIONS[number], "url": "https://a.org"},
                    }
                )
        (path / f"{shard:05}_stats.json").write_text('{"count": 12}')
        table = pd.DataFrame({"url": ["https://a.org"], "caption": ["a"], "status": ["success"]})
        table.to_parquet(path / f"{shard:05}.parquet")


def videos_in_shards(path: Path) -> None:
    path.mkdir(parents=True)
    with webdataset.TarWriter(str(path / "00000.tar")) as writer:
        for number in range(6):
            clip = film(path / "clip.mp4", greys(5 + number), 10).read_bytes()
            sample = {"__key__": f"{number}", "mp4": clip, "json": {"caption": CAPTIONS[number]}}
            writer.write(sample)
    (path / "clip.mp4").unlink()


def obelics_rows(images: list[Any]) -> dict[str, list[Any]]:
    return {
        "images": [[None, images[n], None, images[n + 1]] for n in range(COUNT - 1)],
        "texts": [[text(n)[:30], None, text(n)[30:60], None] for n in range(COUNT - 1)],
        "metadata": ["{}"] * (COUNT - 1),
    }


def obelics_parquet(path: Path) -> None:
    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        texts=datasets.List(datasets.Value("string")),
        metadata=datasets.Value("string"),
    )
    rows = obelics_rows([picture(number)[0] for number in range(COUNT)])
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def obelics_lines(path: Path) -> None:
    path.mkdir()
    rows = pd.DataFrame(obelics_rows(pictures(path / "images")))
    rows.to_json(path / "a.jsonl", orient="records", lines=True)


def mmc4_rows(names: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "url": "https://a.org",
            "text_list": [f"Sentence {number}.", "Another one.", "The last one."],
            "image_info": [
                {"image_name": names[number], "matched_text_index": 1, "matched_sim": 0.3},
                {"image_name": names[number - 1], "matched_text_index": 0, "matched_sim": 0.3},
                {"raw_url": "https://a.org/gone.png", "matched_text_index": 2},
            ],
            "similarity_matrix": [[0.1, 0.3, 0.1]],
        }
        for number in range(COUNT)
    ]


def mmc4(path: Path) -> None:
    """With images in a subfolder."""
    jsonl_folder(path)
    names = pictures(path / "images")
    jsonl(path / "docs_shard_0_v2.jsonl", mmc4_rows(names))


def mmc4_archived(path: Path) -> None:
    """With images in an archive, as webdataset writes it."""
    jsonl_folder(path)
    with webdataset.TarWriter(str(path / "images.tar")) as writer:
        for number in range(COUNT):
            writer.write({"__key__": f"{number:03}", "png": encoded(number)})
    names = [f"{number:03}.png" for number in range(COUNT)]
    jsonl(path / "docs_shard_0_v2.jsonl", mmc4_rows(names))


def jsonl_folder(path: Path) -> None:
    path.mkdir(parents=True)


def mds(path: Path) -> None:
    shutil.copytree(MDS, path)


def mds_of_lists(path: Path) -> None:
    shutil.copytree(MDS_LISTS, path)


def plain_mds(path: Path) -> None:
    """The same shards, decompressed."""

    path.mkdir()
    for shard in MDS.glob("*.mds.zstd"):
        content = zstandard.ZstdDecompressor().stream_reader(shard.read_bytes()).read()
        (path / shard.stem).write_bytes(content)
