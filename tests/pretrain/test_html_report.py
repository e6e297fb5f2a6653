"""The HTML report shows the whole run, is self-contained, and tolerates incomplete files."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pretrain import cli, html_report
from pretrain.errors import PretrainError
from pretrain.metrics import METRICS, read
from pretrain.reading import Reading
from tests.distributed import training
from tests.distributed.launch import launch

TITLES = (
    "Loss, nats per token",
    "Gradient norm before clipping",
    "Learning rate",
    "Update RMS (sampled)",
    "Max logit by layer: language model",
    "Max logit by layer: vision encoder",
    "Attention heads clipped in a step",
    "Expert load, max / mean, by layer",
    "Load-balancing loss, mean over layers; 1: balanced",
    "Held-out images",
    "Encoder load, max / mean over ranks",
    "Tokens per second",
    "Model FLOP utilization",
    "Peak memory of a process, GiB",
)


class Reader(HTMLParser):
    """Collects all tags, defined ids, references and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "xlink:href", "src"):
                self.links.append(value or "")
            elif reference := re.search(r"url\(#(.+?)\)", value or ""):
                self.links.append("#" + reference[1])

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        self.text += data


def record(step: int, layers: int = 2) -> dict[str, Any]:
    by_layer = [step + layer / 10 for layer in range(layers)]
    return {
        "step": step, "loss": 1.0, "text_loss": 1.0, "caption_loss": None, "grad_norm": 1.0,
        "lr": 1e-3, "language_max_logits": by_layer, "vision_max_logits": [None] * layers,
        "expert_loads": by_layer, "tokens": 10, "tokens_per_second": 5.0, "mfu": 0.5,
    }  # fmt: skip


def test_report_covers_a_run_resumed_with_other_settings(tmp_path: Path, prepared: Path) -> None:
    training.tiny_file(tmp_path, prepared)
    settings = (
        "optimizer.warmup_steps=2",
        "optimizer.decay_steps=0",
        "language.load_balancing_loss=0.01",
    )
    for steps in (3, 5):
        launch(training.train_and_read, 1, str(tmp_path), f"steps={steps}", *settings)
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    reader = Reader((tmp_path / "run" / "report.html").read_text())
    assert reader.tags.count("svg") == len(TITLES)
    for title in TITLES:
        assert title in reader.text
    # Every recorded metric is described, and every described metric is recorded.
    records = read(tmp_path / "run" / "metrics.jsonl")
    recorded = {name for record in records for name in record}
    of_several_ranks = {"own_seconds", "slowest_ratio", "slowest_rank"}
    of_sources = {"source_tokens", "source_losses", "held_out_source_losses"}
    assert recorded | of_several_ranks | of_sources == {"step", *METRICS}
    # Both starts, changed settings, configuration, versions, progress and transcriptions.
    assert "at step 0" in reader.text and "after step 3" in reader.text
    assert "steps=5" in reader.text and "qk_clip_threshold: 100.0" in reader.text
    assert "torch 2." in reader.text and "5 of 5" in reader.text
    assert all(f"step {step}" in reader.text for step in (0, 3, 5))
    assert "the model reads" in reader.text and "0 of 2 images read exactly" in reader.text
    assert reader.tags.count("img") == 2
    # No external resources, no scripts, and unique ids across plots.
    assert not {"script", "link", "iframe"} & set(reader.tags)
    for link in reader.links:
        assert link.startswith("data:") or reader.ids.count(link[1:]) == 1, link


def test_pictures_are_shown_next_to_readings_and_are_nothing_but_base64() -> None:
    readings = [
        Reading("<b>", "<b>", "aGk="),
        Reading("word", "ward", '"><script>'),
        Reading("word", "word"),
    ]
    page = html_report.render("run", [], [], readings)
    reader = Reader(page)
    assert reader.links == ["data:image/png;base64,aGk="]
    assert not {"script", "b"} & set(reader.tags)
    assert "2 of 3 images read exactly (66.7%), character error rate 9.1%." in reader.text
    assert page.count("class=wrong") == 1


def test_only_the_first_of_many_readings_are_shown() -> None:
    page = html_report.render("run", [], [], [Reading("a", "b")] * 1001)
    assert page.count("class=wrong") == 1000
    assert "0 of 1001 images" in page and "The first 1,000 are shown." in page


def test_skipped_steps_and_batches_are_plotted_if_there_are_any() -> None:
    title, label = "Steps and batches left out, so far", "steps skipped after a fault"
    zero = {"skipped_steps": 0, "skipped_batches": 0}
    normal = [{"step": step, "loss": 1.0, "grad_norm": 1.0, **zero} for step in (1, 2, 3)]
    assert title not in html_report.render("run", normal, [], [])
    skipped = html_report.render(
        "run", [*normal, {**normal[-1], "step": 4, "skipped_steps": 1}], [], []
    )
    assert title in skipped and label in skipped and "skipped batches" not in skipped
    empty = html_report.render(
        "run", [*normal, {**normal[-1], "step": 4, "loss": None, "empty_steps": 1}], [], []
    )
    assert title in empty and "steps without a label" in empty
    rolled_back = [*normal, {**normal[-1], "step": 4, "skipped_batches": 3}]
    assert "skipped batches" in html_report.render("run", rolled_back, [], [])


def test_slow_ranks_are_listed_by_how_often_they_were_slowest() -> None:
    ratios = [(3, 1.5), (3, 2.5), (0, 1.2), (7, 9.0), (3, 1.7)]
    records = [
        {**record(step), "slowest_rank": rank, "slowest_host": f"<{rank}>", "slowest_ratio": ratio}
        for step, (rank, ratio) in enumerate(ratios, 1)
    ]
    starts = [{"config": {"faults": {"straggler_ratio": 1.3}}}]
    page = html_report.render("run", records, starts, [])
    table = Reader(page[page.index("Slow ranks") : page.index("Held-out")]).text.split("\n")
    assert table[2:] == ["3<3>3 of 51.702.50", "7<7>1 of 59.009.00", ""]
    assert "Slow ranks" not in html_report.render("run", [record(1), record(2)], starts, [])


def test_damaged_lines_are_ignored(tmp_path: Path) -> None:
    lines = [json.dumps(record(1)), "[1, 2]", '{"no": 1}', "\x00\x00", json.dumps(record(2))]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 7, "lo']))
    assert "<b>2</b>" in html_report.write(tmp_path).read_text()


def test_report_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No step has been recorded yet" in html_report.write(tmp_path).read_text()


def test_non_finite_steps_are_gaps() -> None:
    bad = {"loss": math.nan, "text_loss": math.nan, "grad_norm": math.inf}
    steps = [record(1), {**record(2), **bad}, record(3), {**record(4), **bad}]
    page = html_report.render("run", json.loads(json.dumps(steps)), [], [])
    assert "Gradient norm" in page and "<b>nan</b>" in page


@pytest.mark.parametrize("layers", [1, 61])
def test_report_stays_small_for_many_steps_and_layers(layers: int) -> None:
    page = html_report.render("run", [record(step, layers) for step in range(1, 3001)], [], [])
    assert len(page) < 500_000
    assert ("<image" in page) == (layers > 6)


def test_text_is_escaped() -> None:
    page = html_report.render("<i>", [], [], [Reading("<script>alert(1)</script>", "&amp;")])
    assert "<script" not in page and "&lt;script&gt;" in page and "&amp;amp;" in page


def test_folders_without_a_run_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "has no metrics.jsonl" in errors
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(PretrainError, match=r"cannot write the report .*: No such file"):
        html_report.write(tmp_path, tmp_path / "missing" / "page.html")
