"""The catalogue of weights: every parameter and kept buffer of the whole model.

Names, shapes, tensor-parallel splits and published names are written here only; the trainer, the
plan, export and import read them. A test compares the catalogue with models that are built.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from muonclip import MatrixLayout
from muonclip.distributed import TensorShard
from pretrain.config import LanguageConfig, ParallelConfig, VisionConfig
from pretrain.model.geometry import PATCHES_PER_TOKEN

Shape = tuple[int, ...]
Optimizer = Literal["muon", "adamw"]


class Split(NamedTuple):
    """The tensor-parallel split of a weight.

    Attributes:
        dim: the dimension that is split.
        stacked: number of matrices stacked along ``dim``, each of which is split by itself: 2 for
            the fused gate and up projections, whose ``dim`` is 0.
    """

    dim: int
    stacked: int = 1


class Weight(NamedTuple):
    """A parameter or kept buffer of the whole model.

    Attributes:
        name: name in the whole model and in checkpoints.
        shape: shape of the whole tensor.
        component: part of the model that it belongs to, as ``plan`` lists it.
        optimizer: algorithm that trains it; None for a buffer.
        published: names and shapes of the tensors with its values in the published checkpoint of
            Kimi-K2.5. Text models' names lack the prefix ``language_model.``. A weight with
            several published tensors is the stack of them; consecutive weights with the same
            published tensor are stacked there. Reshaped, nothing else changes.
        split: its tensor-parallel split; None: every tensor-parallel rank has the whole tensor.
        layer: its layer in the language model, from 0; -1 for the embedding and ``num_layers`` for
            the final norm and the output head, which the first and the last model chunk have. None
            for the vision encoder and the projector, which every rank has.
        expert: number of its expert within the layer; None outside experts.
        published_groups: number of groups of rows in which its published tensors alternate: each
            group has its rows of the first tensor, then of the second, and so on.
        matrices: rows of each matrix that Muon orthogonalizes, in one of ``repeats``; empty for one
            matrix.
        repeats: number of times that the rows of all ``matrices`` alternate.
    """

    name: str
    shape: Shape
    component: str
    optimizer: Optimizer | None
    published: dict[str, Shape]
    split: Split | None = None
    layer: int | None = None
    expert: int | None = None
    published_groups: int = 1
    matrices: tuple[int, ...] = ()
    repeats: int = 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def layout(self, parallel: ParallelConfig) -> MatrixLayout | None:
        """Return the layout of its matrices in the gathered shards; None for one matrix."""
        if not self.matrices:
            return None
        # Each tensor-parallel rank has its rows of every stacked matrix.
        ranks = self.shards(parallel) if self.split is not None and self.split.stacked > 1 else 1
        return MatrixLayout(tuple(rows // ranks for rows in self.matrices), self.repeats * ranks)

    @property
    def of_neurons(self) -> "Weight":
        """A tensor with a number for each row of this weight, and split like its rows."""
        is_by_columns = self.split is not None and self.split.dim == len(self.shape) - 1
        split = None if is_by_columns else self.split
        return self._replace(shape=(*self.shape[:-1], 1), split=split)

    def shards(self, parallel: ParallelConfig) -> int:
        """Return the number of tensor-parallel ranks among which it is split; 1 if it is not."""
        if self.split is None:
            return 1
        return parallel.tensor if self.expert is None else parallel.expert_tensor

    def blocks(self, parallel: ParallelConfig, tensor_rank: int) -> list[TensorShard]:
        """Return the blocks of the whole tensor that a tensor-parallel rank has.

        Its tensor is the stack of them along the first dimension: one block, or one for each
        stacked matrix of :class:`Split`.
        """
        ranks = self.shards(parallel)
        if self.split is None or ranks == 1:
            return [TensorShard.whole(self.shape)]
        dim, matrices = self.split
        offsets, sizes = [0] * len(self.shape), list(self.shape)
        sizes[dim] //= matrices * ranks
        blocks = []
        for matrix in range(matrices):
            offsets[dim] = (matrix * ranks + tensor_rank) * sizes[dim]
            blocks.append(TensorShard(tuple(offsets), tuple(sizes)))
        return blocks

    def copies(self, parallel: ParallelConfig, world_size: int) -> int:
        """Return the number of ranks with the same tensor, or the same shard of it."""
        if self.layer is None:
            return world_size
        if self.expert is None:
            replicas, ranks = parallel.data_size(world_size) * parallel.context, parallel.tensor
        else:
            replicas, ranks = parallel.expert_data_size(world_size), parallel.expert_tensor
        return replicas * (1 if self.split else ranks)


_COLUMNS = Split(0)  # megatron-core's ColumnParallelLinear and VocabParallelEmbedding
_GATE_AND_UP = Split(0, stacked=2)  # ColumnParallelLinear of a gated MLP
_ROWS = Split(1)  # RowParallelLinear


def language_weights(
    config: LanguageConfig, vocab_size: int, experts: Iterable[int] | None = None
) -> Iterator[Weight]:
    """Weights of the language model.

    Args:
        vocab_size: rows of the embedding and of the output head.
        experts: numbers of the experts to list in every layer; default: all.
    """
    hidden, end = config.hidden_size, config.num_layers
    experts = range(config.num_experts) if experts is None else experts

    def weight(
        name: str, published: str, shape: Shape, component: str, split: Split | None, layer: int
    ) -> Weight:
        tensors = {f"language_model.{published}.weight": shape}
        return Weight(f"language.{name}.weight", shape, component, "adamw", tensors, split, layer)

    yield weight(
        "embedding.word_embeddings", "model.embed_tokens", (vocab_size, hidden), "embedding",
        _COLUMNS, layer=-1,
    )  # fmt: skip
    for layer in range(config.num_layers):
        yield from _language_layer(config, layer, experts)
    yield weight("decoder.final_layernorm", "model.norm", (hidden,), "norms", None, end)
    if not config.tie_embeddings:
        yield weight("output_layer", "lm_head", (vocab_size, hidden), "output head", _COLUMNS, end)


def _language_layer(config: LanguageConfig, layer: int, experts: Iterable[int]) -> Iterator[Weight]:
    hidden = config.hidden_size

    def weight(
        name: str, published: str, shape: Shape, component: str, optimizer: Optimizer = "muon",
        split: Split | None = None, expert: int | None = None,
    ) -> Weight:  # fmt: skip
        """``published``: a name, or those of two tensors that are stacked here."""
        names = published.split()
        rows, *columns = shape
        tensors = {_layer_name(layer, name): (rows // len(names), *columns) for name in names}
        matrices = (rows // len(names),) * len(names) if len(names) > 1 else ()
        name = f"language.decoder.layers.{layer}.{name}.weight"
        whole = Weight(name, shape, component, optimizer, tensors, split, layer, expert)
        return whole._replace(matrices=matrices)

    def mlp(
        name: str, published: str, component: str, width: int, expert: int | None = None
    ) -> Iterator[Weight]:
        gate_and_up = f"{published}.gate_proj {published}.up_proj"
        yield weight(
            f"{name}.linear_fc1", gate_and_up, (2 * width, hidden), component,
            split=_GATE_AND_UP, expert=expert,
        )  # fmt: skip
        yield weight(
            f"{name}.linear_fc2", f"{published}.down_proj", (hidden, width), component,
            split=_ROWS, expert=expert,
        )  # fmt: skip

    yield weight("input_layernorm", "input_layernorm", (hidden,), "norms", "adamw")
    yield from (_mla if config.attention == "mla" else _gqa)(config, layer)
    yield weight("pre_mlp_layernorm", "post_attention_layernorm", (hidden,), "norms", "adamw")
    if layer < config.dense_layers:
        yield from mlp("mlp", "mlp", "dense MLP", config.ffn_hidden_size)
        return
    yield weight("mlp.router", "mlp.gate", (config.num_experts, hidden), "router", "adamw")
    if config.router_score == "sigmoid":
        bias = (config.num_experts,)
        yield Weight(
            f"language.decoder.layers.{layer}.mlp.router.expert_bias", bias, "router", None,
            {f"language_model.model.layers.{layer}.mlp.gate.e_score_correction_bias": bias},
            layer=layer,
        )  # fmt: skip
    for expert in experts:
        yield from mlp(
            f"mlp.experts.local_experts.{expert}", f"mlp.experts.{expert}", "experts",
            config.expert_ffn_hidden_size, expert,
        )  # fmt: skip
    if config.shared_expert_ffn_hidden_size:
        yield from mlp(
            "mlp.shared_experts", "mlp.shared_experts", "shared experts",
            config.shared_expert_ffn_hidden_size,
        )  # fmt: skip


def _layer_name(layer: int, name: str) -> str:
    """Published name of a weight of a layer."""
    return f"language_model.model.layers.{layer}.{name}.weight"


def _mla(config: LanguageConfig, layer: int) -> Iterator[Weight]:
    """Weights of multi-head latent attention."""
    hidden, heads, q_rank, kv_rank = (
        config.hidden_size, config.num_heads, config.q_lora_rank, config.kv_lora_rank,
    )  # fmt: skip
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    query = heads * (nope + rope)

    def matrix(
        name: str, published: str, shape: Shape, split: Split | None,
        matrices: Shape = (), repeats: int = 1,
    ) -> Weight:  # fmt: skip
        whole = _attention_weight(layer, f"linear_{name}", {published: shape}, shape, split)
        return whole._replace(matrices=matrices, repeats=repeats)

    def norm(name: str, published: str, size: int) -> Weight:
        return _attention_weight(layer, name, {published: (size,)}, (size,))

    # Every rank has the whole down-projections: see latent_attention.DuplicatedLinear.
    if q_rank is None:
        yield matrix("q_proj", "q_proj", (query, hidden), _COLUMNS, (nope, rope), heads)
    else:
        yield matrix("q_down_proj", "q_a_proj", (q_rank, hidden), None)
        yield norm("q_layernorm", "q_a_layernorm", q_rank)
        yield matrix("q_up_proj", "q_b_proj", (query, q_rank), _COLUMNS, (nope, rope), heads)
    down = (kv_rank + rope, hidden)
    yield matrix("kv_down_proj", "kv_a_proj_with_mqa", down, None, (kv_rank, rope))
    yield norm("kv_layernorm", "kv_a_layernorm", kv_rank)
    up = (heads * (nope + value), kv_rank)
    yield matrix("kv_up_proj", "kv_b_proj", up, _COLUMNS, (nope, value), heads)
    yield matrix("proj", "o_proj", (hidden, heads * value), _ROWS)


def _gqa(config: LanguageConfig, layer: int) -> Iterator[Weight]:
    """Weights of grouped-query attention."""
    hidden, dim, groups = config.hidden_size, config.gqa_head_dim, config.gqa_kv_heads
    query, key = config.num_heads * dim, groups * dim
    # megatron-core's order: per key head its queries, the key and the value.
    qkv = {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden)}
    fused = _attention_weight(layer, "linear_qkv", qkv, (query + 2 * key, hidden), _COLUMNS)
    yield fused._replace(
        published_groups=groups, matrices=(query // groups, dim, dim), repeats=groups
    )
    if config.qk_norm:
        for x in "qk":
            yield _attention_weight(layer, f"{x}_layernorm", {f"{x}_norm": (dim,)}, (dim,))
    output = (hidden, query)
    yield _attention_weight(layer, "linear_proj", {"o_proj": output}, output, _ROWS)


def _attention_weight(
    layer: int, name: str, published: Mapping[str, Shape], shape: Shape, split: Split | None = None
) -> Weight:
    """A matrix, or the gain of a norm."""
    component = "attention" if len(shape) > 1 else "norms"
    optimizer: Optimizer = "muon" if len(shape) > 1 else "adamw"
    tensors = {_layer_name(layer, f"self_attn.{key}"): value for key, value in published.items()}
    name = f"language.decoder.layers.{layer}.self_attention.{name}.weight"
    return Weight(name, shape, component, optimizer, tensors, split, layer)


def vision_weights(config: VisionConfig, language_hidden_size: int) -> Iterator[Weight]:
    """Weights of the vision encoder and the projector."""
    hidden, ffn, side = config.hidden_size, config.ffn_hidden_size, config.patch_size
    merged = PATCHES_PER_TOKEN * hidden

    def weight(
        name: str, published: str, shape: Shape, optimizer: Optimizer = "adamw",
        published_shape: Shape | None = None,
    ) -> Weight:  # fmt: skip
        component = "vision encoder" if name.startswith("encoder.") else "projector"
        tensors = {published: published_shape or shape}
        return Weight(f"vision.{name}", shape, component, optimizer, tensors)

    def norm(name: str, published: str) -> Iterator[Weight]:
        for kind in ("weight", "bias"):
            yield weight(f"{name}.{kind}", f"{published}.{kind}", (hidden,))

    def linear(name: str, published: str, rows: int, columns: int) -> Iterator[Weight]:
        yield weight(f"{name}.weight", f"{published}.weight", (rows, columns), "muon")
        yield weight(f"{name}.bias", f"{published}.bias", (rows,))

    table = (config.position_grid, config.position_grid, hidden)
    yield weight("encoder.pos_embed", "vision_tower.patch_embed.pos_emb.weight", table)
    name, published = "encoder.patch_embed", "vision_tower.patch_embed.proj"
    yield weight(
        f"{name}.weight", f"{published}.weight", (hidden, 3 * side * side),
        published_shape=(hidden, 3, side, side),
    )  # fmt: skip
    yield weight(f"{name}.bias", f"{published}.bias", (hidden,))
    for layer in range(config.num_layers):
        name, published = f"encoder.blocks.{layer}", f"vision_tower.encoder.blocks.{layer}"
        yield from norm(f"{name}.norm1", f"{published}.norm0")
        for projection in "qkv":
            yield weight(
                f"{name}.attention.{projection}_proj.weight", f"{published}.wqkv.weight",
                (hidden, hidden), "muon", (3 * hidden, hidden),
            )  # fmt: skip
        for projection in "qkv":
            yield weight(
                f"{name}.attention.{projection}_proj.bias", f"{published}.wqkv.bias",
                (hidden,), published_shape=(3 * hidden,),
            )  # fmt: skip
        yield from linear(f"{name}.attention.o_proj", f"{published}.wo", hidden, hidden)
        yield from norm(f"{name}.norm2", f"{published}.norm1")
        yield from linear(f"{name}.fc1", f"{published}.mlp.fc0", ffn, hidden)
        yield from linear(f"{name}.fc2", f"{published}.mlp.fc1", hidden, ffn)
    yield from norm("encoder.final_norm", "vision_tower.encoder.final_layernorm")
    yield from norm("projector.norm", "mm_projector.pre_norm")
    yield from linear("projector.fc1", "mm_projector.proj.0", merged, merged)
    yield from linear("projector.fc2", "mm_projector.proj.2", language_hidden_size, merged)
