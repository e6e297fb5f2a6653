"""Generation token by token equals the whole model's, and errors are one line."""

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


class Generated(NamedTuple):
    """Results of :func:`generate_all`.

    Attributes:
        logits: [tokens, vocabulary] of the same text, at once and token by token: of the model, and
            of the same model with scaled positions.
        pieces: the generated pieces of text, for several options.
        greedy: the text of the most probable tokens.
        first, without_images: that of the first token, from the model and from one for which image
            placeholders are more probable.
        document: a video, an image and the prompt as the model reads them.
        commands: exit status, output and errors of the command line: with an image, and with a
            video and an image.
        errors: messages about documents that are too long, options out of range, and NaN weights.
        unreadable: messages about unreadable images by file name.
    """

    logits: list[tuple[Tensor, Tensor]]
    pieces: list[list[str]]
    greedy: str
    first: str
    without_images: list[str]
    document: Document
    commands: list[tuple[int, str, str]]
    errors: list[str]
    unreadable: dict[str, str]


def _error(model: generate.Model, *args: Any, **kwargs: Any) -> str:
    try:
        list(generate.sample(model, *args, **kwargs))
    except PretrainError as error:
        return str(error)
    return ""


def image_of(path: Path) -> Media:
    return Media((str(path),), moving=False)


def greedy_logits(model: generate.Model, path: Path) -> tuple[list[int], tuple[Tensor, Tensor]]:
    """The most probable tokens after an image and the prompt, and their logits computed at once
    and token by token."""
    patch_size = model.config.vision.patch_size
    document = generate.compose(model, PROMPT, [image_of(path)])
    start = len(document)

    with torch.inference_mode():
        forward = generate.CachedForward(model, document, 96)
        logits, tokens = [forward.logits], []
        for _ in range(12):
            tokens.append(int(forward.logits.argmax()))
            forward.add(tokens[-1])
            logits.append(forward.logits)
        document.add_tokens(tokens)
        batch = batches.collate(pack([document], len(document), patch_size, 0), model.device)
        features = model.tower(batch.patches, batch.grids)
        at_once = multimodal.forward(
            model.language, batch, features, model.tokenizer.media_pad, logits=True
        )
    return tokens, (at_once[0, start - 1 :], torch.stack(logits))


def generate_all(folder: str, image: str) -> Generated:
    """Everything that needs the model, in one process."""
    path = Path(image)
    model = generate.load(Path(folder, "scaled"))
    _, scaled = greedy_logits(model, path)
    parallel.stop()
    model = generate.load(Path(folder, "run"))
    tokens, plain = greedy_logits(model, path)

    options = [
        {"temperature": 0.0},
        {"seed": 1, "top_p": 0.9},
        {"seed": 1, "top_p": 0.9},
        {"seed": 2, "top_p": 0.9},
        {"top_p": 1e-9},
    ]
    images = [image_of(path)]
    pieces = [list(generate.sample(model, PROMPT, images, max_tokens=12, **o)) for o in options]
    media = [Media((str(path.with_name("film.mp4")),), moving=True), image_of(path)]
    pieces.append(list(generate.sample(model, PROMPT, media, max_tokens=12, temperature=0.0)))
    errors = [
        _error(model, "word " * 200),
        _error(model, "word", max_tokens=95),
        _error(model, "word", temperature=-1.0),
        _error(model, "word", top_p=0.0),
        _error(model, "", [Media((str(path.with_name("long.mp4")),), moving=True)]),
        _error(model, "word", temperature=float("nan")),
        _error(model, "word", seed=2**64),
        _error(model, "word \udcff"),
    ]
    unreadable = {
        name: _error(model, "", [image_of(path.with_name(name))])
        for name in ("missing.png", "broken.png", "half.png", "folder.png")
    }
    document = generate.compose(model, PROMPT, media)
    weight = model.language.output_layer.weight.data
    weight[model.tokenizer.media_pad] = 10 * weight[tokens[0]]
    without_images = list(generate.sample(model, PROMPT, images, max_tokens=1, temperature=0.0))
    weight[7] = torch.nan
    errors += [_error(model, PROMPT, temperature=value) for value in (0.0, 1.0)]
    parallel.stop()
    commands = []
    video = ["--video", str(path.with_name("film.mp4"))]
    for arguments in (["--image", image], [*video, "--image", image]):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            status, stderr = training.command(
                *("sample", f"{folder}/run", *arguments, "--prompt", PROMPT),
                *("--max-tokens", "12", "--temperature", "0"),
            )
        commands.append((status, output.getvalue(), stderr))
        parallel.stop()
    return Generated(
        logits=[plain, scaled],
        pieces=pieces,
        greedy=model.tokenizer.decode(tokens),
        first=model.tokenizer.decode(tokens[:1]),
        without_images=without_images,
        document=document,
        commands=commands,
        errors=errors,
        unreadable=unreadable,
    )


@pytest.fixture(scope="module")
def generated(made: Made, run_folder: Path) -> Generated:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 71, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(run_folder / "image.png")
    film(run_folder / "film.mp4", [40 * number for number in range(6)], rate=2)
    film(run_folder / "long.mp4", [0] * 200, rate=2)
    (run_folder / "broken.png").write_text("no image")
    half = run_folder / "half.png"
    Image.new("RGB", (300, 300), "red").save(half)
    half.write_bytes(half.read_bytes()[:200])
    (run_folder / "folder.png").mkdir()
    (generated,) = launch(generate_all, 1, str(run_folder), str(run_folder / "image.png"))
    return generated  # type: ignore[no-any-return]


