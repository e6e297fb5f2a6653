"""Every setting of a run, with its meaning, default and allowed values."""

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pretrain.config.rules import In, NonEmpty, PathRule, Settings, require
from pretrain.errors import PretrainError

Size = Annotated[int, In("[1, 1048576]")]
Layers = Annotated[int, In("[1, 10000]")]
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
    """YaRN (arXiv 2309.00071): positions for longer sequences than the model has learned from.

    The names are those of ``rope_scaling`` in DeepSeek-V3's and Kimi K2's config.json.
    """

    factor: Annotated[float, In("[1, 1e6]")] = 1.0
    """How many times longer sequences become; 1: positions are as they were."""
    original_max_position_embeddings: Tokens | None = None
    """The data.seq_length that the model was pretrained with; needed where ``factor`` is above
    1."""
    beta_fast: Annotated[float, In("[1e-6, 1e6]")] = 32.0
    """Rotary channels that turn more often than this over the original length stay as they are."""
    beta_slow: Annotated[float, In("[1e-6, 1e6]")] = 1.0
    """Those that turn less often are slowed down by ``factor``; between the two, partly."""
    mscale: Annotated[float, In("[1e-6, 1000]")] = 1.0
    """Rotary queries and keys are multiplied by m(mscale) / m(mscale_all_dim), where m(x) =
    0.1 x ln(factor) + 1."""
    mscale_all_dim: Annotated[float, In("[0, 1000]")] = 1.0
    """Attention's logits are multiplied by m(mscale_all_dim) squared."""

    def _check(self) -> None:
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
            f"mscale={self.mscale}: programs differ in what that means",
        )


@dataclass(frozen=True)
class LanguageConfig(Settings):
    """The language model: multi-head latent attention and mixture of experts (Kimi K2's shape)."""

    num_layers: Layers = 4
    dense_layers: Annotated[int, In("[0, 9999]")] = 1
    """The first layers that have a dense MLP in place of experts."""
    hidden_size: Size = 128
    ffn_hidden_size: Size = 384
    """MLP width of the dense layers."""
    num_heads: Size = 4
    q_lora_rank: Size = 64
    kv_lora_rank: Size = 48
    qk_nope_head_dim: Size = 32
    qk_rope_head_dim: Annotated[int, In("[2, 1048576]")] = 16
    v_head_dim: Size = 32
    rope_base: RopeBase = 10000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    num_experts: Size = 8
    experts_per_token: Size = 2
    expert_ffn_hidden_size: Size = 128
    shared_expert_ffn_hidden_size: Size = 128
    router_scaling: Annotated[float, In("[1e-6, 1e6]")] = 2.0
    """The routed experts' normalised scores are multiplied by this (K2: 2.827)."""
    expert_bias_update_rate: Share = 1e-3
    """Step of the auxiliary-loss-free load balancing."""
    norm_eps: Annotated[float, In("[1e-12, 1]")] = 1e-5
    """RMSNorm's epsilon. The norms of MLA's latents have 1e-6 whatever this says, as in
    DeepSeek-V3's code."""
    init_std: Annotated[float, In("[1e-12, 100]")] = 0.02

    def _check(self) -> None:
        require(
            self.dense_layers < self.num_layers,
            f"dense_layers must leave a layer of experts: 0..{self.num_layers - 1}, "
            f"not {self.dense_layers}",
        )
        require(
            self.experts_per_token <= self.num_experts,
            f"experts_per_token is {self.experts_per_token} of only {self.num_experts} experts",
        )
        require(
            self.hidden_size >= self.num_heads,
            f"hidden_size={self.hidden_size} must be >= num_heads={self.num_heads}",
        )
        require(
            self.qk_rope_head_dim % 2 == 0,
            f"qk_rope_head_dim must be even, not {self.qk_rope_head_dim}",
        )


