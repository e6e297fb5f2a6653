"""Runs on sources of data resume exactly with any number of ranks, and survive corrupt data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain import html_report
from pretrain.data import skipped
from pretrain.data.composer import Composer
from tests.distributed import training
from tests.distributed.launch import launch
from tests.pretrain.data import make
from tests.pretrain.data.sources import test_megatron as megatron
from tests.pretrain.data.tools import test_recognize as texts
from tests.pretrain.data.vision_text import make as layouts

SHORT = (
    "evaluation.every=100",
    "optimizer.warmup_steps=2",
    "optimizer.decay_steps=0",
    "data.held_out=0.15",
)


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    make.captioned_folder(folder / "pictures", 40)
    make.jsonl(folder / "text.jsonl.gz", range(80))
    return folder


def sources(folder: Path, *more: str) -> str:
    listed = [f"{{type: text, path: {folder}/text.jsonl.gz}}", *more]
    return f"data.sources=[{', '.join(listed)}]"


def pictures(folder: Path, name: str = "pictures") -> str:
    return f"{{type: images, path: {folder}/{name}}}"


def test_jsonl_and_images_resume_exactly_with_any_number_of_ranks(folder: Path) -> None:
    own = (sources(folder, pictures(folder)), training.EXACT, *SHORT)
    run = training.train_and_read
    whole = launch(run, 1, str(folder), f"run_dir={folder}/whole", "steps=6", *own)[0]
    assert whole[6]["right_caption_loss"] is not None
    for name, ranks in (("alone", 1), ("two", 2)):
        run_dir = f"run_dir={folder}/{name}"
        launch(run, ranks, str(folder), run_dir, "steps=3", *own)
        parts = launch(run, 1, str(folder), run_dir, "steps=6", *own)[0]
        assert [record["step"] for record in parts] == list(range(7))
        for resumed, reference in zip(parts[4:], whole[4:], strict=True):
            if ranks == 1:
                assert resumed == reference
            else:
                assert resumed["loss"] == pytest.approx(reference["loss"], rel=1e-9)


def test_tokens_and_losses_of_sources_do_not_depend_on_ranks_or_stops(folder: Path) -> None:
    """The runs of the test above: at step 3, the second was resumed with another world size."""
    whole, two = (training.comparable(folder / n / "metrics.jsonl") for n in ("whole", "two"))
    for one, other in zip(whole[1:], two[1:], strict=True):
        assert one["source_tokens"] == other["source_tokens"]
        assert one["source_losses"] == pytest.approx(other["source_losses"], rel=1e-9)
        text, images = one["source_tokens"]
        assert min(text, images) > 0
        assert 0.9 * one["step"] < (text + images) / one["tokens"] <= one["step"]
    for one, other in ((whole[0], two[0]), (whole[6], two[6])):
        name = "held_out_source_losses"
        assert one[name] == pytest.approx(other[name], rel=1e-9) and None not in one[name]
    page = html_report.write(folder / "two", folder / "two.html").read_text()
    assert f"<td>data.sources[1]: {folder}/pictures</td>" in page
    assert f"<td>{whole[6]['source_tokens'][0]:,}</td>" in page
    assert "Held-out loss by source" in page


def conversations(folder: Path) -> None:
    """Conversations about images and videos in LLaVA's layout, and others with tools."""
    texts.array(texts.LLAVA)(folder / "llava.json")
    texts.films(texts.array(texts.FILMED))(folder / "filmed.json")
    texts.lines(*texts.TOOLS, *texts.OPENAI)(folder / "chat.jsonl")


EVERY_LAYOUT: dict[str, tuple[str, Callable[[Path], object]]] = {
    "obelics.parquet": ("images", layouts.obelics_parquet),
    "mmc4": ("images", layouts.mmc4_archived),
    "captioned.parquet": ("images", lambda path: layouts.dataset().to_parquet(path)),
    "several.parquet": ("images", layouts.several_captions),
    "saved": ("images", lambda path: layouts.dataset().save_to_disk(str(path))),
    "metadata": ("images", layouts.imagefolder),
    "mds": ("images", layouts.mds),
    "img2dataset": ("images", layouts.img2dataset_shards),
    "films": ("images", layouts.video_folder),
    "llava.json": ("vision_chat", lambda path: conversations(path.parent)),
    "filmed.json": ("vision_chat", lambda path: None),
    "trl.parquet": ("vision_chat", texts.trl),
    "chat.jsonl": ("chat", lambda path: None),
    "web.parquet": ("text", texts.codecs),
}


