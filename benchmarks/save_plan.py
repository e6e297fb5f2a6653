"""Planning a checkpoint of Kimi K2.5 on thousands of simulated ranks: processor time on rank 0.

Every rank decides by itself what it writes; rank 0 also joins the parts of the manifest. The ranks
are simulated one after another with tensors without values, and nothing but the manifest is
written. The optimizer's state is as on ranks without ``optimizer.shard_state``, where every copy of
a tensor has to be decided about.
"""

import argparse
import itertools
import pickle
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from benchmarks.runner import ROOT, Result, markdown
from pretrain.build import Run
from pretrain.checkpoint import storage
from pretrain.checkpoint.run import tensors_of
from pretrain.checkpoint.storage import Part, Share
from pretrain.config import Config, load
from pretrain.model.weights import Weight, language_weights, vision_weights
from pretrain.plan.ranks import ranks_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FILE = ROOT / "configs" / "kimi_k25.yaml"
_RANKS = {"full": (512, 1024, 2048, 4096), "quick": (512, 4096), "tiny": (8, 16)}
_TINY = (
    *("language.num_layers=4", "language.num_experts=16"),
    *("parallel.pipeline=2", "parallel.layout=null", "parallel.expert=4"),
)
_OVERRIDES = {"full": (), "quick": (), "tiny": _TINY}
_DIGEST, _DTYPE = "0" * 64, torch.bfloat16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are no options."""


class SimulatedRanks:
    """The tensors of each rank of a run, without values, in megatron-core's order of ranks.

    Args:
        config: without context parallelism, and experts are not split.
        world: number of ranks.
    """

    def __init__(self, config: Config, world: int) -> None:
        self.config, self.world = config, world
        self._ranks = ranks_of(config, world)
        self._weights: dict[tuple[int, int], dict[str, Weight]] = {}

    def run(self, rank: int) -> Run:
        ranks, config = self._ranks, self.config
        stage, place = divmod(rank, self.world // ranks.pipeline)
        data_rank, tensor_rank = divmod(place, ranks.tensor)
        expert_data_rank, expert_rank = divmod(place, ranks.expert)
        weights = self._weights_of(stage, expert_rank)
        named = {}
        for name, weight in weights.items():
            blocks = weight.blocks(config.parallel, tensor_rank)
            rows, *columns = blocks[0].sizes
            named[name] = torch.empty(len(blocks) * rows, *columns, dtype=_DTYPE, device="meta")
        context = SimpleNamespace(
            rank=rank,
            world_size=self.world,
            data_rank=data_rank,
            context_rank=0,
            context_size=1,
            expert_data_rank=expert_data_rank,
            tensor_rank=tensor_rank,
        )
        run = SimpleNamespace(config=config, context=context, named_tensors=named, weights=weights)
        return cast(Run, run)

    def _weights_of(self, stage: int, expert_rank: int) -> dict[str, Weight]:
        key = stage, expert_rank
        if key not in self._weights:
            config, local = self.config, self._ranks.local_experts
            rows = config.language.vocab_rows(config.data.vocab_size)
            experts = range(expert_rank * local, (expert_rank + 1) * local)
            catalogue = itertools.chain(
                language_weights(config.language, rows, experts),
                vision_weights(config.vision, config.language.hidden_size),
            )
            self._weights[key] = {w.name: w for w in catalogue if self._ranks.has(stage, w)}
        return self._weights[key]


def state_of(run: Run) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state of a simulated rank, with a copy on each rank that has the weight."""
    keys = {
        "muon": ("momentum_buffer", "master"),
        "adamw": ("step", "exp_avg", "exp_avg_sq", "master"),
        None: (),
    }
    return {
        name: {
            key: torch.empty(() if key == "step" else tensor.shape, device="meta")
            for key in keys[run.weights[name].optimizer]
        }
        for name, tensor in run.named_tensors.items()
    }


def planned(ranks: SimulatedRanks, rank: int) -> tuple[Share, Part, float]:
    """A rank's share, its part of the manifest, and the seconds that it took to plan."""
    run = ranks.run(rank)
    state = state_of(run)
    start = time.process_time()
    share = storage.share_of(tensors_of(run, state), ranks.world)
    by_file, entries = storage.files_of(share, rank)
    part = storage.part_of(share, dict.fromkeys(by_file, _DIGEST), entries)
    return share, part, time.process_time() - start


def _joined(folder: Path, parts: list[Part]) -> Iterator[tuple[str, float]]:
    """(name, seconds) of joining the parts on rank 0, and of opening the manifest on any rank."""
    sent = [pickle.dumps(part) for part in parts]
    start = time.process_time()
    received = [pickle.loads(message) for message in sent]
    storage.write_manifest(folder, 1, {"updates": 1}, received)
    yield "join", time.process_time() - start
    start = time.process_time()
    storage.Checkpoint.open(folder)
    yield "open", time.process_time() - start


def run(options: argparse.Namespace) -> Result:
    config = load(_FILE, list(_OVERRIDES[options.form]))
    rows = []
    for world in _RANKS[options.form]:
        ranks = SimulatedRanks(config, world)
        written, blocks, seconds, parts = [], 0, [], []
        for rank in range(world):
            share, part, spent = planned(ranks, rank)
            written.append(sum(block.values.nbytes for block in share.blocks))
            blocks += len(share.blocks)
            seconds.append(spent)
            parts.append(part)
        with tempfile.TemporaryDirectory() as name:
            joined = dict(_joined(Path(name), parts))
            size = sum(file.stat().st_size for file in Path(name).iterdir())
        rows.append(
            {
                "ranks": world,
                "plan_s": statistics.median(seconds),
                "rank_0_s": seconds[0] + joined["join"],
                "open_s": joined["open"],
                "blocks": blocks,
                "manifest_bytes": size,
                "written_bytes": sum(written),
                "most_written_bytes": max(written),
            }
        )
    return {"rows": rows}


def plot(result: Result, figure: "Figure") -> None:
    axes = figure.subplots()
    rows = result["rows"]
    ranks = [row["ranks"] for row in rows]
    for key, label in (
        ("rank_0_s", "rank 0: plan, and join the manifest"),
        ("plan_s", "every rank: plan"),
        ("open_s", "every rank, to resume: read the manifest"),
    ):
        axes.plot(ranks, [row[key] for row in rows], marker="o", label=label)
    axes.set(xlabel="ranks", ylabel="processor time, s", xscale="log", ylim=0)
    axes.set_xticks(ranks, [str(number) for number in ranks])
    axes.legend()


def table(result: Result) -> str:
    def cells(row: dict[str, Any]) -> list[object]:
        mean = row["written_bytes"] / row["ranks"]
        return [
            row["ranks"],
            f"{row['plan_s']:.3f}",
            f"{row['rank_0_s']:.2f}",
            f"{row['open_s']:.2f}",
            row["blocks"],
            f"{row['manifest_bytes'] / 2**20:.1f}",
            f"{row['written_bytes'] / 2**40:.2f}",
            f"{mean / 2**30:.2f}",
            f"{row['most_written_bytes'] / 2**30:.2f}",
        ]

    return markdown(
        [
            *("Ranks", "Plan, s", "Rank 0, s", "Read the manifest, s", "Blocks", "Manifest, MiB"),
            *("Checkpoint, TiB", "Mean of a rank, GiB", "Most of a rank, GiB"),
        ],
        [cells(row) for row in result["rows"]],
    )
