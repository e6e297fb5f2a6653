"""Metrics of several runs in one image; bad arguments are one line."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.axes
import pytest
from PIL import Image

from pretrain import cli, plots


def made(folder: Path, name: str, threshold: float, logits: list[float]) -> str:
    """The folder of a run with these max logits."""
    run = folder / name
    run.mkdir()
    records = [{"step": step, "max_logit": logit} for step, logit in enumerate(logits, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    start = {"config": {"optimizer": {"qk_clip_threshold": threshold}}}
    (run / "starts.jsonl").write_text(json.dumps(start) + "\n")
    return str(run)


def test_runs_are_compared_in_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only thresholds that logits come near to are drawn."""
    thresholds = []
    monkeypatch.setattr(
        matplotlib.axes.Axes, "axhline", lambda _axes, y, **_options: thresholds.append(y)
    )
    runs = [made(tmp_path, "clipped", 2.0, [1, 2, 2]), made(tmp_path, "plain", 1e6, [1, 3, 9])]
    out = tmp_path / "both.png"
    assert cli.main(["compare", *runs, "--out", str(out)]) == 0
    assert Image.open(out).format == "PNG" and thresholds == [2.0]


def test_runs_of_the_same_name_in_other_folders_are_all_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles = []

    def draw(axes: matplotlib.axes.Axes, *arguments: Any) -> None:
        titles.append(arguments[-1])
        axes.plot([1, 2])

    monkeypatch.setattr(plots, "draw_line", draw)
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    runs = [Path(made(tmp_path / folder, "run", 2.0, [1, 2])) for folder in ("one", "other")]
    plots.compare(runs, ["max_logit"], tmp_path / "both.png")
    assert titles == list(map(str, runs))


def test_names_of_runs_are_drawn_as_they_are(tmp_path: Path) -> None:
    """They are neither read as formulas nor left out of the legend."""
    names = [r"a$\frac$b", r"c\$d", "_private"]
    runs = [Path(made(tmp_path, name, 1e6, [1, 2])) for name in names]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        image = plots.compare(runs, ["max_logit"], tmp_path / "all.svg").read_text()
    texts = [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", image)]
    assert texts[-len(names) :] == names


def test_an_image_without_an_ending_is_a_png_file(tmp_path: Path) -> None:
    run = Path(made(tmp_path, "run", 2.0, [1, 2]))
    assert Image.open(plots.compare([run], ["max_logit"], tmp_path / "one")).format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--metrics", "no_metric"], "none of the runs has a metric no_metric"),
        (["{run}", "--metrics", "caption_loss"], "none of the runs has a metric caption_loss"),
        (["{run}", "--out", "{run}/plot.xyz"], "plot.xyz: Format 'xyz' is not supported"),
        (["{run}", "--out", "{run}/none/plot.png"], "none/plot.png: No such file or directory"),
        (["{run}/none"], "has no metrics.jsonl: give the run_dir of a training run"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path, "run", 2.0, [1.0])
    assert cli.main(["compare", *(argument.format(run=run) for argument in arguments)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
