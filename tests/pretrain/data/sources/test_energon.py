"""Shards are read through energon, runs resume exactly, and errors name their cause."""

import gzip
import io
import itertools
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain import cli
from pretrain.config import DataConfig, SourceConfig
from pretrain.data import RankShare, open_data
from pretrain.data.media import frames, pixels
from pretrain.data.media.frames import Media
from pretrain.data.mixture.data import MixtureData
from pretrain.data.skipped import Skip
from pretrain.data.sources import energon, source_types
from pretrain.data.tools.shards import _index, _Writer, make_shards
from pretrain.errors import PretrainError
from tests.pretrain.data import make
from tests.pretrain.data.media import test_pixels
from tests.pretrain.data.test_packing import check_with

BATCH = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("energon")
    pictures = make.captioned_folder(folder / "pictures", 60)
    (pictures / "lonely.png").write_bytes((pictures / "000.png").read_bytes())
    make.jsonl(folder / "text.jsonl", range(40))
    shards = str(folder / "shards")
    arguments = ["data", "make-shards", str(pictures), shards]
    assert cli.main([*arguments, "--per-shard", "10", "--held-out", "0.2"]) == 0
    return folder


def opened(
    folder: Path,
    rank: int = 0,
    ranks: int = 1,
    shards: str = "shards",
    *,
    trust_code: bool = False,
) -> MixtureData:
    sources = (
        SourceConfig("text", str(folder / "text.jsonl")),
        SourceConfig("energon", str(folder / shards), trust_code=trust_code),
    )
    config = DataConfig(
        seq_length=128,
        vocab_size=400,
        cache_dir=str(folder / "cache"),
        sources=sources,
    )
    data = open_data(config, 14, 5, RankShare(rank, ranks, BATCH))
    assert isinstance(data, MixtureData)
    return data


def steps(data: MixtureData, rank: int, ranks: int, which: range) -> list[torch.Tensor]:
    share = BATCH // ranks
    return [
        data.sample("train", step * BATCH + rank * share + place).tokens
        for step in which
        for place in range(share)
    ]


def captions(data: MixtureData, tokens: list[torch.Tensor]) -> list[str]:
    text = data.tokenizer.decode(torch.cat(tokens).tolist())
    return [line for line in text.split("\n") if "number" in line]


def test_every_rank_resumes_exactly(folder: Path) -> None:
    for rank in range(2):
        data = opened(folder, rank, 2)
        before = steps(data, rank, 2, range(20))
        state = json.loads(json.dumps(data.state_dict(20)))
        ahead = steps(data, rank, 2, range(20, 22))  # as a thread has made them by then
        assert json.loads(json.dumps(data.state_dict(20))) == state
        after = steps(data, rank, 2, range(22, 40))
        resumed = opened(folder, rank, 2)
        resumed.load_state_dict([state, state])
        assert all(map(torch.equal, steps(resumed, rank, 2, range(20, 40)), [*ahead, *after]))
        assert not torch.equal(before[0], after[0])


def test_ranks_read_disjoint_samples_that_cover_the_training_split(folder: Path) -> None:
    captions_by_rank = []
    for rank in range(2):
        data = opened(folder, rank, 2)
        captions_by_rank.append(set(captions(data, steps(data, rank, 2, range(60)))))
    held_out = {item.caption for item in data.captioned_items("held_out", 60)}
    everything = {make.picture(number)[1] for number in range(60)}

    def numbers(texts: set[str]) -> set[int]:
        return {int(text.rpartition(" ")[2]) for text in texts}

    assert not numbers(captions_by_rank[0]) & numbers(captions_by_rank[1])
    assert numbers(captions_by_rank[0]) | numbers(captions_by_rank[1]) == numbers(
        everything - held_out
    )
    assert len(held_out) >= 2


def test_the_vision_share_is_met(folder: Path) -> None:
    data = opened(folder)
    samples = [data.sample("train", index) for index in range(40)]
    for sample in samples:
        check_with(data.tokenizer, sample)
    images = sum(int((sample.tokens == data.tokenizer.media_pad).sum()) for sample in samples)
    assert images / 40 / 128 == pytest.approx(0.1, rel=0.1)
    right, swapped = data.caption_documents("held_out", 8)
    assert len(right) == len(swapped) == 8


