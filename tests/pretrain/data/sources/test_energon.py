"""Shards made from a folder go through energon, resume exactly, and what is wrong is told."""

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
from pretrain.data.mixture.data import MixtureData
from pretrain.data.skipped import Skip
from pretrain.data.sources import Media, energon, source_types
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


def test_every_rank_goes_on_exactly_from_its_state(folder: Path) -> None:
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


def test_ranks_read_different_pictures_and_together_all_of_them(folder: Path) -> None:
    found = []
    for rank in range(2):
        data = opened(folder, rank, 2)
        found.append(set(captions(data, steps(data, rank, 2, range(60)))))
    held_out = {item.caption for item in data.captioned_items("held_out", 60)}
    everything = {make.picture(number)[1] for number in range(60)}

    def numbers(texts: set[str]) -> set[int]:
        return {int(text.rpartition(" ")[2]) for text in texts}

    assert not numbers(found[0]) & numbers(found[1])
    assert numbers(found[0]) | numbers(found[1]) == numbers(everything - held_out)
    assert len(held_out) >= 2


def test_shares_are_kept_and_sequences_labelled_right(folder: Path) -> None:
    data = opened(folder)
    samples = [data.sample("train", index) for index in range(40)]
    for sample in samples:
        check_with(data.tokenizer, sample)
    images = sum(int((sample.tokens == data.tokenizer.media_pad).sum()) for sample in samples)
    assert images / 40 / 128 == pytest.approx(0.1, rel=0.1)
    right, swapped = data.caption_documents("held_out", 8)
    assert len(right) == len(swapped) == 8


def test_another_number_of_ranks_is_refused(folder: Path) -> None:
    data = opened(folder)
    steps(data, 0, 1, range(1))
    with pytest.raises(PretrainError, match="made with 1 data-parallel ranks, among which energon"):
        opened(folder, 0, 2).load_state_dict([data.state_dict(1)])


