"""Shards made from a folder go through energon, resume exactly, and what is wrong is told."""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pretrain import cli
from pretrain.config import DataConfig, SourceConfig
from pretrain.data import Dealing, prepare
from pretrain.data.energon import texts
from pretrain.data.own import OwnData
from pretrain.data.shards import _index, _Writer
from pretrain.errors import PretrainError
from tests.pretrain.data import make
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


def opened(folder: Path, rank: int = 0, ranks: int = 1, shards: str = "shards") -> OwnData:
    sources = (
        SourceConfig("text", str(folder / "text.jsonl")),
        SourceConfig("energon", str(folder / shards)),
    )
    config = DataConfig(
        seq_length=128,
        vocab_size=400,
        cache_dir=str(folder / "cache"),
        sources=sources,
    )
    data = prepare(config, 14, 5, Dealing(rank, ranks, BATCH))
    assert isinstance(data, OwnData)
    return data


def steps(data: OwnData, rank: int, ranks: int, which: range) -> list[torch.Tensor]:
    share = BATCH // ranks
    return [
        data.sample("train", step * BATCH + rank * share + place).tokens
        for step in which
        for place in range(share)
    ]


def captions(data: OwnData, tokens: list[torch.Tensor]) -> list[str]:
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
    _index(folder / name, ["train"])
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


def test_tokenizers_are_trained_on_captions_and_images_left_undecoded(folder: Path) -> None:
    captions = [make.picture(number)[1] for number in range(60)]
    found = list(texts(folder / "shards", "data.sources[1]", 0))
    assert len(found) > 40 and {text.strip() for text in found} < set(captions)
    shards_of(folder, "in_json", captions[:6])
    path = folder / "in_json" / "train-000000.tar"
    path.write_bytes(path.read_bytes().replace(b"IDAT", b"LOST"))  # no picture can be decoded
    found = list(texts(folder / "in_json", "data.sources[1]", 0))
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
    from pretrain.data.shards import make_shards

    counts, skips = make_shards(folder / "pictures", folder / "again", per_shard=10, held_out=0.2)
    assert sum(counts.values()) == 60 and counts["val"] > 0
    assert [Path(skip.name).name for skip in skips] == ["lonely.png"]
    assert list(itertools.islice(sorted((folder / "again").glob("train-*.tar")), 1))