def test_resuming_with_another_number_of_ranks_is_refused(folder: Path) -> None:
    data = opened(folder)
    steps(data, 0, 1, range(1))
    with pytest.raises(PretrainError, match="made with 1 data-parallel ranks, among which energon"):
        opened(folder, 0, 2).load_state_dict([data.state_dict(1)])


def test_damaged_images_are_skipped_and_missing_shards_are_named(
    folder: Path,
) -> None:
    shutil.copytree(folder / "shards", folder / "damaged")
    path = folder / "damaged" / "train-000001.tar"
    content = bytearray(path.read_bytes())
    start = content.index(b"IDAT") + 8
    content[start : start + 40] = bytes(40)
    path.write_bytes(content)
    data = opened(folder, shards="damaged")
    steps(data, 0, 1, range(40))
    reasons_by_name = dict(skip[:2] for skip in data.take_skipped())
    ((name, reason),) = reasons_by_name.items()
    assert name.startswith(f"{path}:train0000000") and reason
    for path in (folder / "damaged").glob("train-*.tar"):
        path.unlink()
    with pytest.raises(PretrainError, match=r"sources\[1\]: energon cannot read \S*/damaged: .*"):
        data = opened(folder, shards="damaged")
        steps(data, 0, 1, range(40))


def shards_of(folder: Path, name: str, captions: Sequence[object]) -> None:
    """Write images with these captions in JSON."""
    writer = _Writer(folder / name, "train", 100)
    (folder / name).mkdir()
    for number, caption in enumerate(captions):
        image = (folder / "pictures" / f"{number:03}.png").read_bytes()
        described = json.dumps({"caption": caption}).encode()
        writer.add(f"{number:03}", {"png": image, "json": described})
    writer.close()
    _index(folder / name, ["train"], ["png"])
    dataset = folder / name / ".nv-meta" / "dataset.yaml"
    dataset.write_text(dataset.read_text().replace("caption: txt", "caption: json[caption]"))


def test_shards_without_a_usable_sample_are_refused_after_one_pass(folder: Path) -> None:
    shards_of(folder, "long", [f"{number} {'so long a caption ' * 30}" for number in range(6)])
    data = opened(folder, shards="long")
    with pytest.raises(
        PretrainError,
        match=r"sources\[1\]: \S*/long has nothing for rank 0 that can be used; the latest: its "
        r"\d+ tokens do not fit data.seq_length=128",
    ):
        steps(data, 0, 1, range(4))


def texts(shards: Path) -> list[str]:
    """The text that a tokenizer is trained on."""
    return [record.text for record in source_of(shards).records()]


def source_of(shards: Path) -> energon.EnergonSource:
    return energon.EnergonSource(
        0, DataConfig(sources=(SourceConfig("energon", str(shards)),)), seed=0
    )


def test_tokenizer_training_reads_captions_without_decoding_images(folder: Path) -> None:
    captions = [make.picture(number)[1] for number in range(60)]
    read = texts(folder / "shards")
    assert len(read) > 40 and {text.strip() for text in read} < set(captions)
    shards_of(folder, "in_json", captions[:6])
    path = folder / "in_json" / "train-000000.tar"
    path.write_bytes(path.read_bytes().replace(b"IDAT", b"LOST"))  # no picture can be decoded
    read = texts(folder / "in_json")
    assert len(read) == 6 and set(read) <= set(captions[:6])


def test_captions_that_are_not_text_are_skipped(folder: Path) -> None:
    captions: list[object] = [make.picture(number)[1] for number in range(12)]
    captions[3] = 7
    shards_of(folder, "numbers", captions)
    data = opened(folder, shards="numbers")
    steps(data, 0, 1, range(20))
    (skip,) = {skip[:2] for skip in data.take_skipped()}
    assert skip[0].endswith("/003") and skip[1] == "its caption is a int"


