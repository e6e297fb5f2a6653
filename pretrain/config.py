"""The configuration of a run: typed, validated, read from YAML plus dotted overrides.

Every setting is a field of one of the dataclasses below, with its meaning and default. A file
only says what differs; ``key.sub=value`` on the command line differs from the file.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from pretrain.errors import PretrainError

T = TypeVar("T")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_positive(options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        _require(value > 0, f"{name} must be > 0, not {value}")


@dataclass(frozen=True)
class RopeScalingConfig:
    """YaRN (arXiv 2309.00071): positions for longer sequences than the model has learned from.

    The names are those of ``rope_scaling`` in DeepSeek-V3's and Kimi K2's config.json.
    """

    factor: float = 1.0
    """How many times longer sequences become; 1: positions are as they were."""
    original_max_position_embeddings: int | None = None
    """The data.seq_length that the model was pretrained with; needed where ``factor`` is above
    1."""
    beta_fast: float = 32.0
    """Rotary channels that turn more often than this over the original length stay as they are."""
    beta_slow: float = 1.0
    """Those that turn less often are slowed down by ``factor``; between the two, partly."""
    mscale: float = 1.0
    """Rotary queries and keys are multiplied by m(mscale) / m(mscale_all_dim), where m(x) =
    0.1 x ln(factor) + 1."""
    mscale_all_dim: float = 1.0
    """Attention's logits are multiplied by m(mscale_all_dim) squared."""

    def __post_init__(self) -> None:
        original = self.original_max_position_embeddings
        _require(1 <= self.factor < float("inf"), f"factor must be >= 1, not {self.factor}")
        _require(
            self.factor == 1 or original is not None,
            f"original_max_position_embeddings must be given with factor={self.factor}: the "
            "data.seq_length that the model was pretrained with",
        )
        _require(
            original is None or original > 0,
            f"original_max_position_embeddings must be > 0 or null, not {original}",
        )
        _require_positive(self, "beta_slow", "mscale")
        _require(
            self.beta_fast >= self.beta_slow,
            f"beta_fast={self.beta_fast} must be >= beta_slow={self.beta_slow}",
        )
        _require(
            self.mscale_all_dim > 0 or (self.mscale_all_dim == 0 and self.mscale == 1),
            f"mscale_all_dim must be > 0, or 0 beside mscale=1, not {self.mscale_all_dim} beside "
            f"mscale={self.mscale}: programs differ in what that means",
        )


