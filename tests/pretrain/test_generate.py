"""Tokens come one by one as the whole model would have them, and mistakes are told in a line."""

import contextlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pretrain import batches, generate, parallel
from pretrain.data import Document
from pretrain.data.media import frames
from pretrain.data.media.frames import Media
from pretrain.data.packing import pack
from pretrain.errors import PretrainError
from pretrain.model import multimodal
from tests.distributed import training
from tests.distributed.launch import launch
from tests.pretrain.data.media.test_video import film
from tests.pretrain.saved_run import Made

PROMPT = "in the image: "


class Found(NamedTuple):
    """What :func:`look` found.

    Attributes:
        logits: [tokens, vocabulary] of the same text, all at once and step by step: of the model,
            and of it with scaled positions.
        pieces: what was written, several times over, by options.
        film: a film, an image and the prompt as the model sees them.
        told: of the command line, status, output and errors: of an image, and of that film.
        refusals: of what is too long or out of range.
        unreadable: the same of images, by their file's name.
    """

    logits: list[tuple[Tensor, Tensor]]
    pieces: list[list[str]]
    greedy: str
    film: Document
    told: list[tuple[int, str, str]]
    refusals: list[str]
    unreadable: dict[str, str]


def _refusal(model: generate.Model, *args: Any, **kwargs: Any) -> str:
    try:
        list(generate.sample(model, *args, **kwargs))
    except PretrainError as error:
        return str(error)
    return ""


def picture(path: Path) -> Media:
    return Media((str(path),), moving=False)


def both_ways(model: generate.Model, path: Path) -> tuple[list[int], tuple[Tensor, Tensor]]:
    """The likeliest tokens after an image and the prompt, and their logits either way."""
    patch = model.config.vision.patch_size
    document = generate.compose(model, PROMPT, [picture(path)])
    start = len(document)

    with torch.inference_mode():
        conversation = generate.Conversation(model, document, 96)
        steps, chosen = [conversation.logits], []
        for _ in range(12):
            chosen.append(int(conversation.logits.argmax()))
            conversation.add(chosen[-1])
            steps.append(conversation.logits)
        document.add_tokens(chosen)
        batch = batches.collate(pack([document], len(document), patch, 0), model.device)
        features = model.tower(batch.patches, batch.grids)
        whole = multimodal.forward(
            model.language, batch, features, model.tokenizer.media_pad, logits=True
        )
    return chosen, (whole[0, start - 1 :], torch.stack(steps))


def look(folder: str, image: str) -> Found:
    """Everything that needs the model, in one process."""
    path = Path(image)
    model = generate.load(Path(folder, "scaled"))
    _, scaled = both_ways(model, path)
    parallel.stop()
    model = generate.load(Path(folder, "run"))
    chosen, plain = both_ways(model, path)

    options = [
        {"temperature": 0.0},
        {"seed": 1, "top_p": 0.9},
        {"seed": 1, "top_p": 0.9},
        {"seed": 2, "top_p": 0.9},
        {"top_p": 1e-9},
    ]
    shown = [picture(path)]
    written = [list(generate.sample(model, PROMPT, shown, max_tokens=12, **o)) for o in options]
    film = [Media((str(path.with_name("film.mp4")),), moving=True), picture(path)]
    after_film = list(generate.sample(model, PROMPT, film, max_tokens=12, temperature=0.0))
    refusals = [
        _refusal(model, "word " * 200),
        _refusal(model, "word", max_tokens=95),
        _refusal(model, "word", temperature=-1.0),
        _refusal(model, "word", top_p=0.0),
        _refusal(model, "", [Media((str(path.with_name("long.mp4")),), moving=True)]),
    ]
    unreadable = {
        name: _refusal(model, "", [picture(path.with_name(name))])
        for name in ("missing.png", "broken.png", "half.png", "folder.png")
    }
    document = generate.compose(model, PROMPT, film)
    parallel.stop()
    told = []
    before = ["--video", str(path.with_name("film.mp4"))]
    for media in (["--image", image], [*before, "--image", image]):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            status, errors = training.command(
                *("sample", f"{folder}/run", *media, "--prompt", PROMPT),
                *("--max-tokens", "12", "--temperature", "0"),
            )
        told.append((status, output.getvalue(), errors))
        parallel.stop()
    return Found(
        [plain, scaled],
        [*written, after_film],
        model.tokenizer.decode(chosen),
        document,
        told,
        refusals,
        unreadable,
    )