def test_missing_and_unprepared_folders_are_refused(folder: Path) -> None:
    with pytest.raises(PretrainError, match=r"sources\[1\].path: the folder \S* does not exist"):
        opened(folder, shards="nowhere")
    with pytest.raises(PretrainError, match=r"is not prepared for energon .*: run `energon prep"):
        opened(folder, shards="pictures")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "new"], "nowhere is not a folder"),
        (["pictures", "shards"], "shards exists already: choose a new folder"),
        (["pictures", "new", "--per-shard", "0"], "--per-shard must be > 0, not 0"),
        (["pictures", "new", "--held-out", "1"], "--held-out must be in [0, 1), not 1.0"),
        (["bare", "new"], "has no image with a caption; the first: "),
    ],
)
def test_make_shards_names_wrong_arguments(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = folder / "bare"
    bare.mkdir(exist_ok=True)
    shutil.copy(folder / "pictures" / "000.png", bare)
    paths = [str(folder / name) for name in arguments[:2]]
    assert cli.main(["data", "make-shards", *paths, *arguments[2:]]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    shutil.rmtree(folder / "new", ignore_errors=True)


def test_make_shards_lists_images_without_captions(folder: Path) -> None:
    counts, skips = make_shards(folder / "pictures", folder / "again", per_shard=10, held_out=0.2)
    assert sum(counts.values()) == 60 and counts["val"] > 0
    assert [Path(skip.name).name for skip in skips] == ["lonely.png"]
    assert list(itertools.islice(sorted((folder / "again").glob("train-*.tar")), 1))


def samples_of(shards: Path) -> dict[str, pixels.Pixels]:
    """Captions and their images. Samples are shuffled: one pass may not contain all of them."""
    source, skips = source_of(shards), list[Skip]()
    loader, meta = source.loader("train", RankShare(), skips), source.meta
    images = {}
    for sample in itertools.islice(loader, 20 * meta.train):
        if len(images) == meta.train:
            break
        picture, caption = energon._parts(sample)
        assert isinstance(caption, str) and not isinstance(picture, str)
        images[caption] = picture[0]
    assert not skips
    return images


def test_shards_and_their_folder_have_equal_pixels(
    tmp_path: Path,
) -> None:
    kinds = [(kind, mode, options) for kind, mode, options in test_pixels.LOSSLESS]
    kinds += [("JPEG", "RGB", {}), ("JPEG", "CMYK", {}), ("AVIF", "RGB", {})]
    suffixes = {"JPEG": "JPG", "TIFF": "tif", "PNG": "png", "WEBP": "", "AVIF": "avif"}
    paths = {}
    for number, (kind, mode, options) in enumerate(kinds * 2):
        image, _ = test_pixels.MODES[mode](np.random.default_rng(number))
        content = test_pixels.file(image, kind, number % 8 + 1, **options)
        path = tmp_path / "pictures" / f"{number:03}.{suffixes[kind]}".rstrip(".")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        paths[f"number {number}"] = path
    captions = [{"image": path.name, "caption": caption} for caption, path in paths.items()]
    listed = "\n".join(map(json.dumps, captions))
    (tmp_path / "pictures" / "captions.jsonl").write_text(listed)
    counts, skips = make_shards(tmp_path / "pictures", tmp_path / "shards", held_out=0)
    assert counts == {"train": len(paths), "val": 0} and not skips
    images = samples_of(tmp_path / "shards")
    assert images.keys() == paths.keys()
    for caption, path in paths.items():
        (frame,) = frames.read(Media((str(path),), moving=False), 1)
        assert np.array_equal(images[caption], frame) and images[caption].dtype == np.uint8


def test_images_of_other_programs_are_turned_upright(folder: Path) -> None:
    image, expected = test_pixels.MODES["I;16"](np.random.default_rng(0))
    writer = _Writer(folder / "foreign", "train", 10)
    (folder / "foreign").mkdir()
    writer.add("a", {"PNG": test_pixels.file(image, "PNG", 6), "txt": b"turned"})
    writer.add("b", {"jpg": test_pixels.file(image, "PNG", 3), "txt": b"misnamed"})
    writer.close()
    _index(folder / "foreign", ["train"], ["PNG", "jpg"])
    images = samples_of(folder / "foreign")
    for caption, turned in (("turned", 6), ("misnamed", 3)):
        upright = test_pixels.VIEWED[turned](expected)
        assert np.abs(images[caption] - upright).max() <= 1


def sparse_tar(path: Path, name: str, size: int) -> None:
    """Write a tar with a sparse file of ``size`` bytes and a caption."""
    data = b"x" * 512
    sparse = tarfile.TarInfo(name)
    sparse.size, sparse.type = len(data), tarfile.GNUTYPE_SPARSE
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[386 : 386 + 24] = b"%011o\0%011o\0" % (0, 512)
    header[386 + 24 : 386 + 48] = b"%011o\0%011o\0" % (size, 0)
    header[483:495] = size.to_bytes(12, "big") if size >= 8**11 else b"%011o\0" % size
    if size >= 8**11:
        header[483] |= 0x80
        header[386 + 24 : 386 + 36] = (size | 1 << 95).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    text = tarfile.TarInfo(name.partition(".")[0] + ".txt")
    text.size = 5
    with path.open("wb") as file:
        file.write(bytes(header) + data + text.tobuf() + b"large".ljust(512, b"\0") + bytes(1024))


def test_huge_sparse_files_in_shards_are_skipped_unread(folder: Path) -> None:
    shards = folder / "sparse"
    shards.mkdir()
    sparse_tar(shards / "train-000000.tar", "a.png", 1 << 40)
    writer = _Writer(shards, "more", 100)
    for number in range(4):
        image = (folder / "pictures" / f"{number:03}.png").read_bytes()
        writer.add(f"{number}", {"png": image, "txt": make.picture(number)[1].encode()})
    writer.close()
    (shards / "more-000000.tar").rename(shards / "train-000001.tar")
    _index(shards, ["train"], ["png"])
    data = opened(folder, shards="sparse")
    steps(data, 0, 1, range(10))
    (skip,) = {skip[:2] for skip in data.take_skipped()}
    assert skip[0].endswith("train-000000.tar:a")
    assert skip[1].endswith("its png: too large: 1,099,511,627,776 bytes")


def test_hostile_names_in_shards_touch_no_files(folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    picture = (folder / "pictures" / "000.png").read_bytes()
    with tarfile.open(shards / "train-000000.tar", "w") as tar:

        def add(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
            entry = tarfile.TarInfo(name)
            entry.size, entry.type = len(content), kind
            entry.linkname = str(tmp_path / "secret.txt") if kind != tarfile.REGTYPE else ""
            tar.addfile(entry, io.BytesIO(content))

        for number, key in enumerate(("../up", str(tmp_path / "absolute"), "good", "a/b/../c")):
            add(f"{key}.png", picture)
            add(f"{key}.txt", f"caption {number}".encode())
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            key = f"link{kind.decode()}"
            add(f"{key}.png", picture)
            add(f"{key}.txt", kind=kind)
        add("nested.png", picture)
        add("nested.txt", gzip.compress(b"x" * 99))
    _index(shards, ["train"], ["png"])
    before = {path for path in tmp_path.rglob("*") if ".nv-meta" not in path.parts}
    skips: list[Skip] = []
    loader = source_of(shards).loader("train", RankShare(), skips)
    captions_read = {sample.caption for sample in itertools.islice(loader, 40)}
    assert (
        captions_read <= {f"caption {number}" for number in range(4)}
        and "caption 2" in captions_read
    )
    assert len({skip.name for skip in skips}) >= 5
    assert {path for path in tmp_path.rglob("*") if ".nv-meta" not in path.parts} == before


def test_damaged_samples_are_skipped_with_the_reason(folder: Path) -> None:
    writer = _Writer(folder / "parts", "train", 100)
    (folder / "parts").mkdir()
    picture = (folder / "pictures" / "000.png").read_bytes()
    caption = json.dumps({"caption": "number 0"}).encode()
    for number in range(8):
        writer.add(f"{number}", {"png": picture, "json": caption})
    writer.add("deep", {"png": picture, "json": b"[" * 200_000})
    writer.add("latin", {"png": picture, "json": b"\xe9"})
    writer.add("empty", {"png": b"", "json": caption})
    writer.add("cut", {"png": picture[:-30], "json": caption})
    writer.close()
    _index(folder / "parts", ["train"], ["png"])
    dataset = folder / "parts" / ".nv-meta" / "dataset.yaml"
    dataset.write_text(dataset.read_text().replace("caption: txt", "caption: json[caption]"))
    data = opened(folder, shards="parts")
    steps(data, 0, 1, range(20))
    reasons_by_name = {skip.name.rpartition(":")[2]: skip.reason for skip in data.take_skipped()}
    reasons = {"deep": "its json: maximum recursion", "latin": "its json:", "cut": "its png: "}
    reasons |= {"empty": "its png: cannot identify image file"}
    assert reasons_by_name.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in reasons_by_name[name]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("split.yaml", "split_parts: {train: ['{0..99999999999}.tar']}", "more than 1,000,000"),
        ("split.yaml", "split_parts: {train: ['{a,b}{0..999}{0..999}.tar']}", "more than 1,000,"),
        ("split.yaml", "split_parts: {train: [{a: b}]}", "not a list of names"),
        ("split.yaml", "split_parts: {train: ['../other.tar']}", r"outside \S*: '../other.tar'"),
        ("split.yaml", "split_parts: {train: ['/x.tar']}", "names a shard outside"),
        ("split.yaml", "split_parts: {train: ['msc://a/x.tar']}", "names a shard outside"),
        ("split.yaml", "[" * 100_000, "is not prepared for energon"),
        (".info.json", "[" * 100_000, "is not prepared for energon"),
        (".info.json", '{"shard_counts": {"../../a.tar": 3}}', "names a shard outside"),
        ("dataset.yaml", "field_map: {image: png}", "has no sample_type"),
        ("dataset.yaml", "- a", "has no sample_type"),
    ],
)
def test_invalid_metadata_is_refused_in_one_line(
    folder: Path, file: str, content: str, message: str
) -> None:
    shutil.copytree(folder / "shards", folder / "described", dirs_exist_ok=True)
    (folder / "described" / ".nv-meta" / file).write_text(content)
    with pytest.raises(PretrainError, match=message) as raised:
        opened(folder, shards="described")
    assert "\n" not in str(raised.value)


def test_unsupported_sample_types_are_refused_at_opening(folder: Path) -> None:
    shutil.copytree(folder / "shards", folder / "other_type", dirs_exist_ok=True)
    dataset = folder / "other_type" / ".nv-meta" / "dataset.yaml"
    dataset.write_text(dataset.read_text().replace("CaptioningSample", "VQASample"))
    with pytest.raises(PretrainError, match=r"has samples of type VQASample: CaptioningSample and"):
        opened(folder, shards="other_type")
    dataset.write_text(
        "__module__: megatron.energon\n__class__: CaptioningWebdataset\n"
        "field_map: {image: png, caption: txt}\nsubflavors: {a: 1}\n"
    )
    assert steps(opened(folder, shards="other_type"), 0, 1, range(1))


def test_code_of_shards_runs_only_with_trust_code(folder: Path) -> None:
    shutil.copytree(folder / "shards", folder / "trusted", dirs_exist_ok=True)
    meta = folder / "trusted" / ".nv-meta"
    (meta / "sample_loader.py").write_text(
        "def sample_loader(sample):\n"
        "    return dict(sequence=['first', sample['png'], sample['txt']])\n"
        "def part_filter(part):\n    return part in ('png', 'txt')\n"
    )
    (meta / "dataset.yaml").write_text(
        "sample_type: {__module__: megatron.energon, __class__: InterleavedSample}\n"
        "sample_loader: sample_loader.py:sample_loader\n"
        "part_filter: sample_loader.py:part_filter\n"
    )
    with pytest.raises(PretrainError, match=r"'sample_loader', 'part_filter'.*trust_code: true"):
        opened(folder, shards="trusted")
    data = opened(folder, shards="trusted", trust_code=True)
    tokens = torch.cat(steps(data, 0, 1, range(4)))
    assert "first" in data.tokenizer.decode(tokens.tolist())
    assert (tokens == data.tokenizer.media_pad).any() and not data.take_skipped()


def test_trust_code_applies_only_to_energon() -> None:
    config = DataConfig(sources=(SourceConfig("images", "pictures", trust_code=True),))
    with pytest.raises(PretrainError, match="trust_code applies to sources of type energon, not i"):
        source_types(config)
