"""Every setting of a run, with its meaning, default and allowed values."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pretrain.config import optimizer_options
from pretrain.config.rules import In, NonEmpty, Options, PathRule, Settings, require
from pretrain.errors import PretrainError

# Upper limits are far above any use. They catch mistakes such as a missing decimal point, and keep
# products of sizes within 64 bits.
Size = Annotated[int, In("[1, 1048576]")]
SizeOrZero = Annotated[int, In("[0, 1048576]")]
Groups = Annotated[int, In("[1, 524288]")]
Layers = Annotated[int, In("[1, 10000]")]
LayersOrNone = Annotated[int, In("[0, 10000]")]
Steps = Annotated[int, In("[1, 1000000000]")]
StepsOrZero = Annotated[int, In("[0, 1000000000]")]
Tokens = Annotated[int, In("[1, 16777216]")]
Ranks = Annotated[int, In("[1, 1048576]")]
Positive = Annotated[float, In("[1e-30, 1e30]")]
Share = Annotated[float, In("[0, 1]")]
Decay = Annotated[float, In("[0, 1)")]
RopeBase = Annotated[float, In("(1, 1e12]")]
Name = Annotated[str, NonEmpty()]
PathName = Annotated[str, PathRule()]


@dataclass(frozen=True)
class RopeScalingConfig(Settings):
    """YaRN (arXiv 2309.00071): rotary positions for longer sequences than in pretraining.

    The names are those of ``rope_scaling`` in DeepSeek-V3's and Kimi K2's config.json.
    """

    factor: Annotated[float, In("[1, 1e6]")] = 1.0
    """Ratio of the new to the original sequence length; 1: no scaling."""
    original_max_position_embeddings: Tokens | None = None
    """data.seq_length of pretraining; required if ``factor`` is above 1."""
    beta_fast: Annotated[float, In("[1e-6, 1e6]")] = 32.0
    """Rotary channels with more turns than this over the original length are not scaled."""
    beta_slow: Annotated[float, In("[1e-6, 1e6]")] = 1.0
    """Channels with fewer turns are slowed down by ``factor``; those in between, partly."""
    mscale: Annotated[float, In("[1e-6, 1000]")] = 1.0
    """Rotary queries and keys are multiplied by m(mscale) / m(mscale_all_dim), where m(x) =
    0.1 x ln(factor) + 1."""
    mscale_all_dim: Annotated[float, In("[0, 1000]")] = 1.0
    """Attention logits are multiplied by m(mscale_all_dim) squared."""

    def _check(self) -> None:
        if self.factor == 1:
            self._refuse_others("factor")
        require(
            self.factor == 1 or self.original_max_position_embeddings is not None,
            f"original_max_position_embeddings must be given with factor={self.factor}: the "
            "data.seq_length that the model was pretrained with",
        )
        require(
            self.beta_fast >= self.beta_slow,
            f"beta_fast={self.beta_fast} must be >= beta_slow={self.beta_slow}",
        )
        require(
            self.mscale_all_dim > 0 or self.mscale == 1,
            f"mscale_all_dim must be > 0, or 0 with mscale=1, not {self.mscale_all_dim} with "
            f"mscale={self.mscale}: implementations disagree about that case",
        )


_MLA_ONLY = (
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "rope_scaling",
)  # fmt: skip
_GQA_ONLY = ("num_kv_heads", "head_dim", "qk_norm")
_EXPERTS_ONLY = (
    "num_experts", "experts_per_token", "expert_groups", "expert_groups_per_token",
    "expert_ffn_hidden_size", "shared_expert_ffn_hidden_size", "router_score",
    "normalize_expert_weights", "router_scaling", "expert_bias_update_rate", "load_balancing_loss",
)  # fmt: skip


@dataclass(frozen=True)
class LanguageConfig(Settings):
    """The language model: attention, and dense MLPs or mixtures of experts.

    The defaults are Kimi K2's architecture, at a small size. Settings without effect on the chosen
    architecture must keep their defaults.
    """

    num_layers: Layers = 4
    dense_layers: Annotated[int, In("[0, 10000]")] = 1
    """Number of first layers with a dense MLP instead of experts; ``num_layers``: all."""
    hidden_size: Size = 128
    ffn_hidden_size: Size = 384
    """MLP width of the dense layers."""
    vocab_size: Annotated[int, In("[1, 16777216]")] | None = None
    """Rows of the embedding and of the output head: at least the tokenizer's tokens (null). More
    make a tokenizer divisible by ``parallel.tensor``, or keep the padded vocabulary of a published
    model. As there, the unused rows take part in the softmax."""
    tie_embeddings: bool = False
    """Use the embedding as output head. Needs parallel.pipeline=1."""
    num_heads: Size = 4
    attention: Literal["mla", "gqa"] = "mla"
    """mla: multi-head latent attention (DeepSeek-V2 and later, Kimi K2). gqa: grouped-query
    attention (Llama, Qwen), including multi-head attention."""
    q_lora_rank: Size | None = 64
    """For mla: rank of the queries' latent; null: queries are projected from the hidden state, as
    in Moonlight and DeepSeek-V2-Lite."""
    kv_lora_rank: Size = 48
    """For mla, as the next three: rank of the latent of keys and values."""
    qk_nope_head_dim: Size = 32
    qk_rope_head_dim: Annotated[int, In("[2, 1048576]")] = 16
    v_head_dim: Size = 32
    num_kv_heads: Size | None = None
    """For gqa: number of heads of keys and values; null: ``num_heads``."""
    head_dim: Annotated[int, In("[2, 1048576]")] | None = None
    """For gqa: width of a head, all of it rotary; null: ``hidden_size`` / ``num_heads``."""
    qk_norm: bool = False
    """For gqa: RMSNorm of every head's query and key before the rotary embedding, as in Qwen3. The
    logits then do not follow the scale of the weights, and QK-Clip does not apply."""
    rope_base: RopeBase = 10000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    """For mla."""
    num_experts: Size = 8
    experts_per_token: Size = 2
    expert_groups: Groups = 1
    """Number of groups of consecutive experts (n_group of DeepSeek-V3)."""
    expert_groups_per_token: Groups = 1
    """Number of groups, those with the largest sums of their two best scores, that a token's
    experts are chosen from (topk_group of DeepSeek-V3)."""
    expert_ffn_hidden_size: Size = 128
    shared_expert_ffn_hidden_size: SizeOrZero = 128
    """Width of all shared experts together; 0: none."""
    router_score: Literal["sigmoid", "softmax"] = "sigmoid"
    """Score of the experts. sigmoid: with a bias for balancing, by which the experts are chosen,
    but not weighted (DeepSeek-V3, Kimi K2). softmax: over all experts (DeepSeek-V2-Lite, Qwen3)."""
    normalize_expert_weights: bool = True
    """Divide the scores of a token's experts by their sum. The score of a single expert is never
    normalized; sigmoid scores of several are always."""
    router_scaling: Annotated[float, In("[1e-6, 1e6]")] = 2.0
    """Factor of the routed experts' scores (Kimi K2: 2.827)."""
    expert_bias_update_rate: Share = 1e-3
    """For sigmoid: step size of the auxiliary-loss-free load balancing."""
    load_balancing_loss: Share = 0.0
    """Coefficient of the sequence-wise load-balancing loss of every layer of experts (DeepSeek-V3,
    arXiv 2412.19437, equation 17)."""
    norm_eps: Annotated[float, In("[1e-12, 1]")] = 1e-5
    """Epsilon of RMSNorm. The norms of MLA's latents always use 1e-6, as in DeepSeek-V3's code."""
    init_std: Annotated[float, In("[1e-12, 100]")] = 0.02

    def _check(self) -> None:
        require(
            self.dense_layers <= self.num_layers,
            f"dense_layers={self.dense_layers} is more than num_layers={self.num_layers}",
        )
        require(
            self.hidden_size >= self.num_heads,
            f"hidden_size={self.hidden_size} must be >= num_heads={self.num_heads}",
        )
        if self.attention == "mla":
            self._refuse_without_effect("attention=mla", _GQA_ONLY)
            require(
                self.qk_rope_head_dim % 2 == 0,
                f"qk_rope_head_dim must be even, not {self.qk_rope_head_dim}",
            )
        else:
            self._refuse_without_effect("attention=gqa", _MLA_ONLY)
            self._check_gqa()
        if self.moe_layers == 0:
            self._refuse_without_effect("dense_layers=num_layers", _EXPERTS_ONLY)
        else:
            self._check_router()

    def _check_gqa(self) -> None:
        require(
            self.head_dim is not None or self.hidden_size % self.num_heads == 0,
            f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}: set "
            "head_dim",
        )
        require(self.gqa_head_dim % 2 == 0, f"head_dim must be even, not {self.gqa_head_dim}")
        require(
            self.num_heads % self.gqa_kv_heads == 0,
            f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: choose "
            "a divisor",
        )

    def _check_router(self) -> None:
        per_token, experts = self.experts_per_token, self.num_experts
        require(per_token <= experts, f"experts_per_token is {per_token} of only {experts} experts")
        groups, chosen = self.expert_groups, self.expert_groups_per_token
        require(
            experts % groups == 0,
            f"expert_groups={groups} does not divide num_experts={experts}: choose a divisor",
        )
        require(
            chosen <= groups, f"expert_groups_per_token is {chosen} of only {groups} expert_groups"
        )
        if self.router_score == "softmax":
            self._refuse_without_effect("router_score=softmax", ["expert_bias_update_rate"])
        else:
            require(
                self.normalize_expert_weights or per_token == 1,
                "normalize_expert_weights=False needs router_score=softmax, or one expert per "
                "token: sigmoid scores of several experts are always normalized",
            )
        if chosen == groups:  # all experts can be chosen
            return
        require(
            self.router_score == "sigmoid",
            f"expert_groups={groups} needs router_score=sigmoid: groups are ranked as in "
            "DeepSeek-V3",
        )
        # megatron-core ranks a group by the sum of its best experts_per_token //
        # expert_groups_per_token scores.
        possible = "2" if chosen == 1 else f"{2 * chosen} to {3 * chosen - 1}"
        require(
            per_token // chosen == 2,
            f"expert_groups_per_token={chosen} needs experts_per_token={possible}, not "
            f"{per_token}: groups are ranked by their two best scores",
        )
        require(
            experts // groups * chosen >= per_token and experts // groups >= 2,
            f"expert_groups={groups} of {experts // groups} experts are too small: "
            f"expert_groups_per_token={chosen} of them must have experts_per_token={per_token}, "
            "and each of them 2",
        )

    @property
    def moe_layers(self) -> int:
        """Number of layers of experts, which follow the dense layers."""
        return self.num_layers - self.dense_layers

    def has_module(self, name: str) -> bool:
        """Whether a layer has a module that can be recomputed, by megatron-core's name."""
        has = {
            "mlp": self.dense_layers > 0,
            "moe": self.moe_layers > 0,
            "moe_act": self.moe_layers > 0,
            "shared_experts": self.moe_layers > 0 and self.shared_expert_ffn_hidden_size > 0,
        }
        return has.get(name, True)

    @property
    def gqa_kv_heads(self) -> int:
        """``num_kv_heads`` with its default."""
        return self.num_kv_heads or self.num_heads

    @property
    def gqa_head_dim(self) -> int:
        """``head_dim`` with its default."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def query_key_dim(self) -> int:
        """Width of a head's query and key."""
        if self.attention == "gqa":
            return self.gqa_head_dim
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def value_dim(self) -> int:
        """Width of a head's value."""
        return self.gqa_head_dim if self.attention == "gqa" else self.v_head_dim

    def vocab_rows(self, tokens: int) -> int:
        """Rows of the embedding and of the output head, for a tokenizer's number of tokens."""
        return self.vocab_size or tokens


