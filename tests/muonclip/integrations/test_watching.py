"""Watching models twice, and models that are copied, compiled, frozen or adapted."""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from muonclip import MuonClip, QKClip, param_groups
from muonclip.integrations import torch_attention

transformers: Any = pytest.importorskip("transformers", minversion="5")
from muonclip.integrations import transformers as hf  # noqa: E402


class Kind(NamedTuple):
    """A small model, its integration, and its loss."""

    make: Callable[..., Any]
    integration: Any
    loss: Callable[[Any], Tensor]


def llama(layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).train()


def encoder(layers: int = 2) -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


TOKENS = torch.arange(10).view(2, 5)
INPUTS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
KINDS = {
    "transformers": Kind(llama, hf, lambda m: m(input_ids=TOKENS, labels=TOKENS).loss),
    "torch": Kind(encoder, torch_attention, lambda m: m(INPUTS).square().mean()),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def observed(clip: QKClip) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = clip.step(clip=False)
    return all(bool(x.isfinite().all()) for x in result.upper_bounds.values())


def state_of(model: nn.Module) -> list[Any]:
    """Everything that hooks and instance attributes change."""
    return [
        (name, sorted(module.__dict__), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]


def test_a_newer_clip_replaces_an_older_one(kind: Kind) -> None:
    model = kind.make()
    old = kind.integration.qk_clip(model, threshold=1e-3)
    optimizer = MuonClip(param_groups(model), lr=0.0)
    old.attach(optimizer)
    new = kind.integration.qk_clip(model, threshold=1e-3)
    new.attach(optimizer)
    kind.loss(model).backward()
    optimizer.step()
    assert int(new.result.num_clipped) == 4 and old.result is None
    with pytest.warns(UserWarning, match="does nothing: a newer QKClip watches the same model"):
        old.step()


def test_an_older_optimizer_warns_once_that_its_clip_does_nothing(kind: Kind) -> None:
    model = kind.make()
    older, newer = (
        MuonClip(param_groups(model), 0.0, qk_clip=kind.integration.qk_clip(model, threshold=1e-3))
        for _ in range(2)
    )
    kind.loss(model).backward()
    with no_warnings():
        newer.step()
    assert newer.qk_clip is not None and int(newer.qk_clip.result.num_clipped) == 4
    weights = copy.deepcopy(dict(model.named_parameters()))
    kind.loss(model).backward()
    with pytest.warns(UserWarning, match="does nothing: a newer QKClip watches the same model"):
        older.step()
    with no_warnings():
        older.step()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert older.qk_clip is not None and older.qk_clip is not newer.qk_clip
    kind.integration.watch(model, older.qk_clip)
    kind.loss(model).backward()
    with no_warnings():
        older.step()
    assert older.qk_clip.result.max_logits.keys() == newer.qk_clip.result.max_logits.keys()
    assert all(bool(x.isfinite().all()) for x in older.qk_clip.result.upper_bounds.values())


def test_watching_again_with_the_same_clip_changes_nothing(kind: Kind) -> None:
    model = kind.make()
    clip = kind.integration.qk_clip(model)
    before = state_of(model)
    kind.integration.watch(model, clip)
    assert state_of(model) == before
    kind.loss(model)
    assert observed(clip)


def test_remove_leaves_the_model_as_it_was(kind: Kind) -> None:
    interface = transformers.modeling_utils.AttentionInterface
    model = kind.make()
    before, registry = state_of(model), dict(interface.__dict__)
    clip = kind.integration.qk_clip(model)
    kind.loss(model)
    clip.remove()
    assert state_of(model) == before
    assert interface.get_interface is registry["get_interface"]
    assert interface.__dict__.keys() == registry.keys()
    kind.loss(model)
    kind.integration.watch(model, clip)
    kind.loss(model)
    assert observed(clip)
    clip.remove()


def test_a_watched_model_is_freed(kind: Kind) -> None:
    """Neither the table of watched modules nor an optimizer's hooks keep it alive."""
    model = kind.make()
    clip = kind.integration.qk_clip(model)
    optimizer = MuonClip(param_groups(model), lr=0.0)
    clip.attach(optimizer)
    kind.loss(model).backward()
    optimizer.step()
    ends = [weakref.ref(x) for x in (model, clip, optimizer)]
    del model, clip, optimizer
    gc.collect()
    assert all(end() is None for end in ends)


def spawned(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def saved(thing: Any) -> Any:
    import io

    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, spawned, saved])
def test_a_copy_is_not_watched_and_its_clip_does_not_change_the_original(
    kind: Kind, make_copy: Callable[[Any], Any]
) -> None:
    model = kind.make()
    clip = kind.integration.qk_clip(model, threshold=1e-3)
    model.clip = clip
    kind.loss(model)
    twin = make_copy(model)
    observed(clip)
    kind.loss(twin)
    assert not observed(clip) and not observed(twin.clip)
    before = copy.deepcopy(dict(model.named_parameters()))
    copied = {name: p.detach().clone() for name, p in twin.named_parameters()}
    kind.integration.watch(twin, twin.clip)
    kind.loss(twin)
    assert int(twin.clip.step().num_clipped) == 4
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    changed = {name for name, p in twin.named_parameters() if not torch.equal(p, copied[name])}
    assert changed
    kind.loss(model)
    assert observed(clip)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, spawned, saved])
