"""An HTML page of packed sequences: images, tokens, labels, weights and documents."""

import html
import itertools
from collections.abc import Iterator, Sequence

import torch

from pretrain.data.interface import Data, Split
from pretrain.data.media.patches import unpatchify
from pretrain.data.media.pixels import Pixels
from pretrain.data.media.png import png_base64
from pretrain.data.packing import Category, PackedSample
from pretrain.model.geometry import num_tokens

_STYLE = """
body { font: 14px/1.9 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; }
h2 { margin: 2em 0 .3em; font-size: 1.1em; }
.document { border-left: 4px solid #8ab; margin: .5em 0; padding: .2em .8em; background: #f7f9fa; }
.t { font-family: ui-monospace, monospace; border-radius: 3px; padding: 1px 1px; white-space: pre; }
.t:nth-child(even) { filter: brightness(.93); }
.text { background: #dceaf7; } .caption { background: #fbe3c4; } .nothing { background: #e6e6e6; }
.frames img { border: 1px solid #999; margin: 0 4px; vertical-align: middle; max-width: 100%; }
.note { color: #666; }
"""


def page(data: Data, split: Split, count: int, title: str, skipped_file: str) -> str:
    """A self-contained HTML page of the first ``count`` sequences of a split.

    Args:
        skipped_file: name of the file that lists the skipped samples.
    """
    body = []
    for index in range(count):
        sample = data.sample(split, index)
        placeholders = int((sample.tokens == data.tokenizer.media_pad).sum())
        body.append(
            f"<h2>{split} sequence {index}</h2><p class=note>{len(sample.tokens)} tokens, "
            f"{placeholders} of them images; {int((sample.weights > 0).sum())} labels</p>"
        )
        body += _documents(data, sample)
    legend = " ".join(
        f'<span class="t {name}">{meaning}</span>'
        for name, meaning in (
            ("text", " the next token is learned as text "),
            ("caption", " as a caption "),
            ("nothing", " not learned "),
        )
    )
    sources = "<br>".join(html.escape(line) for line in data.describe(skipped_file).splitlines())
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{sources}</p>"
        f"<p>Tokens attend within their document. {legend} "
        "Point at a token for its id, its label, the label's weight and its position.</p>"
        + "\n".join(body)
    )


def images(sample: PackedSample, patch_size: int) -> list[Pixels]:
    """uint8 [frames, height, width, 3] of each image in a sequence, as the encoder receives it."""
    patches = torch.split(sample.patches, sample.grids.prod(dim=1).tolist())
    return [
        unpatchify(patch.numpy(), grid, patch_size)
        for patch, grid in zip(patches, sample.grids.tolist(), strict=True)
    ]


def _documents(data: Data, sample: PackedSample) -> Iterator[str]:
    pictures = zip(sample.grids.tolist(), images(sample, data.patch_size), strict=True)
    numbers = sample.documents.tolist()
    for _, positions in itertools.groupby(range(len(numbers)), numbers.__getitem__):
        yield f"<div class=document>{_spans(data, sample, list(positions), pictures)}</div>"


def _spans(
    data: Data,
    sample: PackedSample,
    positions: Sequence[int],
    pictures: Iterator[tuple[list[int], Pixels]],
) -> str:
    spans, tokens, labels = [], sample.tokens.tolist(), sample.labels.tolist()
    weights, categories = sample.weights.tolist(), sample.categories.tolist()
    position, end = positions[0], positions[-1] + 1
    while position < end:
        if tokens[position] == data.tokenizer.media_pad:
            grid, pixels = next(pictures)
            count = num_tokens(grid)
            frames = "".join(
                f"<img src=data:image/png;base64,{png_base64(frame)}>" for frame in pixels
            )
            spans.append(f"<span class=frames>{frames}</span>")
            patches = " by ".join(map(str, grid))
            spans.append(f"<span class=note>{count} tokens, {patches} patches</span>")
            position += count
            continue
        text = data.tokenizer.decode([tokens[position]], skip_special_tokens=False)
        label, style = "no label", "nothing"
        if weights[position]:
            label = f"label {labels[position]}, weight {weights[position]:g}"
            style = Category(categories[position]).name.lower()
        shown_text = html.escape(text).replace("\n", "⏎<br>") or "·"
        spans.append(
            f'<span class="t {style}" title="{tokens[position]}, {label}, '
            f'position {position}">{shown_text}</span>'
        )
        position += 1
    return "".join(spans)