@dataclass(frozen=True)
class VisionConfig(Settings):
    """The vision encoder (MoonViT-3D; the defaults are its full size) and its projector."""

    num_layers: Layers = 27
    hidden_size: Annotated[int, In("[4, 1048576]")] = 1152
    num_heads: Annotated[int, In("[1, 262144]")] = 16
    ffn_hidden_size: Size = 4304
    patch_size: Annotated[int, In("[2, 1024]")] = 14
    """Side of a patch in pixels. Each 2x2 patches become one token of the language model."""
    position_grid: Annotated[int, In("[1, 4096]")] = 64
    """Side of the table of learned positions, which is interpolated to each image's grid."""
    rope_base: RopeBase = 10000.0

    def _check(self) -> None:
        require(
            self.hidden_size % (4 * self.num_heads) == 0,
            f"hidden_size={self.hidden_size} must be num_heads={self.num_heads} times a multiple "
            "of 4: half of each head encodes the row, half the column",
        )


@dataclass(frozen=True)
class ImageConfig(Settings):
    """Drawn images and clips of text."""

    min_chars: Annotated[int, In("[1, 200]")] = 4
    max_chars: Annotated[int, In("[1, 200]")] = 20
    """Length of a caption, i.e. of the text in an image."""
    max_words: Annotated[int, In("[1, 200]")] | None = None
    """Maximum number of words in a caption; null: as many as its length allows. With 1, captions
    are words of letters alone, and rare ones are as frequent as common ones."""
    pieces_share: Share = 0.0
    """Share of the images for training whose captions are letters cut from a line anywhere, across
    words. A model that has seen few words often would learn to guess those instead of reading."""
    min_font_size: Annotated[int, In("[4, 256]")] = 14
    max_font_size: Annotated[int, In("[4, 256]")] = 22
    """In pixels. Up to about 22, a line of text fits into one row of tokens (28 pixels)."""
    large_share: Share = 0.1
    """Share of images with up to twice the largest font size."""
    wrapped_share: Share = 0.1
    """Share of images whose text is wrapped to several lines."""
    clip_share: Share = 0.1
    """Share of items that are clips of 2 to 4 frames."""
    min_contrast: Annotated[float, In("(0, 1]")] = 1.0
    """The difference between the colours of letters and background is multiplied by a random number
    between this and 1: below about 0.3, letters are faint."""

    def _check(self) -> None:
        for name in ("chars", "font_size"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            require(low <= high, f"max_{name}={high} must be >= min_{name}={low}")
        if self.max_words == 1 and self.wrapped_share > 0:
            self._refuse_without_effect("max_words=1", ["wrapped_share"])


@dataclass(frozen=True)
class SourceConfig(Settings):
    """A source of data."""

    type: Name = "text"
    """text: JSON lines or plain text (also .gz, .zst, .bz2, .xz), Parquet or Arrow. images:
    images, videos and text in folders, JSON, tables, WebDataset or MDS shards. energon: a
    folder of WebDataset shards prepared for megatron-energon. standard_library: the built-in text.
    chat: conversations for supervised finetuning, in JSON lines, Parquet or Arrow; only the
    assistant's replies are learned. vision_chat: the same with images and videos.
    standard_library_chat: questions and answers from the built-in text. megatron: tokens in files
    of Megatron's format (.bin and .idx), also those of `data tokenize`. megatron_chat:
    conversations in such files, from `data convert` or `data tokenize`."""
    path: Annotated[str, PathRule(optional=True)] = ""
    """A file, a folder (with its subfolders) or a pattern such as data/*.jsonl.gz; for text,
    images and chat also a URL; for megatron also the path of the files without .bin and .idx."""
    weight: Annotated[float, In("[0, 1e9]")] = 1.0
    """Share of tokens, relative to the other sources of text, or of images."""
    field: Name = "text"
    """Key of the text in each JSON object, or column of a table; for images, of the caption (also:
    `caption`); for conversations, of the list of messages (also: `messages`, `conversations`)."""
    image_field: str = ""
    """For images: key or column of the image or images, if several could be meant."""
    media_urls: tuple[Name, ...] = ()
    """For images and vision_chat: hosts from which images and videos are copied that records name
    by URL, such as upload.wikimedia.org or '*.example.org'; '*': all. A pattern only allows public
    addresses, as a record could name a service in your network."""
    split: Literal["hash", "train", "held_out"] = "hash"
    """hash: hold out documents by a hash of their content; else: the split of all documents."""
    trust_code: bool = False
    """For energon: run the Python code that the shards' dataset.yaml names (sample_loader,
    part_filter, classes and functions), and unpickle their content. This code can do anything
    that you can: enable it only for shards that you made, or whose code you have read."""

    def _check(self) -> None:
        for host in self.media_urls:
            require(
                not set("/:") & set(host),
                f"media_urls must be names of hosts, such as example.org, not {host!r}",
            )


# The others are also those of the built-in data, or of the images that `sample` reads.
_SOURCES_ONLY = (
    "max_untokenized_mb", "held_out", "deduplicate", "decode_workers", "max_corrupt",
)  # fmt: skip


@dataclass(frozen=True)
class DataConfig(Settings):
    """The data: the built-in text and drawn images, or other sources."""

    seq_length: Annotated[int, In("[64, 16777216]")] = 256
    """Tokens in a packed sequence."""
    vocab_size: Annotated[int, In("[300, 16777216]")] = 1024
    """Tokens of the byte-level BPE tokenizer that is trained on the text, if the text has enough.
    With ``tokenizer``, only `plan` uses this number."""
    vision_share: Annotated[float, In("[0, 0.3]")] = 0.1
    """Share of all tokens that are image placeholders."""
    max_corpus_mb: Annotated[float, In("[0.1, 1e6]")] = 8.0
    """Maximum size of the built-in text, or of the text that the tokenizer of other sources is
    trained on, in 10^6 bytes."""
    cache_dir: PathName = ".cache/pretrain"
    """Folder of the tokenizer and the tokenized text."""
    max_untokenized_mb: Annotated[float, In("[0, 1e9]")] = 2000.0
    """Maximum size of a source's files that a job tokenizes itself, in 10^6 bytes; larger ones are
    tokenized beforehand: `python -m pretrain data tokenize`."""
    images: ImageConfig = field(default_factory=ImageConfig)
    sources: tuple[SourceConfig, ...] = ()
    """Sources of data; default: the text of the standard library, and images of lines of it."""
    tokenizer: PathName | None = None
    """A Hugging Face tokenizer.json or a tiktoken file; null: train one on the text."""
    held_out: Decay = 0.02
    """Share of the documents of ``sources`` that is held out."""
    deduplicate: Literal["none", "exact", "near"] = "none"
    """Leave out duplicates among the documents of ``sources``. exact: the same text, and the same
    content of images; near: also similar text (MinHash of five tokens each; needs datasketch). Of a
    held-out and a training document, the one to train on is left out."""
    duplicate_threshold: Annotated[float, In("[0.5, 0.99]")] = 0.8
    """Jaccard similarity above which documents are near duplicates."""
    max_image_tokens: Tokens | None = None
    """Larger images are shrunk to about this many tokens; null: a quarter of seq_length."""
    video_fps: Annotated[float, In("[0.001, 1000]")] = 2.0
    """Frames per second sampled from a video file (2 in the processor of Kimi K2.5)."""
    decode_workers: Annotated[int, In("[1, 256]")] = 4
    """Threads that decode the images of the next step, on each rank that needs their pixels."""
    max_corrupt: StepsOrZero = 100
    """Maximum number of corrupt samples before the run ends; they are skipped and listed in
    run_dir/skipped.jsonl."""

    def _check(self) -> None:
        require(
            not self.sources or any(source.weight > 0 for source in self.sources),
            "sources must have a weight above 0: all are 0",
        )
        if not self.sources:
            self._refuse_without_effect("sources=[]", _SOURCES_ONLY)
        if self.deduplicate != "near":
            self._refuse_without_effect(f"deduplicate={self.deduplicate}", ["duplicate_threshold"])


@dataclass(frozen=True)
@optimizer_options.with_options
class OptimizerConfig(Settings):
    """MuonClip, its schedule and QK-Clip.

    Options of MuonClip that are not declared here are added by ``optimizer_options``.
    """

    lr: Positive = 2e-3
    """Peak learning rate of the matrices (Muon)."""
    adamw_lr: Positive | None = None
    """Peak learning rate of everything else (AdamW); null: ``lr``."""
    weight_decay: Annotated[float, In("[0, 1000]")] = 0.1
    momentum: Decay = 0.95
    ns_steps: Annotated[int, In("[1, 100]")] = 5
    ns_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of Newton-Schulz; auto: float16 on NVIDIA GPUs for matrices of aspect ratio 1.5 or
    more, else bfloat16 on accelerators and on CPUs that multiply faster in it, or float32."""
    adamw_beta1: Decay = 0.9
    adamw_beta2: Decay = 0.95
    shard_state: bool | None = None
    """Store momentum, moments and master weights only once among ranks that have copies of a
    weight: those of a matrix on the rank that orthogonalizes it, the others in equal parts. Updated
    weights, and not updates, are then sent. null: if ranks have copies."""
    qk_clip_threshold: Positive = 100.0
    """QK-Clip's tau: the limit of each head's max logit."""
    clip_grad_norm: Positive = 1.0
    warmup_steps: StepsOrZero = 50
    decay_steps: StepsOrZero = 150
    """Length of the cosine decay at the end of the run; before it, the rate is constant."""
    final_lr_fraction: Share = 0.1

    @classmethod
    def not_settings(cls) -> Mapping[str, str]:
        return optimizer_options.NOT_SETTINGS

    def _check(self) -> None:
        optimizer_options.check(self)
        if self.decay_steps == 0:
            self._refuse_without_effect("decay_steps=0", ["final_lr_fraction"])

    def muonclip_options(self) -> dict[str, Any]:
        """The keyword arguments of ``MuonClip``, without those that follow from other sections."""
        return optimizer_options.values_of(self)


@dataclass(frozen=True)
class ParallelConfig(Settings):
    """Parallelism of the model; the remaining factor of the processes is data parallel."""

    expert: Ranks = 1
    """Expert-parallel size: number of ranks that share the experts."""
    tensor: Ranks = 1
    """Tensor-parallel size, with sequence parallelism: number of ranks that split each matrix."""
    context: Ranks = 1
    """Context-parallel size: number of ranks that share each sequence. Attention gathers the
    latents (GQA: keys and values) of all its tokens."""
    pipeline: Ranks = 1
    """Number of pipeline stages, which share the layers (1F1B schedule)."""
    interleave: Ranks = 1
    """Model chunks on each pipeline stage; above 1: the interleaved schedule."""
    layout: tuple[LayersOrNone, ...] | None = None
    """Layers of each of the pipeline x interleave model chunks, in the model's order, such as
    [4, 4, 1]; null: as even as possible. The first and the last chunk, which have the embedding and
    the output head as well, can have 0."""

    def _check(self) -> None:
        require(
            self.interleave == 1 or self.pipeline > 1,
            f"interleave={self.interleave} needs pipeline stages: set pipeline above 1",
        )
        if self.layout is not None:
            self._check_layout(self.layout)

    def _check_layout(self, layout: tuple[int, ...]) -> None:
        require(
            len(layout) == self.pipeline * self.interleave,
            f"layout must be a list of pipeline={self.pipeline} x interleave={self.interleave} "
            f"numbers of layers, not of {len(layout)}",
        )
        require(
            all(layout[1:-1]),
            f"layout={list(layout)} has an empty model chunk: only the first and the last can be "
            "without layers",
        )

    @property
    def expert_tensor(self) -> int:
        """Number of ranks that split each expert.

        Experts are small: with expert parallelism they are not split, and the ranks of a
        tensor-parallel group have different experts.
        """
        return self.tensor if self.expert == 1 else 1

    @property
    def min_world_size(self) -> int:
        """The smallest number of processes that these sizes allow."""
        dense, experts = self.tensor * self.context, self.expert * self.expert_tensor
        return self.pipeline * math.lcm(dense, experts)

    @property
    def sequence_unit(self) -> int:
        """The number of tokens that the length of a sequence must be a multiple of.

        Each context-parallel rank has two equal chunks, which sequence parallelism splits together.
        """
        return self.tensor if self.context == 1 else self.context * math.lcm(2, self.tensor)

    @property
    def replica_size(self) -> int:
        """Number of ranks that share a sequence: those with one data-parallel rank."""
        return self.tensor * self.context * self.pipeline

    def data_size(self, world_size: int) -> int:
        """Data-parallel size: number of ranks that share a global batch."""
        return world_size // self.replica_size

    def expert_data_size(self, world_size: int) -> int:
        """Number of ranks with the same experts."""
        return world_size // (self.expert * self.expert_tensor * self.pipeline)

    def layers(self, num_layers: int) -> list[int]:
        """Number of layers in each model chunk, in the model's order: ``layout``, or as follows.

        Chunks have the same number of layers, or one more. Later chunks come first, since earlier
        stages keep more micro-batches; the last chunk comes last, since it has the output head.
        """
        if self.layout is not None:
            return list(self.layout)
        chunks = self.pipeline * self.interleave
        counts = [num_layers // chunks] * chunks
        for chunk in [*range(chunks - 2, -1, -1), chunks - 1][: num_layers % chunks]:
            counts[chunk] += 1
        return counts


KernelsSetting = Literal["auto", "torch", "transformer_engine"]
RecomputedModule = Literal["core_attn", "mlp", "moe", "shared_experts"]


@dataclass(frozen=True)
class RecomputeConfig(Settings):
    """Activations of the language model that the backward pass computes again."""

    granularity: Literal["none", "selective", "full"] = "none"
    """full: whole layers. selective: the ``modules`` of every layer. Gradients are the same."""
    method: Literal["uniform", "block"] = "uniform"
    """For full: uniform stores the input of every ``num_layers`` layers; block recomputes the
    first ``num_layers`` layers of each model chunk, and stores the activations of the others."""
    num_layers: Layers = 1
    """See ``method``."""
    modules: tuple[RecomputedModule, ...] = ("core_attn",)
    """For selective: the core attention (which keeps little: the log-sum-exp of each query); dense
    MLPs; layers of experts, or only their shared experts."""

    def _check(self) -> None:
        require(
            self.granularity != "selective" or len(self.modules) > 0,
            "modules must name at least one module, or granularity must be none",
        )
        without_effect = {
            "none": ("method", "num_layers", "modules"),
            "selective": ("method", "num_layers"),
            "full": ("modules",),
        }
        choice = f"granularity={self.granularity}"
        self._refuse_without_effect(choice, without_effect[self.granularity])


# Default limit of ranks that share their images.
_MAX_IMAGE_GROUP = 256


@dataclass(frozen=True)
class EncoderProcessConfig(Settings):
    """The Decoupled Encoder Process."""

    enabled: bool = True
    """Distribute the vision encoder's work over all ranks; false: the ranks of the first pipeline
    stage encode their own images."""
    spread: Literal["balanced", "round_robin"] = "balanced"
    """Assignment of images to ranks: balanced by cost, or round robin for comparison."""
    cost: Literal["counted", "measured"] = "counted"
    """Cost of an image: FLOPs counted from its shape, or measured on the first rank for a few
    seconds at the start of the run and stored in run_dir."""
    max_patches: Annotated[int, In("[1, 2147483647]")] = 16384
    """Maximum number of patches in a forward of the encoder; limits the memory of activations."""
    recompute: bool = True
    """Encode images whose activations do not fit into activation_memory_gib again before the
    encoder's backward pass. false: keep the activations of all images during the backbone's
    passes."""
    activation_memory_gib: Annotated[float, In("[0, 1e6]")] | None = None
    """Memory of a rank, in GiB, for the encoder's activations that are kept during the backbone's
    passes. 0: none. null: on a GPU, 90 % of its memory without the memory that plan counts; on a
    CPU, 1 GiB. The gradients are the same for any value."""
    max_patches_per_rank: Annotated[int, In("[1, 2147483647]")] | None = None
    """Maximum number of patches assigned to a rank in a step; limits the memory of their pixels.
    An image with more patches is assigned to a rank without other images. null: no limit."""
    group_size: Annotated[int, In("[1, 2147483647]")] | None = None
    """Number of ranks that share their images, which limits the time to plan and the ranks that a
    rank exchanges images with. A multiple of tensor x context x pipeline that divides the number of
    ranks. null: the largest up to 256."""

    def _check(self) -> None:
        if not self.recompute:
            self._refuse_without_effect("recompute=false", ["activation_memory_gib"])
        if self.spread == "round_robin":
            self._refuse_without_effect("spread=round_robin", ["max_patches_per_rank"])
        if not self.enabled:
            # Others may be in the file of a model, whose runs are compared with enabled=false.
            names = (
                "spread", "cost", "activation_memory_gib", "max_patches_per_rank", "group_size"
            )  # fmt: skip
            self._refuse_without_effect("enabled=false", names)


@dataclass(frozen=True)
class CheckpointConfig(Settings):
    """Frequency and number of saved checkpoints."""

    every: Steps = 100
    """Steps between checkpoints; one is always written at the end."""
    keep: Annotated[int, In("[1, 1000000]")] = 2
    """Number of checkpoints to keep, the newest ones."""
    asynchronous: bool = True
    """Copy to memory, and write while training continues. An error is reported after the step in
    which it occurs; a killed run resumes from the last checkpoint that was completely written."""
    local_dir: PathName | None = None
    """A folder on a disk of each node, where checkpoints are written first; from there they are
    copied to run_dir in the background. If a run ends in between, its next start on the same nodes
    copies the last one that was written completely. null: write to run_dir at once."""
    verify: bool = True
    """Compare the files with their checksums when a run loads a checkpoint, each file on one
    rank."""

    def _check(self) -> None:
        require(
            self.asynchronous or self.local_dir is None,
            "local_dir needs asynchronous=true: they are copied from there in the background",
        )


@dataclass(frozen=True)
class FaultConfig(Settings):
    """Handling of bad steps and of ranks that hang."""

    non_finite: Literal["stop", "skip", "roll_back"] = "stop"
    """For a non-finite loss or gradient. stop: end the run with an error; skip: skip the update;
    roll_back: restore the newest checkpoint and continue with the data after this step's. Also for
    non-finite weights, which are never saved; skip then stops, since the update is done."""
    spike: Literal["ignore", "stop", "skip", "roll_back"] = "ignore"
    """The same for a loss far above the previous ones."""
    spike_window: Annotated[int, In("[4, 100000]")] = 64
    """Number of previous losses to compare with; as many first steps are never spikes."""
    spike_deviations: Annotated[float, In("[1e-6, 1e6]")] = 10.0
    """A spike is more than this many standard deviations above their median. The deviation is
    estimated as 1.4826 times the median absolute deviation, and at least 0.001 of the median."""
    max_in_a_row: Steps = 5
    """Maximum number of consecutive skipped steps, or of times rolled back to the same checkpoint,
    before the run stops."""
    hang_seconds: Annotated[float, In("[0, 31536000]")] = 1800.0
    """Seconds without progress after which each rank writes its stacks to stderr and run_dir, and
    ends; 0: never. Choose more than a step, an evaluation, or a checkpoint takes. The preparation
    of data is not watched."""
    collective_seconds: Annotated[float, In("[0, 31536000]")] | None = None
    """Time limit of a collective (NCCL's or gloo's): seconds that a rank waits for a late one
    before it ends; 0: none. At most half of hang_seconds: NCCL knows which collective is late and
    writes its flight recorder to run_dir, while hang_seconds is for everything else. null: a third
    of hang_seconds."""
    straggler_ratio: Annotated[float, In("[1, 1e6]")] = 1.3
    """Report a rank that computes for more than this many times the median of the ranks of its
    pipeline stage. Ranks are compared in one step of every log_every; the metrics have all
    ratios."""

    def _check(self) -> None:
        if self.spike == "ignore":
            self._refuse_without_effect("spike=ignore", ["spike_window", "spike_deviations"])
        if not {self.non_finite, self.spike} & {"skip", "roll_back"}:
            choice = f"non_finite={self.non_finite} and spike={self.spike}"
            self._refuse_without_effect(choice, ["max_in_a_row"])
        limit = self.collective_seconds
        if limit is None or limit == 0:
            return
        require(limit >= 1, f"collective_seconds must be 0 or at least 1, not {limit:g}")
        require(
            self.hang_seconds == 0 or 2 * limit <= self.hang_seconds,
            f"collective_seconds={limit:g} must be at most half of hang_seconds="
            f"{self.hang_seconds:g}, so that a late collective is reported before the watchdog "
            f"ends the process: set hang_seconds to {2 * limit:g} or more, or to 0",
        )

    @property
    def collective_limit(self) -> float:
        """Time limit of collectives in seconds; 0: none."""
        if self.collective_seconds is not None:
            return self.collective_seconds
        return max(1.0, self.hang_seconds / 3) if self.hang_seconds else 0.0


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """Held-out evaluation."""

    every: Steps = 200
    """Steps between evaluations of the held-out loss; also before and after training."""
    sequences: Annotated[int, In("[1, 1000000]")] = 64
    """Number of packed held-out sequences in an evaluation."""
    captions: Annotated[int, In("[2, 100000]")] = 256
    """Number of held-out images; each caption is scored with its image and with a wrong one."""
    transcriptions: Annotated[int, In("[0, 100000]")] = 8
    """Number of held-out images that the model transcribes, or about which it replies, in every
    evaluation but that before the first step. It writes at most 24 tokens: longer captions are
    never read exactly, and longer replies are left out."""


@dataclass(frozen=True)
class WandbConfig(Settings):
    """Weights & Biases, in addition to TensorBoard."""

    enabled: bool = False
    """Needs ``pip install 'muonclip[wandb]'``."""
    mode: Literal["offline", "online"] = "offline"
    """offline: write to run_dir/wandb, for ``wandb sync``. online: needs ``wandb login``."""
    project: Name = "pretrain"

    def _check(self) -> None:
        if not self.enabled:
            self._refuse_others("enabled")


@dataclass(frozen=True)
class ProfileConfig(Settings):
    """Traces of torch's profiler."""

    steps: tuple[Steps, Steps] | None = None
    """[first, last] step to record: a file for Perfetto per rank, in run_dir/traces."""

    def _check(self) -> None:
        if self.steps is not None:
            first, last = self.steps
            require(
                first <= last,
                f"steps must be [first, last], 1 <= first <= last, not {[first, last]}",
            )


@dataclass(frozen=True)
class Config(Settings):
    """A run."""

    run_dir: PathName = "runs/default"
    """Folder for the run's output: metrics.jsonl, tensorboard/, checkpoints/, curves.png."""
    start_from: PathName | None = None
    """The run_dir of another run. Training starts with the weights of its newest checkpoint and
    its tokenizer, and with a new optimizer state, schedule and data order. Once this run has a
    checkpoint, it resumes from that."""
    seed: Annotated[int, In("[0, 4294967295]")] = 0
    steps: Steps = 1000
    """Optimizer steps of the whole run."""
    global_batch_size: Tokens = 16
    """Packed sequences per step, over all ranks."""
    micro_batch_size: Tokens = 8
    """Packed sequences per forward and backward pass of a rank."""
    log_every: Steps = 10
    """Steps between progress lines, and between samples of the update RMS. metrics.jsonl contains
    every step."""
    peak_tflops: Annotated[float, In("[1e-6, 1e9]")] | None = None
    """Peak TFLOP/s of one process, for the utilization (mfu); null: measure a large matrix product
    at the start of the run."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and activations. With bfloat16, master weights, moments and gradients
    are float32; router, softmax, loss and norms compute in float32."""
    kernels: KernelsSetting = "auto"
    """Kernels of the language model. torch: needs only torch. transformer_engine: NVIDIA's
    Transformer Engine, for GPUs. auto: transformer_engine if it is installed and there is a GPU,
    else torch. Weights and checkpoints are the same."""
    megatron: Options = field(default_factory=dict)
    """Options of megatron-core's TransformerConfig by name, such as moe_permute_fusion: those that
    change speed or memory, but not the model. docs/training_on_gpus.md describes them."""
    ddp: Options = field(default_factory=dict)
    """Options of megatron-core's DistributedDataParallelConfig, such as overlap_grad_reduce."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    encoder_process: EncoderProcessConfig = field(default_factory=EncoderProcessConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def _check(self) -> None:
        require(
            self.start_from is None
            or os.path.realpath(self.start_from) != os.path.realpath(self.run_dir),
            f"start_from={self.start_from} is the run_dir itself: choose another run_dir",
        )
        require(
            self.profile.steps is None or self.profile.steps[1] <= self.steps,
            f"profile.steps ends after steps = {self.steps}",
        )
        scaling = self.language.rope_scaling
        self._check_recompute()
        longest = scaling.factor * (scaling.original_max_position_embeddings or 0)
        require(
            scaling.factor == 1 or self.data.seq_length <= longest,
            f"data.seq_length={self.data.seq_length} is more than language.rope_scaling's factor x "
            f"original_max_position_embeddings = {longest:g}: lower it, or raise the factor",
        )
        used = self.optimizer.warmup_steps + self.optimizer.decay_steps
        require(
            used <= self.steps,
            f"optimizer.warmup_steps + optimizer.decay_steps = {used} is more than steps = "
            f"{self.steps}: shorten them or train for longer",
        )

    def _check_recompute(self) -> None:
        """Refuse to recompute modules that no layer has."""
        if self.recompute.granularity == "selective":
            for module in self.recompute.modules:
                require(
                    self.language.has_module(module),
                    f"recompute.modules has {module}, which no layer has: leave it out",
                )

    def micro_batches(self, world_size: int) -> int:
        """Number of micro-batches of a rank in a step."""
        return self.global_batch_size // (
            self.parallel.data_size(world_size) * self.micro_batch_size
        )

    def shards_state(self, world_size: int) -> bool:
        """Whether the optimizer's state is stored only once among ranks that have copies."""
        has_copies = world_size > self.parallel.pipeline  # each stage is divided or repeated
        return has_copies if self.optimizer.shard_state is None else self.optimizer.shard_state

    def image_group_size(self, world_size: int) -> int:
        """Number of ranks that share their images; see ``encoder_process.group_size``."""
        if self.encoder_process.group_size is not None:
            return self.encoder_process.group_size
        replica, data_size = self.parallel.replica_size, self.parallel.data_size(world_size)
        limit = max(1, _MAX_IMAGE_GROUP // replica)
        return replica * max(n for n in range(1, limit + 1) if data_size % n == 0)

    def check_world_size(self, world_size: int) -> None:
        """Refuse a number of processes that does not fit the configuration.

        Raises:
            PretrainError: names the setting that does not divide another one, and the remedy.
        """
        self._check_divisors()
        self._check_layers()
        parallel = self.parallel
        if self.optimizer.shard_state and world_size == parallel.pipeline:
            raise PretrainError(
                "optimizer.shard_state=true has no effect, because each pipeline stage has one "
                "process and no weight of it a copy: leave it out, or use more processes"
            )
        for name, ranks in (
            ("parallel.expert", parallel.expert),
            ("parallel.tensor", parallel.tensor),
            ("parallel.context", parallel.context),
            ("parallel.pipeline", parallel.pipeline),
            ("parallel.tensor x parallel.pipeline", parallel.tensor * parallel.pipeline),
            ("parallel.tensor x parallel.context", parallel.tensor * parallel.context),
            (
                "parallel.tensor x parallel.context x parallel.pipeline",
                parallel.tensor * parallel.context * parallel.pipeline,
            ),
            ("parallel.expert x parallel.pipeline", parallel.expert * parallel.pipeline),
        ):
            if world_size % ranks:
                raise PretrainError(
                    f"{world_size} processes cannot be divided by {name}={ranks}: start {ranks} "
                    f"(or a multiple), or set {name}"
                )
        size, replica = self.encoder_process.group_size, parallel.replica_size
        if size is not None and (size % replica or world_size % size):
            raise PretrainError(
                f"encoder_process.group_size={size} must divide {world_size} processes and be a "
                f"multiple of {replica}, the product of parallel.tensor, context and pipeline"
            )
        data_size = parallel.data_size(world_size)
        if self.global_batch_size % (data_size * self.micro_batch_size):
            raise PretrainError(
                f"global_batch_size={self.global_batch_size} is not a multiple of {data_size} "
                f"data-parallel ranks x micro_batch_size={self.micro_batch_size}: "
                "change one of them"
            )
        micro_batches = self.micro_batches(world_size)
        if parallel.interleave > 1 and micro_batches % parallel.pipeline:
            raise PretrainError(
                f"the interleaved schedule needs a multiple of parallel.pipeline="
                f"{parallel.pipeline} micro-batches on each rank, not {micro_batches}: change "
                "global_batch_size or micro_batch_size"
            )
        name = "microbatch_group_size_per_vp_stage"
        group = self.megatron.get(name)
        if parallel.interleave > 1 and type(group) is int and group > 0:
            sizes = [group, micro_batches % group or group]
            if min(sizes) < parallel.pipeline or group > micro_batches:
                raise PretrainError(
                    f"megatron.{name}={group} cannot divide {micro_batches} micro-batches of a "
                    f"rank into groups of at least parallel.pipeline={parallel.pipeline}: change "
                    "it, or leave it out"
                )

    def _check_divisors(self) -> None:
        """Refuse expert and tensor parallelism that do not divide the model's sizes evenly."""
        parallel, language, data = self.parallel, self.language, self.data
        tensor, experts = parallel.tensor, language.moe_layers > 0
        if parallel.expert > 1 and not experts:
            raise PretrainError(
                f"parallel.expert={parallel.expert} needs layers of experts, and language."
                "dense_layers=num_layers leaves none: set parallel.expert=1"
            )
        sizes = [
            ("expert", parallel.expert, "language.num_experts", language.num_experts),
            ("tensor", tensor, "language.num_heads", language.num_heads),
            ("tensor", tensor, "language.ffn_hidden_size", language.ffn_hidden_size),
        ]
        if language.attention == "gqa":
            sizes.append(("tensor", tensor, "language.num_kv_heads", language.gqa_kv_heads))
        elif language.q_lora_rank is not None:
            sizes.append(("tensor", tensor, "language.q_lora_rank", language.q_lora_rank))
        if experts:
            width, shared = language.expert_ffn_hidden_size, language.shared_expert_ffn_hidden_size
            sizes += [
                ("tensor", parallel.expert_tensor, "language.expert_ffn_hidden_size", width),
                ("tensor", tensor, "language.shared_expert_ffn_hidden_size", shared),
            ]
        # The vocabulary of another tokenizer is checked once it has been read.
        if language.vocab_size is not None:
            sizes.append(("tensor", tensor, "language.vocab_size", language.vocab_size))
        elif not data.tokenizer and not self.start_from:
            sizes.append(("tensor", tensor, "data.vocab_size", data.vocab_size))
        for name, ranks, setting, size in sizes:
            if size % ranks:
                raise PretrainError(
                    f"parallel.{name}={ranks} does not divide {setting}={size}: choose a divisor"
                )
        if data.seq_length % parallel.sequence_unit:
            raise PretrainError(
                f"data.seq_length={data.seq_length} is not a multiple of {parallel.sequence_unit}, "
                f"which parallel.tensor={parallel.tensor} and parallel.context={parallel.context} "
                "require: change one of them"
            )

    def _check_layers(self) -> None:
        """Refuse model chunks without layers, or that recomputation does not divide evenly."""
        parallel, num_layers, recompute = self.parallel, self.language.num_layers, self.recompute
        if parallel.layout is not None and sum(parallel.layout) != num_layers:
            raise PretrainError(
                f"parallel.layout has {sum(parallel.layout)} layers in all, but "
                f"language.num_layers={num_layers}: change one of them"
            )
        if parallel.layout is None and num_layers < parallel.pipeline * parallel.interleave:
            raise PretrainError(
                f"parallel.pipeline={parallel.pipeline} x parallel.interleave="
                f"{parallel.interleave} is more than language.num_layers={num_layers}: each model "
                "chunk needs a layer"
            )
        if self.language.tie_embeddings and parallel.pipeline > 1:
            raise PretrainError(
                "language.tie_embeddings needs parallel.pipeline=1: embedding and output head are "
                "one weight"
            )
        if recompute.granularity == "full" and recompute.method == "uniform":
            for layers in parallel.layers(num_layers):
                if layers % recompute.num_layers:
                    raise PretrainError(
                        f"recompute.num_layers={recompute.num_layers} does not divide the {layers} "
                        "layers of a model chunk: choose a divisor, or recompute.method=block"
                    )