def test_a_mixture_of_every_layout_resumes_exactly_with_any_number_of_ranks(folder: Path) -> None:
    entries = []
    for name, (kind, write) in EVERY_LAYOUT.items():
        write(folder / name)
        field = ", field: captions" if name == "several.parquet" else ""
        entries.append(f"{{type: {kind}, path: {folder / name}{field}}}")
    own = (sources(folder, *entries), training.EXACT, *SHORT, "data.vision_share=0.15")
    own = (*own, "data.seq_length=512", "global_batch_size=4")
    run = training.train_and_read
    whole = launch(run, 1, str(folder), f"run_dir={folder}/mixed", "steps=6", *own)[0]
    for ranks in (1, 2):
        run_dir = f"run_dir={folder}/mixed{ranks}"
        launch(run, ranks, str(folder), run_dir, "steps=3", *own)
        parts = launch(run, ranks, str(folder), run_dir, "steps=6", *own)[0]
        for resumed, reference in zip(parts[4:], whole[4:], strict=True):
            assert resumed["source_tokens"] == reference["source_tokens"]
            if ranks == 1:
                assert resumed == reference
            else:
                assert resumed["loss"] == pytest.approx(reference["loss"], rel=1e-9)
    before, after = whole[3]["source_tokens"], whole[6]["source_tokens"]
    assert all(one < other for one, other in zip(before, after, strict=True))
    assert not any(skip.corrupt for skip in skipped.read(folder / "mixed" / skipped.FILE))


def test_shards_resume_exactly_with_the_same_number_of_ranks_only(folder: Path) -> None:
    arguments = ("data", "make-shards", str(folder / "pictures"), str(folder / "shards"))
    assert training.command(*arguments) == (0, "")
    shards = f"{{type: energon, path: {folder}/shards}}"
    own = (sources(folder, shards), *SHORT)
    run = training.train_and_read
    whole = launch(run, 2, str(folder), f"run_dir={folder}/through", "steps=6", *own)[0]
    run_dir = f"run_dir={folder}/stopped"
    launch(run, 2, str(folder), run_dir, "steps=3", *own)
    parts = launch(run, 2, str(folder), run_dir, "steps=6", *own)[0]
    assert parts[4:] == whole[4:]
    config = (str(folder / "tiny.yaml"), f"data.cache_dir={folder}/cache", run_dir, "steps=8")
    ((status, line),) = launch(training.command, 1, "train", *config, *own)
    assert status == 1
    assert (
        "made with 2 data-parallel ranks, among which energon distributed the shards, not 1" in line
    )


def test_data_that_change_the_tokenizer_are_named(folder: Path, tmp_path: Path) -> None:
    """Another number of tokens would make the checkpoint one of another model."""
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "abc " * 99}) + "\n")
    own = (f"data.sources=[{{path: {text}}}]", *SHORT, f"run_dir={tmp_path}/run")
    launch(training.train_and_read, 1, str(folder), "steps=2", *own)
    text.write_text(json.dumps({"text": "abcdefghijklmnop " * 99}) + "\n")
    config = (str(folder / "tiny.yaml"), f"data.cache_dir={tmp_path}/cache", *own)
    for command in ("train", "eval"):
        ((status, line),) = launch(training.command, 1, command, *config, "steps=4")
        assert status == 1 and "run/tokenizer.json differs from the data's tokenizer" in line
        assert "from these weights and with this tokenizer with start_from" in line


def test_training_on_text_alone_tests_no_captions(folder: Path) -> None:
    own = (sources(folder), "steps=2", "optimizer.warmup_steps=0", "optimizer.decay_steps=0")
    records = launch(
        training.train_and_read, 1, str(folder), f"run_dir={folder}/text", *own, "data.held_out=0.2"
    )[0]
    assert records[2]["held_out_text_loss"] > 0
    assert records[2]["right_caption_loss"] is None
    none = launch(
        training.train_and_read, 1, str(folder), f"run_dir={folder}/none", *own, "data.held_out=0"
    )[0]
    assert none[2]["held_out_text_loss"] is None


def test_corrupt_images_are_listed_and_beyond_the_limit_all_ranks_stop(
    folder: Path,
) -> None:
    broken = make.captioned_folder(folder / "broken", 12)
    for path in sorted(broken.glob("*.png"))[:6]:
        path.write_bytes(path.read_bytes()[:-30])  # noticed only when all of it is read
    own = (sources(folder, pictures(folder, "broken")), "steps=12", *SHORT, "data.held_out=0")
    cache, config = f"data.cache_dir={folder}/cache", str(folder / "tiny.yaml")
    run_dir = f"run_dir={folder}/survives"
    for _ in range(2):  # once more from its end: nothing is listed twice
        outcomes = launch(training.command, 2, "train", config, cache, run_dir, *own)
        assert outcomes == [(0, ""), (0, "")]
    lines = (folder / "survives" / "skipped.jsonl").read_text().splitlines()
    skips = [json.loads(line) for line in lines]
    assert sorted(Path(skip["name"]).name for skip in skips) == [f"{n:03}.png" for n in range(6)]
    assert all("truncated" in skip["reason"] for skip in skips)

    run_dir = f"run_dir={folder}/leaves"
    limit = "data.max_corrupt=3"
    outcomes = launch(training.command, 2, "train", config, cache, run_dir, *own, limit)
    (status, line), other = outcomes
    assert (status, other) == (1, (1, ""))
    assert "samples are corrupt, more than data.max_corrupt=3; the latest: " in line


