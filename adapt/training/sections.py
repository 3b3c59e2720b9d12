"""The settings of a recipe, one frozen dataclass a section, which validates its own fields: data, noise, objective and training.

`model_section.py` holds the model's; `recipe.py` puts them together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ..noise.schedules import SCHEDULES
from ..settings.bounds import (
    Bounds,
    Minutes,
    Processes,
    Rows,
    Seed,
    Share,
    Steps,
    StepsOrNever,
    Tokens,
    Weight,
    check_settings,
    one_of,
)
from ..spec import NOISES

_WholeOption = Annotated[int, Bounds(-(10**9), 10**9)]
_Option = Annotated[float, Bounds(-1e9, 1e9)]


@dataclass(frozen=True)
class DataConfig:
    train: str | list[str]
    """json, jsonl (also .gz), parquet or txt files, or a Hub dataset id; rows of text, prompt/completion or messages"""
    eval: Share | str | list[str] | None = None
    """held-out rows, which are never trained on: files or a Hub dataset as in train, or a share of its rows, such as 0.05"""
    split: str = "train"
    """which split of a Hub dataset"""
    columns: dict[str, str] = field(default_factory=dict)
    """ours: theirs, such as {prompt: question, completion: answer}"""
    seq_len: Annotated[int, Bounds(8, 2**24)] = 512
    """tokens in a packed row, the unit of a batch"""
    canvas_length: Tokens | None = None
    """tokens; a completion is followed by end-of-text up to a random length of at most this, so that a canvas of any length
    up to it can be decoded. None = one end-of-text"""
    canvas_start: str = "prompt"
    """prompt: a canvas holds the whole target; anywhere: it is a stretch of canvas_length tokens of it, after a clean start,
    so that a text longer than a canvas can be written canvas after canvas (prefix attention)"""
    too_long: str = "error"
    """what to do with an example that does not fit into seq_len: drop or error. Plain text is cut into pieces instead"""
    num_workers: Processes = 0
    """processes that tokenise and draw noise; 0 = the training process itself"""

    def __post_init__(self) -> None:
        check_settings(self, "data")
        if not self.train:
            raise ValueError("data.train=[]: give at least one file, or a Hub dataset id")
        if self.eval == []:
            raise ValueError("data.eval=[]: give at least one file, a share of the rows, or null for none")
        one_of("data.too_long", self.too_long, ("drop", "error"))
        one_of("data.canvas_start", self.canvas_start, ("anywhere", "prompt"))
        if self.canvas_length is not None and self.canvas_length > self.seq_len:
            raise ValueError(
                f"data.canvas_length={self.canvas_length}: longer than a row of data.seq_len={self.seq_len}; lower it, or "
                "raise data.seq_len"
            )
        if self.canvas_start == "anywhere" and self.canvas_length is None:
            raise ValueError(
                "data.canvas_start=anywhere: needs data.canvas_length, the tokens of a canvas; try 8 or 16"
            )


@dataclass(frozen=True)
class NoiseConfig:
    kind: str = "absorbing"
    """absorbing: blanks are mask tokens; uniform: random tokens; hybrid: both (GIDD, arXiv:2503.04482)"""
    schedule: str = "linear"
    """alpha_t = 1 - t (linear) or cos(pi/2 t) (cosine)"""
    t_min: Share = 1e-3
    """smallest time drawn; bounds elbo_weight"""
    t_max: Annotated[float, Bounds(0, 1, low_is_open=True)] = 1.0
    """largest time drawn; with t_min a band of mask ratios (LLaDA2 trains at 0.3 to 0.8)"""
    p_uniform: Share = 0.1
    """hybrid noise: share of random tokens among noised ones at t = 1/2"""

    def __post_init__(self) -> None:
        check_settings(self, "noise")
        one_of("noise.kind", self.kind, NOISES)
        one_of("noise.schedule", self.schedule, tuple(SCHEDULES))
        if not self.t_min < self.t_max:
            raise ValueError(f"noise.t_max={self.t_max}: must lie above noise.t_min={self.t_min}, up to 1")
        if self.kind != "absorbing" and self.schedule != "linear":
            raise ValueError(
                f"noise.schedule={self.schedule}: noise.kind={self.kind} has a schedule of its own; use linear"
            )

    @property
    def covers_all_times(self) -> bool:
        """Whether the times drawn reach (almost) from 0 to 1, which a bound and complementary views need."""
        return self.t_min <= 0.01 and self.t_max >= 0.99


@dataclass(frozen=True)
class ObjectiveConfig:
    name: str = "nelbo"
    """nelbo (masked diffusion) or ar (next token: the control arm)"""
    weight: str = "elbo"
    """elbo: each noised token weighs -alpha'/(1-alpha), an upper bound on NLL; uniform: all weigh alike, less variance;
    cart: more the more clean tokens stand near it (Dream, arXiv:2508.15487)"""
    views: Annotated[int, Bounds(1, 256)] = 1
    """noisy canvases of each example and step; with prefix attention they share one clean prompt"""
    complementary: bool = False
    """views come in pairs that together noise every token exactly once (Fast-dLLM v2, LLaDA2)"""
    ar_weight: Weight = 0.0
    """weight of the next-token loss on the clean target that canvases hang off; free with block attention and clean_context
    causal; with prefix attention it needs data.canvas_start=anywhere"""
    anneal_steps: StepsOrNever = 0
    """steps over which the right window of the canvas opens from causal to bidirectional; 0 = bidirectional at once"""
    block_sizes: dict[StepsOrNever, Tokens] = field(default_factory=dict)
    """curriculum of block attention, step: block size from there on, such as {0: 1, 200: 4, 600: 32}; the last must be
    model.block_size (warm-up, stable, decay: LLaDA2.0). Empty = model.block_size throughout"""
    distill_weight: Weight = 0.0
    """weight of KL(original || adapted) at the noised tokens, against the frozen original's next-token distribution there; with
    LoRA the original is the same weights with the adapter off"""

    def __post_init__(self) -> None:
        check_settings(self, "objective")
        one_of("objective.name", self.name, ("ar", "nelbo"))
        one_of("objective.weight", self.weight, ("cart", "elbo", "uniform"))
        if self.block_sizes and 0 not in self.block_sizes:
            raise ValueError(
                f"objective.block_sizes={self.block_sizes}: maps steps to block sizes, and must say the one of step 0, such as "
                "{0: 1, 200: 4, 600: 32}"
            )
        if self.complementary and self.views % 2:
            raise ValueError(f"objective.views={self.views}: complementary views come in pairs; use an even number")


@dataclass(frozen=True)
class TrainingConfig:
    output_dir: str
    """holds config.yaml, metrics.jsonl, checkpoints/ and, at the end, model/"""
    num_steps: Steps | None = None
    """optimizer steps; None = what num_epochs needs"""
    num_epochs: Annotated[float, Bounds(0, 1e6, low_is_open=True)] | None = None
    """passes over the data; give this or num_steps"""
    max_minutes: Minutes | None = None
    """minutes of training, over all restarts, after which the run ends at the latest, its learning rate decayed; None = all
    steps"""
    global_batch_size: Rows = 8
    """packed rows in an optimizer step, over all ranks and accumulation"""
    micro_batch_size: Rows = 8
    """packed rows in one forward of one rank; accumulation follows from the world size"""
    learning_rate: Annotated[float, Bounds(0, 10, low_is_open=True)] = 1e-4
    """peak"""
    lr_scheduler: str = "cosine"
    """a name that transformers knows: constant_with_warmup, cosine, linear, warmup_stable_decay ..."""
    lr_scheduler_options: dict[str, _WholeOption | _Option | str] = field(default_factory=dict)
    """arguments of that schedule, such as {min_lr_rate: 0.1} for cosine_with_min_lr"""
    warmup_steps: StepsOrNever = 0
    """steps"""
    weight_decay: Annotated[float, Bounds(0, 10)] = 0.01
    max_grad_norm: Weight = 1.0
    """clip; 0 = never"""
    adam_beta2: Annotated[float, Bounds(0, 1, high_is_open=True)] = 0.999
    optimizer: str = "adamw_torch_fused"
    """a name that transformers knows, such as adamw_torch_fused or adamw_8bit"""
    precision: str = "auto"
    """bf16, fp32 or auto: bf16 where the machine computes it natively, else fp32. Under DeepSpeed bf16 keeps fp32 master
    weights, without it bf16 is autocast"""
    seed: Seed = 0
    """keys the data order and the noise"""
    logging_steps: Steps = 1
    """steps"""
    eval_steps: Steps | None = None
    """steps between scores of data.eval, each at the next log; None = a tenth of the run"""
    sample_steps: StepsOrNever = 0
    """steps between samples decoded from the model as it is, shown beside the last one and kept in samples.jsonl; 0 = never"""
    sample_prompt: str | None = None
    """what a sample continues, as it is; None = the context of the first training example"""
    save_minutes: Annotated[float, Bounds(0, 1e7)] | None = 10.0
    """minutes of training between checkpoints, where save_steps does not say; None or 0 = none: the run cannot resume, but the
    final model is written"""
    save_steps: StepsOrNever | None = None
    """steps between checkpoints, 0 = none; None = by time, save_minutes"""
    keep_checkpoints: Annotated[int, Bounds(1, 10**6)] = 2
    """older ones are deleted"""
    resume: bool = True
    """continue from the newest complete checkpoint in output_dir, if there is one"""
    on_bad_loss: str = "stop"
    """what to do when a step's loss or gradient is not finite, or explodes: stop, naming its examples, or skip its update and
    count it; either way it never reaches the weights"""
    max_loss_ratio: Annotated[float, Bounds(1, 1e9, low_is_open=True)] | None = None
    """a loss above this many medians of the last 64 logged ones has exploded; None = never"""
    report_to: list[str] = field(default_factory=list)
    """any of tensorboard, trackio, wandb; metrics.jsonl is written always"""
    deepspeed: str | None = None
    """a JSON file, or the name of one that ships: zero0, zero1, zero2, zero3, zero2_offload, zero3_nvme, zero3_offload. None = plain"""
    nvme_path: str | None = None
    """a folder on a local disk, for deepspeed=zero3_nvme: weights and optimizer live there and not in memory"""

    def __post_init__(self) -> None:
        check_settings(self, "training")
        one_of("training.precision", self.precision, ("auto", "bf16", "fp32"))
        one_of("training.on_bad_loss", self.on_bad_loss, ("skip", "stop"))
        for tracker in self.report_to:
            one_of("training.report_to", tracker, ("tensorboard", "trackio", "wandb"))
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError(
                f"training.num_steps={self.num_steps} and training.num_epochs={self.num_epochs}: give exactly one of them"
            )

    @property
    def minutes_between_checkpoints(self) -> float | None:
        """None where steps say when, or nothing is to be saved."""
        return self.save_minutes if self.save_steps is None else None

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of one rank in an optimizer step; ValueError if the sizes do not divide."""
        per_pass = self.micro_batch_size * world_size
        if self.global_batch_size % per_pass:
            raise ValueError(
                f"training.global_batch_size={self.global_batch_size}: must be a multiple of training.micro_batch_size="
                f"{self.micro_batch_size} x {world_size} ranks = {per_pass}; try {-(-self.global_batch_size // per_pass) * per_pass}"
            )
        return self.global_batch_size // per_pass
