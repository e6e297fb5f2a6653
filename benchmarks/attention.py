"""Time and memory of one attention layer, forward and backward, by sequence length.

The trainer's kernels are ``blocks`` and, on a GPU, ``flex``. They return the largest logit of every
head, which QK-Clip needs, as the dense form does, which has all logits in memory. SDPA is torch's
``scaled_dot_product_attention`` with values padded to the width of the keys, document by document,
without and with ``muonclip.max_logits``.
"""

import argparse
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import runner
from muonclip import max_logits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS, WIDTH, VALUE_WIDTH = 4, 48, 32
_SCALE = WIDTH**-0.5
# Lengths that are timed, those whose memory is measured, documents of packed sequences, rounds.
_FORMS: dict[str, tuple[list[int], list[int], int, int]] = {
    "tiny": ([64, 256], [64, 256], 4, 2),
    "quick": ([512, 2048, 4096], [2048, 4096, 8192, 16384], 16, 7),
    "full": ([4096, 8192, 16384], [8192, 16384, 32768], 16, 20),
}
DENSE, SDPA = "dense", "SDPA, no max logits"
# The memory of the dense form is not measured beyond this length.
_MAX_DENSE = 4096

Step = Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=runner.positive_int, help="timed rounds")


def run(options: argparse.Namespace) -> runner.Result:
    lengths, memory_lengths, documents, rounds = _FORMS[options.form]
    times = []
    for length in lengths:
        for packed in ([length], [length // documents] * documents):
            seconds = runner.interleave(
                steps(packed, options.device),
                rounds=options.rounds or rounds,
                device=options.device,
                clock=options.clock,
            )
            times.append(
                {
                    "length": length,
                    "documents": len(packed),
                    "variants": runner.summarize(seconds, DENSE),
                }
            )
    memory = []
    for length in memory_lengths:
        names = [name for name in steps([1], options.device) if name in ("blocks", "flex", DENSE)]
        peaks = {
            name: peak_memory(name, length, options.device)
            for name in names
            if name != DENSE or length <= _MAX_DENSE
        }
        memory.append({"length": length, "peak_bytes": peaks})
    return {
        "heads": HEADS,
        "width": WIDTH,
        "value_width": VALUE_WIDTH,
        "times": times,
        "memory": memory,
    }


def steps(lengths: list[int], device: torch.device) -> dict[str, Step]:
    """Forward and backward of one sequence with documents of these lengths, by variant."""
    from pretrain.model.attention import attend, attend_dense
    from pretrain.model.packed_documents import PackedDocuments

    documents = PackedDocuments([lengths], device)
    shapes = [(sum(lengths), 1, HEADS, width) for width in (WIDTH, WIDTH, VALUE_WIDTH)]
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    query, key, value = inputs
    gradient = torch.randn(sum(lengths), 1, HEADS * VALUE_WIDTH, device=device)

    def step(function: Callable[[], Tensor]) -> Step:
        return lambda: torch.autograd.grad(function(), inputs, gradient)

    variants = {
        "blocks": step(lambda: attend(query, key, value, documents, _SCALE, "blocks")[0]),
        DENSE: step(lambda: attend_dense(query, key, value, documents, _SCALE)[0]),
        SDPA: step(lambda: _sdpa(query, key, value, lengths)),
        "SDPA, max logits": step(lambda: _sdpa(query, key, value, lengths, observe=True)),
    }
    if device.type == "cuda":
        variants["flex"] = step(lambda: attend(query, key, value, documents, _SCALE, "flex")[0])
    return variants


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], observe: bool = False
) -> Tensor:
    padded = F.pad(value, (0, WIDTH - VALUE_WIDTH))
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    outputs = []
    for start, end in pairwise(ends):
        q, k, v = (x[start:end].permute(1, 2, 0, 3) for x in (query, key, padded))
        if observe:
            max_logits(q, k, scale=_SCALE, causal=True)
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=_SCALE))
    return torch.cat(outputs, 2).permute(2, 0, 1, 3)[..., :VALUE_WIDTH].flatten(2)


def peak_memory(name: str, length: int, device: torch.device) -> int:
    """Bytes that torch allocates at most for one document, inputs and gradients included."""

    def work() -> object:
        return steps([length], device)[name]()

    steps([64], device)[name]()  # what is allocated once
    if device.type == "cpu":
        return runner.cpu_bytes(work)[1]
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def table(result: runner.Result) -> str:
    names = list(result["times"][0]["variants"])
    rows = []
    for row in result["times"]:
        variants = row["variants"]
        rows.append(
            [
                f"{row['length']:,}",
                row["documents"],
                *(
                    f"{variants[name]['median_s'] * 1e3:,.1f} ({variants[name]['speedup']:.1f} x)"
                    for name in names
                ),
            ]
        )
    kernels = list(result["memory"][0]["peak_bytes"])
    memory = [
        [
            f"{row['length']:,}",
            *(
                f"{row['peak_bytes'][name] / 2**20:,.0f}" if name in row["peak_bytes"] else ""
                for name in kernels
            ),
        ]
        for row in result["memory"]
    ]
    about = (
        f"{result['heads']} heads, keys of {result['width']} and values of "
        f"{result['value_width']} channels, float32. Time in ms (and relative to the dense form):"
    )
    return "\n\n".join(
        [
            about,
            runner.markdown(("tokens", "documents", *names), rows),
            "Peak memory in MiB:",
            runner.markdown(("tokens", *kernels), memory),
        ]
    )


def plot(result: runner.Result, figure: "Figure") -> None:
    time, memory = figure.subplots(1, 2)
    one = [row for row in result["times"] if row["documents"] == 1]
    for name in one[0]["variants"]:
        seconds = [row["variants"][name]["median_s"] for row in one]
        time.loglog([row["length"] for row in one], seconds, marker="o", label=name)
    for name in result["memory"][0]["peak_bytes"]:
        rows = [row for row in result["memory"] if name in row["peak_bytes"]]
        mebibytes = [row["peak_bytes"][name] / 2**20 for row in rows]
        memory.plot([row["length"] for row in rows], mebibytes, marker="o", label=name)
    time.set(title="Time, one document", xlabel="tokens", ylabel="s")
    memory.set(title="Peak memory", xlabel="tokens", ylabel="MiB")
    time.legend()
    memory.legend()