@dataclass(frozen=True)
class LanguageConfig:
    """The language model: multi-head latent attention and mixture of experts (Kimi K2's shape)."""

    num_layers: int = 4
    dense_layers: int = 1
    """The first layers that have a dense MLP in place of experts."""
    hidden_size: int = 128
    ffn_hidden_size: int = 384
    """MLP width of the dense layers."""
    num_heads: int = 4
    q_lora_rank: int = 64
    kv_lora_rank: int = 48
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    rope_base: float = 10000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    num_experts: int = 8
    experts_per_token: int = 2
    expert_ffn_hidden_size: int = 128
    shared_expert_ffn_hidden_size: int = 128
    router_scaling: float = 2.0
    """The routed experts' normalised scores are multiplied by this (K2: 2.827)."""
    expert_bias_update_rate: float = 1e-3
    """Step of the auxiliary-loss-free load balancing."""
    norm_eps: float = 1e-5
    """RMSNorm's epsilon. The norms of MLA's latents have 1e-6 whatever this says, as in
    DeepSeek-V3's code."""
    init_std: float = 0.02

    def __post_init__(self) -> None:
        _require_positive(
            self,
            *("num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "q_lora_rank"),
            *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_base"),
            *("num_experts", "experts_per_token", "expert_ffn_hidden_size"),
            *("shared_expert_ffn_hidden_size", "router_scaling", "norm_eps", "init_std"),
        )
        _require(
            0 <= self.dense_layers < self.num_layers,
            f"dense_layers must leave a layer of experts: 0..{self.num_layers - 1}, "
            f"not {self.dense_layers}",
        )
        _require(
            self.experts_per_token <= self.num_experts,
            f"experts_per_token is {self.experts_per_token} of only {self.num_experts} experts",
        )
        _require(
            self.qk_rope_head_dim % 2 == 0,
            f"qk_rope_head_dim must be even, not {self.qk_rope_head_dim}",
        )


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder (MoonViT-3D; the defaults are its full size) and its projector."""

    num_layers: int = 27
    hidden_size: int = 1152
    num_heads: int = 16
    ffn_hidden_size: int = 4304
    patch_size: int = 14
    """Pixels along a patch's side. Each 2x2 patches become one token of the language model."""
    position_grid: int = 64
    """Side of the table of learned positions, interpolated to every image's grid."""
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        _require_positive(
            self,
            *("num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "patch_size"),
            *("position_grid", "rope_base"),
        )
        _require(
            self.hidden_size % (4 * self.num_heads) == 0,
            f"hidden_size={self.hidden_size} must be num_heads={self.num_heads} times a multiple "
            "of 4: half of each head turns with the row, half with the column",
        )


@dataclass(frozen=True)
class ImageConfig:
    """Images and clips of text: what is drawn, and how."""

    min_chars: int = 4
    max_chars: int = 20
    """Length of a caption, which is the text in the image."""
    min_font_size: int = 14
    max_font_size: int = 22
    """Pixels. Up to about 22 a line is one row of language-model tokens (28 pixels)."""
    large_share: float = 0.1
    """Share of images with up to twice the largest font size."""
    wrapped_share: float = 0.1
    """Share of images whose text is wrapped to several lines."""
    clip_share: float = 0.1
    """Share of items that are clips of 2 to 4 frames."""

    def __post_init__(self) -> None:
        _require_positive(self, "min_chars", "min_font_size")
        _require(self.max_chars >= self.min_chars, "max_chars must be >= min_chars")
        _require(self.max_font_size >= self.min_font_size, "max_font_size must be >= min_font_size")
        for name in ("large_share", "wrapped_share", "clip_share"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name} must be in [0, 1], not {value}")


@dataclass(frozen=True)
class SourceConfig:
    """One of a run's own sources of data."""

    type: Literal[
        "text", "chat", "images", "energon", "standard_library", "standard_library_chat"
    ] = "text"
    """text: JSONL (also .gz, .zst) and plain text files; images: a folder of images with captions,
    or JSONL of images, videos and text that names their files; energon: a folder of WebDataset
    shards prepared for megatron-energon; standard_library: the built-in text. chat: JSONL of
    conversations, of which the assistant's replies are learnt, for supervised finetuning;
    standard_library_chat: questions and answers from the built-in text."""
    path: str = ""
    """A file, a folder (with what is below it) or a pattern such as data/*.jsonl.gz."""
    weight: float = 1.0
    """Its share of tokens beside the other sources of text, or the other sources of images."""
    field: str = "text"
    """Where in a JSON object the text is; of images, the caption (`caption` is found too); of
    conversations, the list of messages (`messages` is found too)."""
    split: Literal["hash", "train", "held_out"] = "hash"
    """hash: held out by a hash of what is in a document; else the whole source is of one split."""

    @property
    def is_chat(self) -> bool:
        return self.type in ("chat", "standard_library_chat")

    @property
    def has_images(self) -> bool:
        """Whether its documents are of the kind that may have images."""
        return self.type in ("images", "energon")

    def __post_init__(self) -> None:
        _require(0 <= self.weight < float("inf"), f"weight must be >= 0, not {self.weight}")
        built_in = self.type in ("standard_library", "standard_library_chat")
        _require(
            bool(self.path) != built_in,
            f"path must be given for a source of {self.type}"
            if not self.path
            else "path must be left out for the standard library",
        )


@dataclass(frozen=True)
class DataConfig:
    """The data: the built-in text and drawn images, or a run's own sources."""

    seq_length: int = 256
    """Tokens in a packed sequence."""
    vocab_size: int = 1024
    """Of the byte-level BPE tokenizer trained on the text, as far as the text has so many; with
    ``tokenizer``, that one's counts, and this is what `plan` reckons with."""
    vision_share: float = 0.1
    """Share of all tokens that are image placeholders."""
    max_corpus_mb: float = 8.0
    """Text used at most, in 10^6 bytes; of own sources, to train the tokenizer on."""
    cache_dir: str = ".cache/pretrain"
    """Where the tokenizer and the tokenized text are kept."""
    images: ImageConfig = field(default_factory=ImageConfig)
    sources: tuple[SourceConfig, ...] = ()
    """Own data, a list; without it, the standard library's text and images of lines of it."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer.json or a tiktoken file; null: one is trained on the text."""
    held_out: float = 0.02
    """Share of an own source's documents that is held out."""
    max_image_tokens: int | None = None
    """Larger images are shrunk to about this many tokens; null: a quarter of seq_length."""
    video_fps: float = 2.0
    """Frames a second that are taken of a video file (the processor of Kimi K2.5 takes 2)."""
    max_corrupt: int = 100
    """Corrupt samples that are skipped, listed in the run_dir's skipped.jsonl, before the run
    ends."""

    def __post_init__(self) -> None:
        _require(self.seq_length >= 64, f"seq_length must be >= 64, not {self.seq_length}")
        _require(
            self.vocab_size >= 300,
            f"vocab_size must be >= 300 (256 bytes, special tokens, merges), not {self.vocab_size}",
        )
        _require(
            0 <= self.vision_share <= 0.3,
            f"vision_share must be in [0, 0.3] (captions need more room than images), "
            f"not {self.vision_share}",
        )
        _require_positive(self, "max_corpus_mb")
        if self.max_image_tokens is not None:
            _require_positive(self, "max_image_tokens")
        _require(0 < self.video_fps < float("inf"), f"video_fps must be > 0, not {self.video_fps}")
        _require(0 <= self.held_out < 1, f"held_out must be in [0, 1), not {self.held_out}")
        _require(self.max_corrupt >= 0, f"max_corrupt must be >= 0, not {self.max_corrupt}")
        _require(
            not self.sources or any(source.weight > 0 for source in self.sources),
            "sources must have a weight above 0: all are 0",
        )

    @property
    def image_share(self) -> float:
        """``vision_share``, or 0 where no source can have an image."""
        without = self.sources and not any(source.has_images for source in self.sources)
        return 0.0 if without else self.vision_share


@dataclass(frozen=True)
class OptimizerConfig:
    """MuonClip, its schedule and QK-Clip."""

    lr: float = 2e-3
    """Peak learning rate of the matrices (Muon)."""
    adamw_lr: float | None = None
    """Peak learning rate of everything else (AdamW); the same as ``lr`` when null."""
    weight_decay: float = 0.1
    momentum: float = 0.95
    ns_steps: int = 5
    ns_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Newton-Schulz's precision; auto: bfloat16 on accelerators, float32 on a CPU."""
    adamw_beta1: float = 0.9
    adamw_beta2: float = 0.95
    qk_clip_threshold: float = 100.0
    """QK-Clip's tau: no head's attention logit is let grow past it."""
    clip_grad_norm: float = 1.0
    warmup_steps: int = 50
    decay_steps: int = 150
    """Length of the cosine decay that ends the run; the rate is constant before it."""
    final_lr_fraction: float = 0.1

    def __post_init__(self) -> None:
        _require_positive(self, "lr", "ns_steps", "qk_clip_threshold", "clip_grad_norm")
        _require(self.adamw_lr is None or self.adamw_lr > 0, "adamw_lr must be > 0 or null")
        for name in ("weight_decay", "warmup_steps", "decay_steps"):
            _require(getattr(self, name) >= 0, f"{name} must be >= 0, not {getattr(self, name)}")
        for name in ("momentum", "adamw_beta1", "adamw_beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} must be in [0, 1), not {value}")
        _require(
            0 <= self.final_lr_fraction <= 1,
            f"final_lr_fraction must be in [0, 1], not {self.final_lr_fraction}",
        )


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread over the processes; what is left over is data parallel."""

    expert: int = 1
    """Expert-parallel size: the experts are divided over this many ranks."""
    tensor: int = 1
    """Tensor-parallel size, with sequence parallelism: each matrix is cut over this many ranks."""
    pipeline: int = 1
    """Pipeline stages: the layers are divided over this many ranks (1F1B schedule)."""
    interleave: int = 1
    """Runs of layers on each pipeline stage; above 1 the interleaved schedule."""

    def __post_init__(self) -> None:
        _require_positive(self, "expert", "tensor", "pipeline", "interleave")
        _require(
            self.interleave == 1 or self.pipeline > 1,
            f"interleave={self.interleave} needs pipeline stages: set pipeline above 1",
        )

    @property
    def expert_tensor(self) -> int:
        """Over how many ranks each expert is cut.

        Experts are small: where expert parallelism divides them they stay whole, and the ranks of
        a tensor-parallel group hold different ones.
        """
        return self.tensor if self.expert == 1 else 1

    def layers(self, num_layers: int) -> list[int]:
        """How many of the model's layers each run of layers has, in the model's order.

        As even as can be. What is left over goes to later runs, since earlier stages keep more
        micro-batches; but last of all to the last one, which has the output head.
        """
        runs = self.pipeline * self.interleave
        counts = [num_layers // runs] * runs
        for run in [*range(runs - 2, -1, -1), runs - 1][: num_layers % runs]:
            counts[run] += 1
        return counts


RecomputedModule = Literal["core_attn", "mlp", "moe", "shared_experts"]


@dataclass(frozen=True)
class RecomputeConfig:
    """Activations of the language model that are computed again in the backward, not kept."""

    granularity: Literal["none", "selective", "full"] = "none"
    """full: whole layers; selective: the ``modules`` of every layer. Same gradients as none."""
    method: Literal["uniform", "block"] = "uniform"
    """full: uniform keeps the input of every ``num_layers`` layers; block recomputes the first
    ``num_layers`` of each run of layers, and keeps the others' activations."""
    num_layers: int = 1
    """See ``method``."""
    modules: tuple[RecomputedModule, ...] = ("core_attn",)
    """selective: attention's logits and weights; dense MLPs; layers of experts, or their shared
    experts alone."""

    def __post_init__(self) -> None:
        _require_positive(self, "num_layers")
        _require(
            self.granularity != "selective" or len(self.modules) > 0,
            "modules must name what is recomputed, or granularity be none",
        )


@dataclass(frozen=True)
class EncoderProcessConfig:
    """The Decoupled Encoder Process."""

    enabled: bool = True
    """Spread the vision encoder's work over all ranks; off: the ranks whose stage takes in the
    images encode them."""
    spread: Literal["balanced", "round_robin"] = "balanced"
    """Who encodes what: by cost, as evenly as can be; or item after item, to compare with."""
    cost: Literal["counted", "measured"] = "counted"
    """What an item costs: FLOPs counted from shapes; or measured on the first rank for a few
    seconds when the run begins, and kept in run_dir."""
    max_patches: int = 16384
    """Patches that go through the encoder at a time: bounds the memory of its activations."""
    max_patches_per_rank: int | None = None
    """Patches that a rank is given to encode in a step, at most: bounds the memory of their pixels.
    An image larger than that has a rank to itself. null: as many as balance asks for."""

    def __post_init__(self) -> None:
        _require_positive(self, "max_patches")
        most = self.max_patches_per_rank
        _require(most is None or most > 0, f"max_patches_per_rank must be > 0 or null, not {most}")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and when."""

    every: int = 100
    """Steps between checkpoints; one is always written at the end."""
    keep: int = 2
    """The newest checkpoints that stay."""
    asynchronous: bool = True
    """Copy to memory, and write while training goes on. An error is told after the step in which
    it is found; a kill loses the steps since the last checkpoint that was written to its end."""

    def __post_init__(self) -> None:
        _require_positive(self, "every", "keep")


@dataclass(frozen=True)
class FaultConfig:
    """What is done about a bad step, and about ranks that hang."""

    non_finite: Literal["stop", "skip", "roll_back"] = "stop"
    """Of a loss or gradient that is not finite. stop: end the run with a line that names it; skip:
    leave this step's update out; roll_back: restore the newest checkpoint and go on with the data
    that follows this step's."""
    spike: Literal["ignore", "stop", "skip", "roll_back"] = "ignore"
    """The same of a loss far above those before it."""
    spike_window: int = 64
    """Losses that a step's is compared with; the first so many steps are no spikes."""
    spike_deviations: float = 10.0
    """A spike is above their median by more than so many standard deviations, estimated as 1.4826
    times the median absolute deviation (and no less than a thousandth of the median)."""
    max_in_a_row: int = 5
    """Steps skipped one after another, or times rolled back to one checkpoint, before the run
    stops."""
    hang_seconds: float = 1800.0
    """Without progress for so long, each rank writes its stacks to stderr and run_dir, and ends;
    0: never. Longer than a step, an evaluation, and reading or writing a checkpoint may take;
    preparing data is not watched."""

    def __post_init__(self) -> None:
        _require_positive(self, "spike_deviations", "max_in_a_row")
        _require(self.spike_window >= 4, f"spike_window must be >= 4, not {self.spike_window}")
        _require(self.hang_seconds >= 0, f"hang_seconds must be >= 0, not {self.hang_seconds}")


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation."""

    every: int = 200
    """Steps between evaluations of the held-out loss; there is one before and after training."""
    sequences: int = 64
    """Packed held-out sequences in an evaluation."""
    captions: int = 256
    """Held-out images whose caption is scored with the right and with another's image."""
    transcriptions: int = 8
    """Held-out images that the trained model transcribes at the end."""

    def __post_init__(self) -> None:
        _require_positive(self, "every", "sequences")
        _require(self.captions >= 2, f"captions must be >= 2 to swap images, not {self.captions}")
        _require(self.transcriptions >= 0, "transcriptions must be >= 0")


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, beside TensorBoard."""

    enabled: bool = False
    """Needs ``pip install 'muonclip[wandb]'``."""
    mode: Literal["offline", "online"] = "offline"
    """Offline: into run_dir/wandb, to be sent by ``wandb sync``; online needs ``wandb login``."""
    project: str = "pretrain"


@dataclass(frozen=True)
class ProfileConfig:
    """Traces of torch's profiler."""

    steps: tuple[int, int] | None = None
    """[first, last] step to record, into run_dir/traces: a file for each rank, for Perfetto."""

    def __post_init__(self) -> None:
        if self.steps is not None:
            first, last = self.steps
            _require(
                1 <= first <= last,
                f"steps must be [first, last], 1 <= first <= last, not {[first, last]}",
            )


@dataclass(frozen=True)
class Config:
    """A run."""

    run_dir: str = "runs/default"
    """Everything the run writes: metrics.jsonl, tensorboard/, checkpoints/, curves.png."""
    start_from: str | None = None
    """The run_dir of another run: this one begins with the weights of its newest checkpoint, and
    its tokenizer; optimizer, schedule and data begin anew. Once this run has a checkpoint of its
    own, it goes on from that."""
    seed: int = 0
    steps: int = 1000
    """Optimizer steps of the whole run."""
    global_batch_size: int = 16
    """Packed sequences in a step, over all ranks."""
    micro_batch_size: int = 8
    """Packed sequences in one forward and backward on one rank."""
    log_every: int = 10
    """Steps between progress lines, and between samples of the update's RMS; metrics.jsonl has
    every step."""
    peak_tflops: float | None = None
    """TFLOP/s of one process that utilisation (mfu) is a share of; null: what a large matrix
    product reaches here when the run begins."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations. bfloat16 keeps float32 master weights, moments and gradients,
    and computes router, softmax, loss and norms in float32."""
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

    def __post_init__(self) -> None:
        _require_positive(self, "steps", "global_batch_size", "micro_batch_size", "log_every")
        _require(
            self.start_from is None or Path(self.start_from) != Path(self.run_dir),
            f"start_from={self.start_from} is the run_dir itself: choose another run_dir",
        )
        _require(
            self.peak_tflops is None or self.peak_tflops > 0, "peak_tflops must be > 0 or null"
        )
        _require(
            self.profile.steps is None or self.profile.steps[1] <= self.steps,
            f"profile.steps ends after steps = {self.steps}",
        )
        scaling = self.language.rope_scaling
        longest = scaling.factor * (scaling.original_max_position_embeddings or 0)
        _require(
            scaling.factor == 1 or self.data.seq_length <= longest,
            f"data.seq_length={self.data.seq_length} is more than language.rope_scaling's factor x "
            f"original_max_position_embeddings = {longest:g}: raise the factor",
        )
        used = self.optimizer.warmup_steps + self.optimizer.decay_steps
        _require(
            used <= self.steps,
            f"optimizer.warmup_steps + optimizer.decay_steps = {used} is more than steps = "
            f"{self.steps}: shorten them or train for longer",
        )

    def check_world_size(self, world_size: int) -> None:
        """Refuse a number of processes that the configuration does not fit.

        Raises:
            PretrainError: which of the settings does not divide, and the way out.
        """
        parallel, language = self.parallel, self.language
        other_tokenizer = self.data.tokenizer or self.start_from
        for size, setting, whole in (
            ("expert", "language.num_experts", language.num_experts),
            ("tensor", "language.num_heads", language.num_heads),
            ("tensor", "data.seq_length", self.data.seq_length),
            # Another tokenizer's vocabulary is known, and checked, once it is read.
            ("tensor", "data.vocab_size", 0 if other_tokenizer else self.data.vocab_size),
            ("tensor", "language.ffn_hidden_size", language.ffn_hidden_size),
            ("expert_tensor", "language.expert_ffn_hidden_size", language.expert_ffn_hidden_size),
            (
                "tensor",
                "language.shared_expert_ffn_hidden_size",
                language.shared_expert_ffn_hidden_size,
            ),
        ):
            if whole % getattr(parallel, size):
                raise PretrainError(
                    f"parallel.{size.removeprefix('expert_') if size != 'expert' else size}="
                    f"{getattr(parallel, size)} does not divide {setting}="
                    f"{whole}: choose a divisor"
                )
        if language.num_layers < parallel.pipeline * parallel.interleave:
            raise PretrainError(
                f"parallel.pipeline={parallel.pipeline} x parallel.interleave="
                f"{parallel.interleave} is more than language.num_layers={language.num_layers}: "
                "each run of layers needs one"
            )
        recompute = self.recompute
        if recompute.granularity == "full" and recompute.method == "uniform":
            for layers in parallel.layers(language.num_layers):
                if layers % recompute.num_layers:
                    raise PretrainError(
                        f"recompute.num_layers={recompute.num_layers} does not divide the {layers} "
                        "layers of a pipeline stage's run: choose a divisor, or "
                        "recompute.method=block"
                    )
        for name, ranks in (
            ("parallel.expert", parallel.expert),
            ("parallel.tensor", parallel.tensor),
            ("parallel.pipeline", parallel.pipeline),
            ("parallel.tensor x parallel.pipeline", parallel.tensor * parallel.pipeline),
            ("parallel.expert x parallel.pipeline", parallel.expert * parallel.pipeline),
        ):
            if world_size % ranks:
                raise PretrainError(
                    f"{world_size} processes cannot be divided by {name}={ranks}: start "
                    f"torchrun with --nproc-per-node {ranks} (or a multiple), or set {name}"
                )
        replicas = world_size // (parallel.tensor * parallel.pipeline)
        if self.global_batch_size % (replicas * self.micro_batch_size):
            raise PretrainError(
                f"global_batch_size={self.global_batch_size} is no multiple of {replicas} "
                f"data-parallel ranks x micro_batch_size={self.micro_batch_size}: "
                "change one of them"
            )
        micro_batches = self.global_batch_size // (replicas * self.micro_batch_size)
        if parallel.interleave > 1 and micro_batches % parallel.pipeline:
            raise PretrainError(
                f"the interleaved schedule needs a multiple of parallel.pipeline="
                f"{parallel.pipeline} micro-batches on each rank, not {micro_batches}: change "
                "global_batch_size or micro_batch_size"
            )


def _type_name(expected: Any) -> str:
    if typing.get_origin(expected) is Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(expected))
    if isinstance(expected, types.UnionType):
        return " or ".join(_type_name(part) for part in typing.get_args(expected))
    if expected is types.NoneType:
        return "null"
    return str(expected) if typing.get_args(expected) else str(expected.__name__)


def _convert(value: Any, expected: Any, key: str) -> Any:
    """Return ``value`` as ``expected``, or raise naming ``key``; never a lossy conversion."""
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        return _build(expected, value, key)
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if isinstance(expected, types.UnionType):
        for part in args:
            try:
                return _convert(value, part, key)
            except PretrainError:
                continue
    elif origin is Literal:
        if value in args:
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        if args[-1] is Ellipsis:
            return tuple(_convert(v, args[0], f"{key}[{i}]") for i, v in enumerate(value))
        if len(args) == len(value):
            return tuple(_convert(item, arg, key) for item, arg in zip(value, args, strict=True))
    elif expected is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif expected is float and isinstance(value, str):
        # YAML 1.1 reads 2e-3 (no point) as text.
        try:
            return float(value)
        except ValueError:
            pass
    elif type(value) is expected:
        return value
    elif expected is types.NoneType and value is None:
        return None
    raise PretrainError(f"{key} must be {_type_name(expected)}, not {value!r}")


def _build(cls: type[T], values: Any, prefix: str) -> T:
    if not isinstance(values, dict):
        raise PretrainError(f"{prefix or 'the configuration'} must be a mapping, not {values!r}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if name not in hints:
            near = difflib.get_close_matches(str(name), list(hints), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "known keys: " + ", ".join(hints)
            raise PretrainError(f"unknown configuration key {key!r}: {hint}")
        arguments[name] = _convert(value, hints[name], key)
    try:
        return cls(**arguments)
    except ValueError as error:
        raise PretrainError(f"{prefix}.{error}" if prefix else str(error)) from error


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise PretrainError(f"cannot read the override {override!r}: write key=value")
    *parents, name = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise PretrainError(f"the override {override!r} goes into {parent!r}, which is a value")
    try:
        values[name] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PretrainError(f"cannot read the value of the override {override!r}") from error


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file and apply ``key.sub=value`` overrides.

    Raises:
        PretrainError: the file cannot be read, a key is unknown, or a value has the wrong type
            or lies outside its range; the message names the key.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise PretrainError(f"cannot read the configuration {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        line = str(error).replace("\n", " ")
        raise PretrainError(f"the configuration {path} is not valid YAML: {line}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise PretrainError(f"the configuration {path} must be a mapping of keys to values")
    return from_dict(values, overrides)


def from_dict(values: dict[str, Any], overrides: typing.Sequence[str] = ()) -> Config:
    """A configuration from plain values, such as a checkpoint keeps, and overrides.

    Raises:
        PretrainError: as :func:`load`.
    """
    for override in overrides:
        _override(values, override)
    return _build(Config, values, "")


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values, every default included."""
    return dataclasses.asdict(config)


def describe() -> str:
    """Every setting with its type, default and meaning, a line each."""
    return "\n".join(_describe(Config, ""))


def _describe(cls: type[Any], prefix: str) -> typing.Iterator[str]:
    meanings = _field_docstrings(cls)
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _describe(hints[item.name], f"{prefix}{item.name}.")
        else:
            meaning = " ".join(meanings.get(item.name, "").split())
            yield f"{prefix}{item.name}={item.default!r}  {meaning}".rstrip()
            for part in typing.get_args(hints[item.name])[:1]:  # a list of such
                if dataclasses.is_dataclass(part) and isinstance(part, type):
                    yield from _describe(part, f"{prefix}{item.name}[].")


def _field_docstrings(cls: type[Any]) -> dict[str, str]:
    """The string under each field of a dataclass, which Python itself forgets."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        target.target.id: note.value.value
        for target, note in itertools.pairwise(body.body)
        if isinstance(target, ast.AnnAssign)
        and isinstance(target.target, ast.Name)
        and isinstance(note, ast.Expr)
        and isinstance(note.value, ast.Constant)
        and isinstance(note.value.value, str)
    }