@pytest.fixture(scope="module")
def found(made: Made, run_folder: Path) -> Found:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 71, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(run_folder / "image.png")
    film(run_folder / "film.mp4", [40 * number for number in range(6)], rate=2)
    film(run_folder / "long.mp4", [0] * 200, rate=2)
    (run_folder / "broken.png").write_text("no image")
    half = run_folder / "half.png"
    Image.new("RGB", (300, 300), "red").save(half)
    half.write_bytes(half.read_bytes()[:200])
    (run_folder / "folder.png").mkdir()
    (found,) = launch(look, 1, str(run_folder), str(run_folder / "image.png"))
    return found  # type: ignore[no-any-return]


def test_a_token_at_a_time_gives_the_logits_of_all_at_once(found: Found) -> None:
    for at_once, step_by_step in found.logits:
        assert at_once.std() > 0.5
        torch.testing.assert_close(step_by_step, at_once, rtol=0, atol=1e-5)
    (plain, _), (scaled, _) = found.logits
    assert (plain[0] - scaled[0]).abs().max() > 0.01


def test_likeliest_tokens_are_streamed_and_draws_repeat_with_their_seed(found: Found) -> None:
    greedy, drawn, again, other, nearly_greedy, _ = found.pieces
    assert "".join(greedy) == "".join(nearly_greedy) == found.greedy
    assert len(greedy) > 3, "what is written comes in pieces"
    assert drawn == again != other


def test_the_command_line_prints_them(found: Found) -> None:
    after_film = "".join(found.pieces[-1])
    assert found.told == [(0, found.greedy + "\n", ""), (0, after_film + "\n", "")]


def test_a_film_is_seen_as_in_training_before_what_comes_after_it(found: Found) -> None:
    # 48 x 64 pixels are padded to 56 x 84, frames grouped by four.
    assert found.film.grids == [(4, 4, 6), (2, 4, 6), (1, 4, 6)]
    groups = [patches.float().mean().item() for patches in found.film.patches[:2]]
    # The frames' greys, and black where they are padded.
    share = 48 * 64 / (56 * 84)
    assert groups == pytest.approx([share * 60, share * 180], abs=3)


def test_what_is_too_long_or_out_of_range_is_told(found: Found) -> None:
    too_long, too_many, cold, narrow, long_film = found.refusals
    assert "tokens, which leaves 0 of the 96 that this model has learned to read" in too_long
    assert "fewer --max-tokens" in too_many
    assert "are 402 tokens, which leaves 0 of the 96" in long_film and "shorter video" in long_film
    assert cold == "--temperature must be >= 0, not -1.0"
    assert narrow == "--top-p must be in (0, 1], not 0.0"


def test_the_likeliest_that_make_up_top_p_are_drawn_from() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[torch.tensor([2, 0, 3, 1])]
    generator = torch.Generator().manual_seed(0)
    for top_p, tokens in (
        (0.4, {1}),
        (0.5, {1}),
        (0.6, {1, 3}),
        (0.9, {0, 1, 3}),
        (1.0, {0, 1, 2, 3}),
    ):
        draws = [generate.pick(logits, 1.0, top_p, generator) for _ in range(400)]
        assert set(draws) == tokens
    hot = [generate.pick(logits, 100.0, 1.0, generator) for _ in range(400)]
    assert hot.count(2) > 60


def test_an_image_that_cannot_be_read_is_named(found: Found, run_folder: Path) -> None:
    assert len(found.unreadable) == 4
    for name, told in found.unreadable.items():
        assert told.startswith(f"cannot be read: {run_folder / name}")
        assert "\n" not in told
    assert found.unreadable["missing.png"].endswith("missing.png does not exist")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK"])
def test_images_of_any_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "I;16") else "a.png")
    Image.new(mode, (5, 3)).save(path)
    assert [frame.shape for frame in frames.read(picture(path), fps=1)] == [(3, 5, 3)]


def test_a_video_shown_as_an_image_is_refused_before_a_model_is_loaded() -> None:
    status, errors = training.command("sample", "nowhere", "--image", "a.mp4")
    assert status != 0 and "a.mp4 is a video: show it with --video" in errors


def test_a_run_that_has_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(PretrainError, match="has no checkpoint: train first"):
        generate.load(tmp_path)
    with pytest.raises(PretrainError, match="nowhere is not a folder"):
        generate.load(tmp_path / "nowhere")