def test_a_copy_made_before_the_first_forward_pass_is_watched_once(
    kind: Kind, make_copy: Callable[[Any], Any]
) -> None:
    """The hooks that were copied with it do not run."""
    model = kind.make()
    original = kind.integration.qk_clip(model)
    twin = make_copy(model)
    before = state_of(twin)
    clip = kind.integration.qk_clip(twin)
    watched = state_of(twin)
    assert [x[2:] for x in watched] == [x[2:] for x in before]
    passes = []
    clip.observe_attention = lambda name, *args, **kwargs: passes.append(name)
    for _ in range(2):
        kind.loss(twin)
    assert passes == [*clip.layouts] * 2
    kind.loss(model)
    assert observed(original)


def test_a_hook_may_remove_the_clip_during_a_forward_pass(kind: Kind) -> None:
    model = kind.make()
    modules = dict(model.named_modules())
    layer: Any = modules[next(iter(kind.integration.attention_layouts(model)))]
    layer.register_forward_pre_hook(lambda *_: clip.remove())
    clip = kind.integration.qk_clip(model)
    kind.loss(model)
    assert not observed(clip)


def test_an_average_of_weights_is_not_watched(kind: Kind) -> None:
    model = kind.make()
    clip = kind.integration.qk_clip(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    kind.loss(average.module.train())
    assert not observed(clip)


def test_an_already_compiled_model_is_watched(kind: Kind) -> None:
    torch.compiler.reset()
    model = kind.make(layers=1)
    run = model
    if kind.integration is hf:
        model.model.layers[0].compile(backend="eager")
    else:
        run = torch.compile(model, backend="eager")
    kind.loss(run)
    clip = kind.integration.qk_clip(model)
    kind.loss(run).backward()
    assert observed(clip)
    clip.remove()
    kind.loss(run)
    kind.integration.watch(model, clip)
    kind.loss(run)
    assert observed(clip)
    torch.compiler.reset()


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_eval_mode_is_reported_with_its_remedy(kind: Kind) -> None:
    model = kind.make().eval()
    clip = kind.integration.qk_clip(model)
    optimizer = MuonClip(param_groups(model), lr=1e-4)
    clip.attach(optimizer)
    kind.loss(model).backward()
    with pytest.warns(UserWarning, match=r"ran in eval mode only; call model\.train\(\)"):
        optimizer.step()
    with no_warnings():
        optimizer.step()
        model.train()
        kind.loss(model).backward()
        optimizer.step()
    assert all(bool(x.isfinite().all()) for x in clip.result.upper_bounds.values())


def test_forgetting_to_return_to_training_is_reported(kind: Kind) -> None:
    model = kind.make()
    clip = kind.integration.qk_clip(model)
    optimizer = MuonClip(param_groups(model), lr=1e-4)
    clip.attach(optimizer)
    with no_warnings():
        for _ in range(2):
            kind.loss(model).backward()
            optimizer.step()
            with torch.no_grad():
                kind.loss(model.eval())
            model.train()
    kind.loss(model.eval()).backward()
    with pytest.warns(UserWarning, match="eval mode only"):
        optimizer.step()


def test_frozen_layers_are_skipped_until_they_are_unfrozen(kind: Kind) -> None:
    model = kind.make()
    layers = model.layers if hasattr(model, "layers") else model.model.layers
    layers[0].requires_grad_(False)
    before = copy.deepcopy(layers[0].state_dict())
    clip = kind.integration.qk_clip(model, threshold=1e-3)
    clip.attach(MuonClip(param_groups(model), lr=0.0))
    kind.loss(model)
    with pytest.warns(UserWarning, match="does not scale .*layers.0.self_attn: its query and key"):
        assert int(clip.step().num_clipped) == 2
    assert all(torch.equal(p, before[name]) for name, p in layers[0].state_dict().items())
    layers[0].requires_grad_(True)
    kind.loss(model)
    result = clip.step()
    assert not result.skipped and not torch.equal(
        next(iter(before.values())), next(iter(layers[0].state_dict().values()))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_default_dtype_works(kind: Kind, dtype: torch.dtype) -> None:
    """Lightning's bf16-true sets it while the model is made and while it runs."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = kind.make()
        clip = kind.integration.qk_clip(model, threshold=1e-3)
        optimizer = MuonClip(param_groups(model), lr=0.0)
        clip.attach(optimizer)
        inputs = INPUTS.to(dtype)
        loss = kind.loss(model) if kind.integration is hf else model(inputs).square().mean()
        loss.backward()
        optimizer.step()
    finally:
        torch.set_default_dtype(default)
    assert int(clip.result.num_clipped) == 4
    assert all(x.dtype == torch.float32 for x in clip.result.max_logits.values())


# ---------------------------------------------------------------------- PEFT in transformers


def peft_model(**options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(llama(), lora_config(**options)).train()


def lora_config(**options: Any) -> Any:
    """The configuration of an adapter of queries and keys."""
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "k_proj"], **options})


def logits(model: Any) -> Tensor:
    """The largest logits, [layers, heads], without clipping."""
    clip = QKClip(hf.attention_layouts(model), exact=True)
    handle = hf.watch(model, clip)
    KINDS["transformers"].loss(model)
    result = clip.step(clip=False)
    handle.remove()
    return torch.stack(list(result.max_logits.values()))


def test_lora_on_query_and_key_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn' is trained, but .*use_dora=True"):
        hf.qk_clip(peft_model())


def test_lora_elsewhere_leaves_attention_frozen() -> None:
    model = peft_model(target_modules=["v_proj"])
    clip = hf.qk_clip(model, threshold=1e-3)
    before = copy.deepcopy(model.state_dict())
    KINDS["transformers"].loss(model)
    with pytest.warns(UserWarning, match="its query and key weights are frozen"):
        clip.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"target_modules": ["v_proj"], "modules_to_save": ["q_proj", "k_proj"]},
    ],
)
def test_dora_and_modules_to_save_are_scaled(options: dict[str, Any]) -> None:
    model = peft_model(**options)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = logits(model)[0]
    threshold = float(before.mean())
    layers = [name for name in hf.attention_layouts(model) if "layers.0" in name]
    clip = QKClip({n: hf.attention_layouts(model)[n] for n in layers}, threshold=threshold)
    hf.watch(model, clip)
    KINDS["transformers"].loss(model).backward()
    assert int(clip.step().num_clipped) == 1
    clip.remove()
    after = logits(model)[0]
    assert torch.allclose(after, before.clamp(max=threshold), rtol=1e-4)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def run_reference(model: Any, reference: str) -> None:
    """The pass of DPO that computes the log-probabilities of the reference model."""
    with torch.no_grad():
        if reference == "disabled adapter":
            with model.disable_adapter():
                KINDS["transformers"].loss(model)
        elif reference == "another adapter":
            model.set_adapter("reference")
            KINDS["transformers"].loss(model)
            model.set_adapter("default")


@pytest.mark.parametrize("order", ["before", "after", "after the backward pass"])
@pytest.mark.parametrize("reference", ["disabled adapter", "another adapter"])
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"target_modules": ["v_proj"], "modules_to_save": ["q_proj", "k_proj"]},
    ],
)
def test_forward_passes_of_a_reference_do_not_count(
    options: dict[str, Any], reference: str, order: str
) -> None:
    """With one that has larger logits, training is the same as without it."""
    trained = []
    for present in ("", reference):
        model = peft_model(**options)
        model.add_adapter("reference", lora_config(**{"r": 3, **options}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "q_proj" in name and not name.endswith("lora_A.default.weight"):
                    parameter.mul_(2 if ".default" in name else 100)
        clip = hf.qk_clip(model, threshold=1e-3)
        optimizer = MuonClip(param_groups(model), lr=1e-3)
        clip.attach(optimizer)
        for _ in range(3):
            run_reference(model, present if order == "before" else "")
            loss = KINDS["transformers"].loss(model)
            run_reference(model, present if order == "after" else "")
            loss.backward()
            run_reference(model, present if order == "after the backward pass" else "")
            optimizer.step()
            optimizer.zero_grad()
            assert int(clip.result.num_clipped) > 0
        trained.append([p.detach() for n, p in model.named_parameters() if ".default" in n])
    assert all(torch.equal(*pair) for pair in zip(*trained, strict=True))


def test_each_adapter_is_clipped_in_its_steps() -> None:
    """Two adapters that are trained in turn."""
    model = peft_model(use_dora=True)
    model.add_adapter("second", lora_config(use_dora=True))
    clip = hf.qk_clip(model, threshold=1e-9)
    for adapter, other in [("default", "second"), ("second", "default")] * 2:
        model.set_adapter(adapter)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        KINDS["transformers"].loss(model)
        assert int(clip.step().num_clipped) > 0
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert changed and all(f".{adapter}." in n and f".{other}." not in n for n in changed)


def test_a_step_with_other_adapters_than_the_forward_passes_is_reported() -> None:
    model = peft_model(use_dora=True)
    model.add_adapter("second", lora_config(use_dora=True))
    clip = hf.qk_clip(model, threshold=1e-9)
    KINDS["transformers"].loss(model)
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="it ran with other adapters only; activate those"):
        assert int(clip.step().num_clipped) == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_same_weights_count_without_gradients(kind: Kind, reentrant: bool) -> None:
    """A pass of the weights to scale counts, as the first one of reentrant checkpointing."""
    model = kind.make()
    clip = kind.integration.qk_clip(model, threshold=1e-3)
    if reentrant:
        x = torch.ones((), requires_grad=True)
        torch.utils.checkpoint.checkpoint(
            lambda x: kind.loss(model) * x, x, use_reentrant=True
        ).backward()
    else:
        with torch.no_grad():
            kind.loss(model)
    assert int(clip.step().num_clipped) == 4


def test_lora_added_after_the_clip_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    clip = hf.qk_clip(model, threshold=1e-3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).train()
    before = copy.deepcopy(adapted.state_dict())
    with pytest.raises(ValueError, match="is trained, but QK-Clip cannot scale"):
        KINDS["transformers"].loss(adapted)
        clip.step()
    assert all(torch.equal(p, before[name]) for name, p in adapted.state_dict().items())


def test_transposed_layers_under_an_adapter() -> None:
    """GPT-2's Conv1D inside PEFT's layer."""
    peft = pytest.importorskip("peft")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32)
    model = transformers.GPT2LMHeadModel(config).train()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )
    with pytest.raises(ValueError, match="is trained, but QK-Clip cannot scale"):
        hf.qk_clip(adapted)
    adapted.requires_grad_(False)
    clip = hf.qk_clip(adapted)
    KINDS["transformers"].loss(adapted)
    assert observed(clip)


def test_adapted_multihead_attention_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["attention"]))
    with pytest.raises(ValueError, match="trains an adapter of PEFT over an"):
        torch_attention.qk_clip(adapted)


# ---------------------------------------------------------------------- trainers


def test_two_trainers_train_one_model(tmp_path: Path) -> None:
    """transformers' Trainer, twice, each with a separate optimizer and clip."""
    model = llama()
    clips = []

    class MuonTrainer(transformers.Trainer):  # type: ignore[misc,name-defined]
        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:
                self.optimizer = MuonClip(param_groups(self.model), lr=1e-3)
                clips.append(hf.qk_clip(self.model, threshold=1e-3))
                clips[-1].attach(self.optimizer)
            return self.optimizer

    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    for run in range(2):
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no"
        )
        trainer = MuonTrainer(model, arguments, train_dataset=data)
        with no_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            trainer.train()
        assert len(clips) == run + 1
        assert all(bool(x.isfinite().all()) for x in clips[-1].result.upper_bounds.values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_lightning_fits_twice(tmp_path: Path, precision: str) -> None:
    lightning = pytest.importorskip("lightning")
    from torch.utils.data import DataLoader

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()
            self.clips: list[QKClip] = []

        def training_step(self, tokens: Tensor) -> Tensor:
            return self.model(input_ids=tokens, labels=tokens).loss

        def configure_optimizers(self) -> MuonClip:
            optimizer = MuonClip(param_groups(self), lr=1e-3)
            self.clips.append(hf.qk_clip(self, threshold=1e-3))
            self.clips[-1].attach(optimizer)
            return optimizer

    module = Module()
    for run in range(2):
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, DataLoader([TOKENS, TOKENS], batch_size=None))
        assert len(module.clips) == run + 1
        result = module.clips[-1].result
        assert result is not None
        assert all(bool(x.isfinite().all()) for x in result.upper_bounds.values())
