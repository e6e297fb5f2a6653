"""MuonClip and QK-Clip in other libraries' trainers, beyond the examples in docs/."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonclip import MatrixLayout, MuonClip, param_groups
from muonclip.integrations.transformers import qk_clip
from tests.distributed.launch import launch
from tests.distributed.optimizer_cases import EXACT, TOLERANCE, Block, random, whole

LAYOUTS = {"up.weight": MatrixLayout((4, 10))}


def train_block(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        model(random((8, 8), step, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def train_with_accelerate(folder: Path, state_dict_type: str) -> tuple[list[Any], list[Tensor]]:
    """Three steps; then, in new objects that load the saved state, two more."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"])
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Linear"],
        state_dict_type=state_dict_type,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # Accelerate offers FSDP on accelerators only; its code runs on a CPU just as well.
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin

    def prepare() -> tuple[Any, Any, MuonClip]:
        model = Block()
        optimizer = MuonClip(param_groups(model, layouts=LAYOUTS), **EXACT)
        return *accelerator.prepare(model, optimizer), optimizer

    model, wrapped, _ = prepare()
    train_block(model, wrapped, range(3))
    accelerator.save_state(str(folder))
    accelerator.free_memory()
    model, wrapped, optimizer = prepare()
    accelerator.load_state(str(folder))
    train_block(model, wrapped, range(3, 5))
    options = ("algorithm", "layout", "param_names", "ns_dtype")
    groups = [[group[option] for option in options] for group in optimizer.param_groups]
    return groups, [whole(p.detach()) for p in model.parameters()]


@pytest.mark.parametrize("state_dict_type", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_accelerate_replaces_parameters_by_shards(tmp_path: Path, state_dict_type: str) -> None:
    """Groups made before ``fully_shard`` keep their options."""
    model = Block()
    optimizer = MuonClip(param_groups(model, layouts=LAYOUTS), **EXACT)
    train_block(model, optimizer, range(5))
    for groups, weights in launch(train_with_accelerate, 2, tmp_path, state_dict_type):
        for group, (algorithm, layout, names, dtype) in zip(
            optimizer.param_groups, groups, strict=True
        ):
            assert group["algorithm"] == algorithm and group["layout"] == layout
            assert group["param_names"] == names and dtype == torch.float64
        for actual, expected in zip(weights, model.parameters(), strict=True):
            assert (actual - expected).abs().max() < TOLERANCE


def train_with_lightning(folder: Path, save_distributed_checkpoint: bool) -> list[Tensor]:
    """An epoch of three steps; then, in new objects that load its checkpoint, another."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    from torch.utils.data import DataLoader

    size = int(os.environ["WORLD_SIZE"])
    torchrun = {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0"}
    os.environ.update(torchrun, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def configure_model(self) -> None:
            fully_shard(self.block, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Tensor) -> Tensor:
            return self.block(batch).square().mean()

        def configure_optimizers(self) -> MuonClip:
            return MuonClip(param_groups(self.block, layouts=LAYOUTS), **EXACT)

    def fit(epochs: int, checkpoint: Path | None) -> Module:
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=size,
            strategy=ModelParallelStrategy(
                data_parallel_size=size,
                tensor_parallel_size=1,
                save_distributed_checkpoint=save_distributed_checkpoint,
            ),
            max_epochs=epochs,
            callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
            use_distributed_sampler=False,  # every rank has the whole batch
            logger=False,
            enable_progress_bar=False,
        )
        module = Module()
        batches = [random((8, 8), step, dtype=torch.float64) for step in range(3)]
        trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=checkpoint)
        return module

    fit(1, None)
    module = fit(2, folder / "epoch=0.ckpt")
    return [whole(p.detach()) for p in module.block.parameters()]


@pytest.mark.parametrize("sharded", [True, False])
def test_lightning_shards_saves_and_resumes(tmp_path: Path, sharded: bool) -> None:
    """FSDP2 by Lightning, whose checkpoints allow only tensors, numbers and strings."""
    model = Block()
    optimizer = MuonClip(param_groups(model, layouts=LAYOUTS), **EXACT)
    for _ in range(2):
        train_block(model, optimizer, range(3))
    for weights in launch(train_with_lightning, 2, tmp_path, sharded):
        for actual, expected in zip(weights, model.parameters(), strict=True):
            assert (actual - expected).abs().max() < TOLERANCE


def test_hf_trainer_makes_the_optimizer_of_given_groups(tmp_path: Path) -> None:
    """For FSDP, where ``optimizers`` is refused: groups by name instead of the Trainer's."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    clip = qk_clip(model, threshold=1e-3)
    tokens = torch.arange(32).view(4, 8)
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        optimizer_cls_and_kwargs=(MuonClip, {"params": param_groups(model), "lr": 0.01}),
    )
    clip.attach(trainer.create_optimizer())
    trainer.train()
    groups = trainer.optimizer.param_groups
    algorithms = {n: g["algorithm"] for g in groups for n in g["param_names"]}
    assert algorithms["model.embed_tokens.weight"] == algorithms["lm_head.weight"] == "adamw"
    assert algorithms["model.layers.0.self_attn.q_proj.weight"] == "muon"
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert clip.result is not None and int(clip.result.num_clipped) == 2


def train_with_scaler(bad_step: int) -> tuple[list[Tensor], float]:
    """FSDP2 with a GradScaler, where one step overflows on one rank only."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Block().float()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = MuonClip(param_groups(model, layouts=LAYOUTS), **EXACT)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        scaler.scale(model(random((8, 8), step)).square().mean()).backward()
        if step == bad_step and dist.get_rank() == 1:
            model.up.weight.grad.to_local()[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [whole(p.detach()) for p in model.parameters()], scaler.get_scale()


def test_grad_scaler_under_fsdp2() -> None:
    alone = Block().float()
    optimizer = MuonClip(param_groups(alone, layouts=LAYOUTS), **EXACT)
    for step in (0, 2):
        alone(random((8, 8), step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for weights, scale in launch(train_with_scaler, 2, 1):
        assert scale == 2.0**9
        for actual, expected in zip(weights, alone.parameters(), strict=True):
            assert (actual - expected).abs().max() < 1e-4