def test_a_damaged_picture_in_a_shard_is_skipped_and_a_missing_shard_is_told(
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
    found = dict(skip[:2] for skip in data.take_skipped())
    ((name, reason),) = found.items()
    assert name.startswith(f"{path}:train0000000") and reason
    for path in (folder / "damaged").glob("train-*.tar"):
        path.unlink()
    with pytest.raises(PretrainError, match=r"sources\[1\]: energon cannot read \S*/damaged: .*"):
        data = opened(folder, shards="damaged")
        steps(data, 0, 1, range(40))


def shards_of(folder: Path, name: str, captions: Sequence[object]) -> None:
    """Pictures with these captions, in JSON, as energon's field map allows."""
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


def test_shards_of_which_nothing_fits_are_told_and_not_read_for_ever(folder: Path) -> None:
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


def test_tokenizers_are_trained_on_captions_and_images_left_undecoded(folder: Path) -> None:
    captions = [make.picture(number)[1] for number in range(60)]
    found = texts(folder / "shards")
    assert len(found) > 40 and {text.strip() for text in found} < set(captions)
    shards_of(folder, "in_json", captions[:6])
    path = folder / "in_json" / "train-000000.tar"
    path.write_bytes(path.read_bytes().replace(b"IDAT", b"LOST"))  # no picture can be decoded
    found = texts(folder / "in_json")
    assert len(found) == 6 and set(found) <= set(captions[:6])


def test_a_caption_that_is_no_text_is_skipped(folder: Path) -> None:
    captions: list[object] = [make.picture(number)[1] for number in range(12)]
    captions[3] = 7
    shards_of(folder, "numbers", captions)
    data = opened(folder, shards="numbers")
    steps(data, 0, 1, range(20))
    (skip,) = {skip[:2] for skip in data.take_skipped()}
    assert skip[0].endswith("/003") and skip[1] == "its caption is a int"


def test_what_is_no_folder_of_shards_is_told(folder: Path) -> None:
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
def test_make_shards_says_what_is_wrong(
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


def test_make_shards_counts_what_it_leaves_out(folder: Path) -> None:
    counts, skips = make_shards(folder / "pictures", folder / "again", per_shard=10, held_out=0.2)
    assert sum(counts.values()) == 60 and counts["val"] > 0
    assert [Path(skip.name).name for skip in skips] == ["lonely.png"]
    assert list(itertools.islice(sorted((folder / "again").glob("train-*.tar")), 1))


def samples_of(shards: Path) -> dict[str, pixels.Pixels]:
    """Captions and their pictures. They come shuffled: one pass may not have all of them."""
    source, skips = source_of(shards), list[Skip]()
    loader, meta = source.loader("train", RankShare(), skips), source.meta
    found = {}
    for sample in itertools.islice(loader, 20 * meta.train):
        if len(found) == meta.train:
            break
        picture, caption = energon._parts(sample)
        assert isinstance(caption, str) and not isinstance(picture, str)
        found[caption] = picture[0]
    assert not skips
    return found


def test_shards_show_what_their_folder_shows_whatever_the_mode_and_orientation(
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
    found = samples_of(tmp_path / "shards")
    assert found.keys() == paths.keys()
    for caption, path in paths.items():
        (frame,) = frames.read(Media((str(path),), moving=False), 1)
        assert np.array_equal(found[caption], frame) and found[caption].dtype == np.uint8


def test_shards_of_other_programs_are_shown_upright(folder: Path) -> None:
    image, expected = test_pixels.MODES["I;16"](np.random.default_rng(0))
    writer = _Writer(folder / "foreign", "train", 10)
    (folder / "foreign").mkdir()
    writer.add("a", {"PNG": test_pixels.file(image, "PNG", 6), "txt": b"turned"})
    writer.add("b", {"jpg": test_pixels.file(image, "PNG", 3), "txt": b"misnamed"})
    writer.close()
    _index(folder / "foreign", ["train"], ["PNG", "jpg"])
    found = samples_of(folder / "foreign")
    for caption, turned in (("turned", 6), ("misnamed", 3)):
        upright = test_pixels.VIEWED[turned](expected)
        assert np.abs(found[caption] - upright).max() <= 1


def sparse_tar(path: Path, name: str, size: int) -> None:
    """A tar with a file of many zeros in little space, and a text of its name."""
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


def test_a_file_in_a_shard_that_expands_without_end_is_skipped_unread(folder: Path) -> None:
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


def test_members_of_a_shard_with_hostile_names_touch_nothing(folder: Path, tmp_path: Path) -> None:
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
    found = {sample.caption for sample in itertools.islice(loader, 40)}
    assert found <= {f"caption {number}" for number in range(4)} and "caption 2" in found
    assert len({skip.name for skip in skips}) >= 5
    assert {path for path in tmp_path.rglob("*") if ".nv-meta" not in path.parts} == before


def test_damaged_parts_of_a_sample_are_skipped_with_the_reason(folder: Path) -> None:
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
    found = {skip.name.rpartition(":")[2]: skip.reason for skip in data.take_skipped()}
    reasons = {"deep": "its json: maximum recursion", "latin": "its json:", "cut": "its png: "}
    reasons |= {"empty": "its png: cannot identify image file"}
    assert found.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in found[name]


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
def test_descriptions_of_shards_that_make_no_sense_are_refused_in_a_line(
    folder: Path, file: str, content: str, message: str
) -> None:
    shutil.copytree(folder / "shards", folder / "described", dirs_exist_ok=True)
    (folder / "described" / ".nv-meta" / file).write_text(content)
    with pytest.raises(PretrainError, match=message) as raised:
        opened(folder, shards="described")
    assert "\n" not in str(raised.value)


def test_samples_of_another_type_are_refused_when_the_source_is_opened(folder: Path) -> None:
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


def test_code_of_shards_runs_when_it_is_trusted(folder: Path) -> None:
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


def test_trust_code_is_of_energon_alone() -> None:
    config = DataConfig(sources=(SourceConfig("images", "pictures", trust_code=True),))
    with pytest.raises(PretrainError, match="trust_code applies to sources of type energon, not i"):
        source_types(config)