def _train_and_count_decoded(folder: str, *overrides: str) -> tuple[list[dict[str, Any]], int]:
    """The metrics of every step, and the number of images that this rank has decoded."""
    read, paths = Composer.read, []

    def counting(composer: Composer, media: Any, shape: Any) -> Any:
        paths.append(media.paths)
        return read(composer, media, shape)

    Composer.read = counting  # type: ignore[method-assign]
    return training.train_and_read(folder, *overrides), len(paths)


def test_only_ranks_that_distribute_images_decode_them(folder: Path) -> None:
    """Others learn which images are damaged, and leave out the same documents."""
    broken = make.captioned_folder(folder / "decoded", 12)
    own = (sources(folder, pictures(folder, "decoded")), training.EXACT, *SHORT, "steps=4")
    own = (*own, "data.held_out=0", "data.vision_share=0.3")
    index = (f"run_dir={folder}/index", *own, "steps=1", "optimizer.warmup_steps=0")
    launch(training.train_and_read, 1, str(folder), *index)
    for path in sorted(broken.glob("*.png"))[:6]:
        path.write_bytes(path.read_bytes()[:-30])  # noticed only when all of it is read
    run = _train_and_count_decoded
    ((alone, decoded),) = launch(run, 1, str(folder), f"run_dir={folder}/one", *own)
    layout = ("parallel.tensor=2", "parallel.pipeline=2")
    split = launch(run, 4, str(folder), f"run_dir={folder}/four", *own, *layout)
    assert [count for _, count in split] == [decoded, 0, 0, 0] and decoded > 6
    for record, reference in zip(split[0][0][1:], alone[1:], strict=True):
        assert record["loss"] == pytest.approx(reference["loss"], rel=1e-9)
    listed = (folder / "four" / "skipped.jsonl").read_text()
    assert listed == (folder / "one" / "skipped.jsonl").read_text() and "truncated" in listed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources=[{type: texts, path: a}]", "data.sources[0].type must be one of 'text', "),
        ("data.sources=[{path: a, weigth: 2}]", "key 'data.sources[0].weigth': did you mean 'weig"),
        ("data.sources=[{path: a, weight: 0}]", "sources must have a weight above 0: all are 0"),
        ("data.sources=[{type: images}]", "data.sources[0].path must be given for a source of ima"),
        ("data.sources=[{path: nowhere.jsonl}]", "sources[0].path: nowhere.jsonl does not exist"),
        ("data.tokenizer=nowhere.json", "cannot read the tokenizer nowhere.json: No such file"),
    ],
)
def test_wrong_settings_are_reported_once(folder: Path, override: str, message: str) -> None:
    outcomes = launch(
        training.command,
        2,
        *("train", str(folder / "tiny.yaml"), f"data.cache_dir={folder}/cache", override),
    )
    (status, line), other = outcomes
    assert (status, other) == (1, (1, ""))
    assert message in line


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda prefix: Path(f"{prefix}.idx").unlink(), "a.bin exists, but a.idx does not: "),
        (lambda prefix: _cut(Path(f"{prefix}.bin")), "a.bin has "),
        (lambda prefix: _cut(Path(f"{prefix}.idx")), "a.idx has "),
        (lambda prefix: megatron.built(prefix, [[[10**4]]]), "token 10000"),
    ],
    ids=["missing", "cut tokens", "cut index", "another vocabulary"],
)
def test_unusable_token_files_are_reported_once(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    """One line in all, on one of the ranks; the others only end."""
    megatron.TOKENIZER.save(tmp_path / "tokenizer.json")
    damage(megatron.built(tmp_path / "a", megatron.texts(range(9))))
    overrides = (
        f"data.cache_dir={tmp_path}/cache",
        f"data.tokenizer={tmp_path}/tokenizer.json",
        f"data.sources=[{{type: megatron, path: {tmp_path}/a}}]",
    )
    (status, line), other = launch(
        training.command, 2, "train", str(folder / "tiny.yaml"), *overrides
    )
    assert (status, other) == (1, (1, ""))
    assert message in line and line.strip().count("\n") == 0