@dataclass(frozen=True)
class VisionConfig(Settings):
    """The vision encoder (MoonViT-3D; the defaults are its full size) and its projector."""

    num_layers: Layers = 27
    hidden_size: Annotated[int, In("[4, 1048576]")] = 1152
    num_heads: Annotated[int, In("[1, 262144]")] = 16
    ffn_hidden_size: Size = 4304
    patch_size: Annotated[int, In("[2, 1024]")] = 14
    """Pixels along a patch's side. Each 2x2 patches become one token of the language model."""
    position_grid: Annotated[int, In("[1, 4096]")] = 64
    """Side of the table of learned positions, interpolated to every image's grid."""
    rope_base: RopeBase = 10000.0

    def _check(self) -> None:
        require(
            self.hidden_size % (4 * self.num_heads) == 0,
            f"hidden_size={self.hidden_size} must be num_heads={self.num_heads} times a multiple "
            "of 4: half of each head turns with the row, half with the column",
        )


@dataclass(frozen=True)
class ImageConfig(Settings):
    """Images and clips of text: what is drawn, and how."""

    min_chars: Annotated[int, In("[1, 200]")] = 4
    max_chars: Annotated[int, In("[1, 200]")] = 20
    """Length of a caption, which is the text in the image."""
    min_font_size: Annotated[int, In("[4, 256]")] = 14
    max_font_size: Annotated[int, In("[4, 256]")] = 22
    """Pixels. Up to about 22 a line is one row of language-model tokens (28 pixels)."""
    large_share: Share = 0.1
    """Share of images with up to twice the largest font size."""
    wrapped_share: Share = 0.1
    """Share of images whose text is wrapped to several lines."""
    clip_share: Share = 0.1
    """Share of items that are clips of 2 to 4 frames."""

    def _check(self) -> None:
        for what in ("chars", "font_size"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            require(low <= high, f"max_{what}={high} must be >= min_{what}={low}")


@dataclass(frozen=True)
class SourceConfig(Settings):
    """One of a run's own sources of data."""

    type: Name = "text"
    """text: JSON lines and plain text (also .gz, .zst, .bz2, .xz); images: a folder of images with
    captions, or JSONL of images, videos and text that names their files; energon: a folder of
    WebDataset shards prepared for megatron-energon; standard_library: the built-in text. chat:
    JSONL of conversations, of which the assistant's replies are learned, for supervised
    finetuning; standard_library_chat: questions and answers from the built-in text."""
    path: Annotated[str, PathRule(optional=True)] = ""
    """A file, a folder (with what is below it) or a pattern such as data/*.jsonl.gz."""
    weight: Annotated[float, In("[0, 1e9]")] = 1.0
    """Its share of tokens beside the other sources of text, or the other sources of images."""
    field: Name = "text"
    """Where in a JSON object the text is; of images, the caption (`caption` is found too); of
    conversations, the list of messages (`messages` is found too)."""
    split: Literal["hash", "train", "held_out"] = "hash"
    """hash: held out by a hash of what is in a document; else the whole source is of one split."""
    trust_code: bool = False
    """For energon: run the Python code that the shards' dataset.yaml names (sample_loader,
    part_filter, classes and functions), and unpickle what is in them. It can do whatever you can:
    allow it only for shards that you made, or whose code you have read."""


@dataclass(frozen=True)
class DataConfig(Settings):
    """The data: the built-in text and drawn images, or a run's own sources."""

    seq_length: Annotated[int, In("[64, 16777216]")] = 256
    """Tokens in a packed sequence."""
    vocab_size: Annotated[int, In("[300, 16777216]")] = 1024
    """Tokens of the byte-level BPE tokenizer trained on the text, if the text has that many; with
    ``tokenizer``, that one's counts, and this is what `plan` reckons with."""
    vision_share: Annotated[float, In("[0, 0.3]")] = 0.1
    """Share of all tokens that are image placeholders."""
    max_corpus_mb: Annotated[float, In("[0.1, 1e6]")] = 8.0
    """Text used at most, in 10^6 bytes; of own sources, to train the tokenizer on."""
    cache_dir: PathName = ".cache/pretrain"
    """Where the tokenizer and the tokenized text are kept."""
    images: ImageConfig = field(default_factory=ImageConfig)
    sources: tuple[SourceConfig, ...] = ()
    """Own data, a list; without it, the standard library's text and images of lines of it."""
    tokenizer: PathName | None = None
    """A Hugging Face tokenizer.json or a tiktoken file; null: one is trained on the text."""
    held_out: Decay = 0.02
    """Share of an own source's documents that is held out."""
    max_image_tokens: Tokens | None = None
    """Larger images are shrunk to about this many tokens; null: a quarter of seq_length."""
    video_fps: Annotated[float, In("[0.001, 1000]")] = 2.0
    """Frames a second that are taken of a video file (the processor of Kimi K2.5 takes 2)."""
    max_corrupt: StepsOrZero = 100
    """Corrupt samples that are skipped, listed in the run_dir's skipped.jsonl, before the run
    ends."""

    def _check(self) -> None:
        require(
            not self.sources or any(source.weight > 0 for source in self.sources),
            "sources must have a weight above 0: all are 0",
        )


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """MuonClip, its schedule and QK-Clip."""

    lr: Positive = 2e-3
    """Peak learning rate of the matrices (Muon)."""
    adamw_lr: Positive | None = None
    """Peak learning rate of everything else (AdamW); the same as ``lr`` when null."""
    weight_decay: Annotated[float, In("[0, 1000]")] = 0.1
    momentum: Decay = 0.95
    ns_steps: Annotated[int, In("[1, 100]")] = 5
    ns_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Newton-Schulz's precision; auto: bfloat16 on accelerators, float32 on a CPU."""
    adamw_beta1: Decay = 0.9
    adamw_beta2: Decay = 0.95
    qk_clip_threshold: Positive = 100.0
    """QK-Clip's tau: no head's attention logit is let grow past it."""
    clip_grad_norm: Positive = 1.0
    warmup_steps: StepsOrZero = 50
    decay_steps: StepsOrZero = 150
    """Length of the cosine decay that ends the run; the rate is constant before it."""
    final_lr_fraction: Share = 0.1


@dataclass(frozen=True)
class ParallelConfig(Settings):
    """How the model is spread over the processes; what is left over is data parallel."""

    expert: Ranks = 1
    """Expert-parallel size: the experts are divided over this many ranks."""
    tensor: Ranks = 1
    """Tensor-parallel size, with sequence parallelism: each matrix is cut over this many ranks."""
    pipeline: Ranks = 1
    """Pipeline stages: the layers are divided over this many ranks (1F1B schedule)."""
    interleave: Ranks = 1
    """Runs of layers on each pipeline stage; above 1 the interleaved schedule."""

    def _check(self) -> None:
        require(
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
class RecomputeConfig(Settings):
    """Activations of the language model that are computed again in the backward, not kept."""

    granularity: Literal["none", "selective", "full"] = "none"
    """full: whole layers; selective: the ``modules`` of every layer. Same gradients as none."""
    method: Literal["uniform", "block"] = "uniform"
    """full: uniform keeps the input of every ``num_layers`` layers; block recomputes the first
    ``num_layers`` of each run of layers, and keeps the others' activations."""
    num_layers: Layers = 1
    """See ``method``."""
    modules: tuple[RecomputedModule, ...] = ("core_attn",)
    """selective: attention's logits and weights; dense MLPs; layers of experts, or their shared
    experts alone."""

    def _check(self) -> None:
        require(
            self.granularity != "selective" or len(self.modules) > 0,
            "modules must name what is recomputed, or granularity be none",
        )


@dataclass(frozen=True)
class EncoderProcessConfig(Settings):
    """The Decoupled Encoder Process."""

    enabled: bool = True
    """Spread the vision encoder's work over all ranks; off: the ranks whose stage takes in the
    images encode them."""
    spread: Literal["balanced", "round_robin"] = "balanced"
    """Who encodes what: by cost, as evenly as can be; or item after item, to compare with."""
    cost: Literal["counted", "measured"] = "counted"
    """Cost of an item: FLOPs counted from shapes; or measured on the first rank for a few
    seconds when the run begins, and kept in run_dir."""
    max_patches: Annotated[int, In("[1, 2147483647]")] = 16384
    """Patches that go through the encoder at a time: bounds the memory of its activations."""
    max_patches_per_rank: Annotated[int, In("[1, 2147483647]")] | None = None
    """Patches that a rank is given to encode in a step, at most: bounds the memory of their pixels.
    An image larger than that has a rank to itself. null: as many as balance asks for."""


@dataclass(frozen=True)
class CheckpointConfig(Settings):
    """Checkpoints: when to save, and how many to keep."""

    every: Steps = 100
    """Steps between checkpoints; one is always written at the end."""
    keep: Annotated[int, In("[1, 1000000]")] = 2
    """The newest checkpoints that stay."""
    asynchronous: bool = True
    """Copy to memory, and write while training goes on. An error is told after the step in which
    it is found; a kill loses the steps since the last checkpoint that was written to its end."""


@dataclass(frozen=True)
class FaultConfig(Settings):
    """Handling of bad steps and of ranks that hang."""

    non_finite: Literal["stop", "skip", "roll_back"] = "stop"
    """For a loss or gradient that is not finite. stop: end the run with a line that names it; skip:
    leave this step's update out; roll_back: restore the newest checkpoint and go on with the data
    that follows this step's."""
    spike: Literal["ignore", "stop", "skip", "roll_back"] = "ignore"
    """The same of a loss far above those before it."""
    spike_window: Annotated[int, In("[4, 100000]")] = 64
    """Number of earlier losses to compare a step's with; that many first steps are no spikes."""
    spike_deviations: Annotated[float, In("[1e-6, 1e6]")] = 10.0
    """A spike is above their median by more than so many standard deviations, estimated as 1.4826
    times the median absolute deviation (and no less than a thousandth of the median)."""
    max_in_a_row: Steps = 5
    """Steps skipped one after another, or times rolled back to one checkpoint, before the run
    stops."""
    hang_seconds: Annotated[float, In("[0, 31536000]")] = 1800.0
    """Without progress for so long, each rank writes its stacks to stderr and run_dir, and ends;
    0: never. Longer than a step, an evaluation, and reading or writing a checkpoint may take;
    preparing data is not watched."""


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """Held-out evaluation."""

    every: Steps = 200
    """Steps between evaluations of the held-out loss; there is one before and after training."""
    sequences: Annotated[int, In("[1, 1000000]")] = 64
    """Packed held-out sequences in an evaluation."""
    captions: Annotated[int, In("[2, 100000]")] = 256
    """Held-out images whose caption is scored with the right and with another's image."""
    transcriptions: Annotated[int, In("[0, 100000]")] = 8
    """Held-out images that the trained model transcribes at the end."""


@dataclass(frozen=True)
class WandbConfig(Settings):
    """Weights & Biases, beside TensorBoard."""

    enabled: bool = False
    """Needs ``pip install 'muonclip[wandb]'``."""
    mode: Literal["offline", "online"] = "offline"
    """Offline: into run_dir/wandb, to be sent by ``wandb sync``; online needs ``wandb login``."""
    project: Name = "pretrain"


@dataclass(frozen=True)
class ProfileConfig(Settings):
    """Traces of torch's profiler."""

    steps: tuple[Steps, Steps] | None = None
    """[first, last] step to record, into run_dir/traces: a file for each rank, for Perfetto."""

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
    """Everything the run writes: metrics.jsonl, tensorboard/, checkpoints/, curves.png."""
    start_from: PathName | None = None
    """The run_dir of another run: this one begins with the weights of its newest checkpoint, and
    its tokenizer; optimizer, schedule and data begin anew. Once this run has a checkpoint of its
    own, it goes on from that."""
    seed: Annotated[int, In("[0, 4294967295]")] = 0
    steps: Steps = 1000
    """Optimizer steps of the whole run."""
    global_batch_size: Tokens = 16
    """Packed sequences in a step, over all ranks."""
    micro_batch_size: Tokens = 8
    """Packed sequences in one forward and backward on one rank."""
    log_every: Steps = 10
    """Steps between progress lines, and between samples of the update's RMS; metrics.jsonl has
    every step."""
    peak_tflops: Annotated[float, In("[1e-6, 1e9]")] | None = None
    """TFLOP/s of one process that utilisation (mfu) is a share of; null: what a large matrix
    product reaches here when the run begins."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations. bfloat16 keeps float32 master weights, moments and gradients,
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
        longest = scaling.factor * (scaling.original_max_position_embeddings or 0)
        require(
            scaling.factor == 1 or self.data.seq_length <= longest,
            f"data.seq_length={self.data.seq_length} is more than language.rope_scaling's factor x "
            f"original_max_position_embeddings = {longest:g}: raise the factor",
        )
        used = self.optimizer.warmup_steps + self.optimizer.decay_steps
        require(
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