def test_cached_forward_equals_the_whole_forward(generated: Generated) -> None:
    for at_once, step_by_step in generated.logits:
        assert at_once.std() > 0.5
        torch.testing.assert_close(step_by_step, at_once, rtol=0, atol=1e-5)
    (plain, _), (scaled, _) = generated.logits
    assert (plain[0] - scaled[0]).abs().max() > 0.01


def test_text_is_streamed_and_samples_repeat_with_their_seed(generated: Generated) -> None:
    greedy, sampled, again, other_seed, tiny_top_p, _ = generated.pieces
    assert "".join(greedy) == "".join(tiny_top_p) == generated.greedy
    assert len(greedy) > 3, "text is yielded in pieces"
    assert sampled == again != other_seed


def test_image_placeholders_are_not_generated(generated: Generated) -> None:
    assert generated.first == "".join(generated.without_images) != ""


def test_command_line_prints_the_text(generated: Generated) -> None:
    after_video = "".join(generated.pieces[-1])
    assert generated.commands == [(0, generated.greedy + "\n", ""), (0, after_video + "\n", "")]


def test_videos_are_composed_as_in_training(generated: Generated) -> None:
    # 48 x 64 pixels are padded to 56 x 84; four frames form a group.
    assert generated.document.grids == [(4, 4, 6), (2, 4, 6), (1, 4, 6)]
    groups = [patches.float().mean().item() for patches in generated.document.patches[:2]]
    # Means of grey frames with black padding.
    share = 48 * 64 / (56 * 84)
    assert groups == pytest.approx([share * 60, share * 180], abs=3)


def test_long_documents_and_options_out_of_range_are_refused(generated: Generated) -> None:
    too_long, too_many, temperature, top_p, long_video, *others = generated.errors
    no_number, seed, not_utf_8, *not_finite = others
    assert all("the model's logits are not finite" in error for error in not_finite)
    assert len(not_finite) == 2
    assert "tokens, which leaves 0 of the 96 of this model's sequences" in too_long
    assert "fewer --max-tokens" in too_many
    assert (
        "have 402 tokens, which leaves 0 of the 96" in long_video and "shorter video" in long_video
    )
    assert temperature == "--temperature must be >= 0, not -1.0"
    assert top_p == "--top-p must be in (0, 1], not 0.0"
    assert no_number == "--temperature must be >= 0, not nan"
    assert seed == f"--seed must be in [0, 2^64), not {2**64}"
    assert not_utf_8 == "the prompt is not UTF-8: give it in that encoding"


def test_top_p_samples_from_the_most_probable_tokens() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[torch.tensor([2, 0, 3, 1])]
    generator = torch.Generator().manual_seed(0)
    for top_p, tokens in (
        (0.4, {1}),
        (0.5, {1}),
        (0.6, {1, 3}),
        (0.9, {0, 1, 3}),
        (1.0, {0, 1, 2, 3}),
    ):
        draws = [generate.sample_token(logits, 1.0, top_p, generator) for _ in range(400)]
        assert set(draws) == tokens
    hot = [generate.sample_token(logits, 100.0, 1.0, generator) for _ in range(400)]
    assert hot.count(2) > 60
    assert {generate.sample_token(logits, 1e-320, 1.0, generator) for _ in range(9)} == {1}


def test_unreadable_images_are_named(generated: Generated, run_folder: Path) -> None:
    assert len(generated.unreadable) == 4
    for name, message in generated.unreadable.items():
        assert message.startswith(f"cannot be read: {run_folder / name}")
        assert "\n" not in message
    assert generated.unreadable["missing.png"].endswith("missing.png does not exist")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK"])
def test_images_of_any_mode_are_converted_to_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "I;16") else "a.png")
    Image.new(mode, (5, 3)).save(path)
    assert [frame.shape for frame in frames.read(image_of(path), fps=1)] == [(3, 5, 3)]


def test_videos_given_as_images_are_refused_before_loading_the_model() -> None:
    status, errors = training.command("sample", "nowhere", "--image", "a.mp4")
    assert status != 0 and "a.mp4 is a video: show it with --video" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--no-thinking",), "--thinking, --no-thinking and --tools need --chat"),
        (("--tools", "{folder}/list.json"), "--thinking, --no-thinking and --tools need --chat"),
        (("--chat", "--tools", "{folder}/broken.json"), "broken.json is not JSON"),
        (("--chat", "--tools", "{folder}/object.json"), "must contain a list of tools, not {}"),
        (("--chat", "--tools", "{folder}/names.json"), "must contain a list of tools, not ['f']"),
        (("--chat", "--tools", "{folder}/missing.json"), "No such file"),
    ],
)
def test_unusable_options_of_chats_are_refused_before_loading_the_model(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    contents = {"list": "[]", "broken": "[", "object": "{}", "names": '["f"]'}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(content)
    given = (argument.replace("{folder}", str(tmp_path)) for argument in arguments)
    status, errors = training.command("sample", "nowhere", *given)
    assert status == 1 and message in errors and errors.count("\n") <= 1


def test_runs_without_a_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(PretrainError, match="has no checkpoint: train first"):
        generate.load(tmp_path)
    with pytest.raises(PretrainError, match="nowhere is not a folder"):
        generate.load(tmp_path / "nowhere")
