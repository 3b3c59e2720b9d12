"""Trains a diffusion checkpoint (or its AR control) with transformers' Trainer, alone or under DeepSpeed.

    adapt train --config recipes/smollm2-135m/prefix.yaml
    deepspeed --num_gpus 8 recipes/train.py --config recipes/smollm2-135m/prefix.yaml --training.learning_rate 2e-4

The run is one list of packed rows (`packing.py`); a step reads the next global_batch_size of them. Its loss is divided once, by
the tokens of that whole global batch, so the curve is the same for any split over ranks and accumulation steps.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer_utils import SchedulerType, rotate_checkpoints, set_seed
from transformers.training_args import OptimizerNames

from . import lora
from .arguments import wait_for_rank_zero
from .attention import Layout
from .checkpoint import DiffusionSpec, check_model_folder, is_diffusion_checkpoint, load
from .collate import Batch, Canvases, PackedRows, collate
from .config import Recipe, TrainingConfig, parse_recipe
from .conversion import convert
from .data import lengths, load_examples, load_rows
from .metrics import MetricsFile, Progress, RunningMetrics
from .model import attach_loss
from .objective import CHUNK, diffusion_loss
from .packing import Packing
from .resume import COMPLETE, newest_checkpoint, remove_unfinished

_CAUSAL = DiffusionSpec(
    attention="prefix", mask_token_id=-1
)  # for objective.name=ar, which lays no canvas and draws no noise


class DiffusionTrainer(Trainer):
    """The Trainer with our loss, our normaliser, rows in their own order, and checkpoints that are whole or ignored."""

    def __init__(self, recipe: Recipe, canvases: Canvases, longest_canvas: int, **kwargs) -> None:
        # Compiled layers want one shape; otherwise a batch is as long as its longest row.
        fixed_length = recipe.data.seq_len if recipe.model.torch_compile else None
        super().__init__(data_collator=partial(collate, length=fixed_length), **kwargs)
        self.remove_callback(PrinterCallback)
        self.recipe, self.spec, self.longest_canvas = recipe, canvases.spec, longest_canvas
        self.weight = "uniform" if canvases.is_ar else recipe.objective.weight
        self.loss_is_scaled_for_ga = True
        self.metrics = RunningMetrics(self.args.device)

    def compute_loss(
        self, model, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ):
        # 1. What each token sees.
        layout = Layout(inputs["document_ids"], inputs["view_ids"], inputs["position_ids"], inputs["context_lengths"])
        # 2. Forward; the head on noised rows only. -log p of each noised token, [N].
        nll = model(
            input_ids=inputs["input_ids"],
            layout=layout,
            right_window=self._right_window(),
            rows=torch.cat([inputs["rows"], inputs["ar_rows"]]),
            targets=torch.cat([inputs["targets"], inputs["ar_targets"]]),
            num_chunks=self._num_chunks(),
        )
        nll, ar_nll = nll.split([len(inputs["rows"]), len(inputs["ar_rows"])])
        # 3. Sum in nats, divided once by the count over ranks and accumulation (the backward pass averages over ranks).
        loss_sum, _, metrics = diffusion_loss(nll, inputs["elbo_weight"], inputs["num_maskable"], self.weight)
        self.metrics.add(metrics, num_tokens=inputs["input_ids"].numel())
        assert num_items_in_batch is not None
        num_tokens, num_ar_tokens = num_items_in_batch
        loss = loss_sum / num_tokens + self.recipe.objective.ar_weight * ar_nll.sum() / num_ar_tokens
        return loss * self.args.world_size

    def _num_chunks(self) -> int:
        """Chunks of the head's rows: the same on all ranks, because each is a collective under ZeRO-3."""
        recipe = self.recipe
        return -(-recipe.training.micro_batch_size * recipe.data.seq_len // CHUNK)

    def _right_window(self) -> int | None:
        """Annealing, causal to bidirectional: how many tokens to its right a canvas token sees at this step; None = all."""
        steps = self.recipe.objective.anneal_steps
        if self.state.global_step >= steps:
            return None
        return self.longest_canvas * self.state.global_step // steps

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """[2]: tokens that the diffusion and the AR loss of a step are divided by, over accumulation and ranks."""
        noised = [
            b["num_maskable"] if self.weight == "elbo" else torch.tensor(len(b["targets"])) for b in batch_samples
        ]
        ar = [torch.tensor(len(batch["ar_targets"])) for batch in batch_samples]
        here = torch.stack([torch.stack([x.to(device) for x in counts]).sum() for counts in (noised, ar)])
        total = self.accelerator.reduce(here, reduction="sum")
        assert isinstance(total, Tensor)
        return total.clamp(min=1)

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        assert isinstance(rows, PackedRows)
        return torch.utils.data.SequentialSampler(rows)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        assert isinstance(self.train_dataset, PackedRows)
        # The Trainer counts the run as one epoch; what a reader wants is passes over the data.
        self.state.epoch = self.train_dataset.epochs(self.state.global_step * self.recipe.training.global_batch_size)
        if "loss" in logs:
            tokens_seen = next((line["tokens_seen"] for line in reversed(self.state.log_history) if "loss" in line), 0)
            logs = {**logs, **self.metrics.drain(self.accelerator, int(tokens_seen))}
            if self.recipe.noise.t_min > 0.01:
                del logs["nelbo"]  # with the small times left out it is no bound
        super().log(logs, start_time)

    def _get_output_dir(self, trial) -> str:
        return os.path.join(self.recipe.training.output_dir, "checkpoints")

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every rank has written its shard of the optimizer
        if self.args.should_save:
            run_dir = self._get_output_dir(trial)
            (Path(run_dir) / f"checkpoint-{self.state.global_step}" / COMPLETE).touch()
            rotate_checkpoints(output_dir=run_dir, save_total_limit=self.recipe.training.keep_checkpoints)


def train(recipe: Recipe) -> Path:
    """Runs a recipe to its end and returns the folder of the final model, which `from_pretrained` loads.

    Raises ValueError for settings that do not fit together, before weights are loaded or anything is written.
    """
    output_dir = Path(recipe.training.output_dir)
    # 1. Everything that can be refused cheaply.
    final = output_dir / "model"
    if final.exists():
        raise ValueError(
            f"training.output_dir={output_dir}: holds a finished run (model/); choose a new folder or remove it"
        )
    _check_base(recipe)
    args = _training_arguments(recipe)
    is_main = args.process_index == 0
    checkpoint = newest_checkpoint(recipe, args.world_size)
    with args.main_process_first(local=False, desc="read the data"):
        rows = load_rows(recipe.data)
    # 2. The checkpoint: converted first if it is a causal LM, and probed.
    with args.main_process_first(local=False, desc="convert"), _whole_weights(args):
        folder = _diffusion_checkpoint(recipe, output_dir, is_main)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spec = _CAUSAL if recipe.objective.name == "ar" else DiffusionSpec.of(AutoConfig.from_pretrained(folder), folder)
    if recipe.data.canvas_start == "anywhere" and spec.attention == "bidirectional":
        raise ValueError(
            "data.canvas_start=anywhere: a bidirectional checkpoint has no causal context for a canvas to hang off; "
            "set it to prompt, or convert with model.attention=prefix"
        )
    canvases = Canvases(
        spec,
        recipe.noise,
        recipe.objective,
        recipe.data.canvas_length,
        recipe.data.canvas_start,
        tokenizer.eos_token_id,
        recipe.training.seed,
        recipe.data.seq_len,
    )
    # 3. The data, as rows in the order of the run.
    with args.main_process_first(local=False, desc="tokenise"):
        examples = load_examples(recipe.data, tokenizer, rows=rows, views=canvases.views, is_main_process=is_main)
    dataset, longest_canvas = _packed_rows(recipe, canvases, examples)
    args.max_steps = len(dataset) // recipe.training.global_batch_size
    _check_schedule(recipe.training, args.max_steps)
    # 4. The loop.
    model = _prepared(folder, recipe, spec, args)
    if is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        recipe.save(output_dir / "config.yaml")
        remove_unfinished(output_dir)
        print(_summary(dataset, checkpoint, args), file=sys.stderr)
    trainer = DiffusionTrainer(
        recipe,
        canvases,
        longest_canvas,
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[MetricsFile(output_dir / "metrics.jsonl"), Progress()],
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    _save_final(trainer, folder, final)
    return final


def _packed_rows(recipe: Recipe, canvases: Canvases, examples: Dataset) -> tuple[PackedRows, int]:
    """(the rows that the run reads; tokens of the longest stretch in which attention is bidirectional)."""
    ours = recipe.training
    contexts, targets = lengths(examples, "context"), lengths(examples, "target")
    largest = int(canvases.room_needed(contexts, targets).max())
    if largest > recipe.data.seq_len:  # in any epoch: a run of days must not end at one long random tail
        raise ValueError(
            f"data.seq_len={recipe.data.seq_len}: an example may take {largest} tokens with all its views; "
            f"set data.seq_len={largest}, or lower objective.views"
        )
    packing = Packing(partial(canvases.sizes, contexts, targets), recipe.data.seq_len, ours.seed)
    num_steps = ours.num_steps or packing.num_rows(ours.num_epochs or 0) // ours.global_batch_size
    if num_steps == 0:
        raise ValueError(
            f"training.num_epochs={ours.num_epochs}: the data has {packing.num_rows(1)} packed rows an epoch, too few for one "
            f"step of training.global_batch_size={ours.global_batch_size}; lower it, or set training.num_steps"
        )
    longest_canvas = canvases.longest_canvas(contexts, targets)
    return PackedRows(examples, packing, canvases, num_steps * ours.global_batch_size), longest_canvas


def _summary(rows: PackedRows, checkpoint: Path | None, args: TrainingArguments) -> str:
    packing = rows.packing
    per_epoch = packing.num_rows(1)
    fill = packing.sizes(0).sum() / (per_epoch * packing.seq_len)
    how = f"from step {checkpoint.name.rsplit('-', 1)[1]} ({checkpoint})" if checkpoint else "from the start"
    return (
        f"{packing.num_examples:,} examples in {per_epoch:,} rows of {packing.seq_len} tokens ({fill:.0%} full); "
        f"{args.max_steps:,} steps of {len(rows) // args.max_steps} rows on {args.world_size} rank{'s' * (args.world_size > 1)}, {how}"
    )


def _training_arguments(recipe: Recipe) -> TrainingArguments:
    ours = recipe.training
    set_seed(ours.seed)
    for tracker in ours.report_to:
        importlib.import_module(tracker)
    _check_known("training.lr_scheduler", ours.lr_scheduler, [kind.value for kind in SchedulerType])
    _check_known("training.optimizer", ours.optimizer, [kind.value for kind in OptimizerNames])
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation_steps = ours.accumulation_steps(world_size)
    args = TrainingArguments(
        output_dir=ours.output_dir,
        max_steps=ours.num_steps or 1,
        per_device_train_batch_size=ours.micro_batch_size,
        gradient_accumulation_steps=accumulation_steps,
        deepspeed=_deepspeed(ours, accumulation_steps),
        learning_rate=ours.learning_rate,
        lr_scheduler_type=ours.lr_scheduler,
        lr_scheduler_kwargs=ours.lr_scheduler_options or None,
        warmup_steps=ours.warmup_steps,
        weight_decay=ours.weight_decay,
        max_grad_norm=ours.max_grad_norm,
        adam_beta2=ours.adam_beta2,
        optim=ours.optimizer,
        bf16=ours.precision == "bf16",
        seed=ours.seed,
        logging_steps=ours.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if ours.save_steps else "no",
        save_steps=ours.save_steps or 500,
        report_to=ours.report_to or "none",
        dataloader_num_workers=recipe.data.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["targets"],
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend=None if torch.cuda.is_available() or world_size == 1 else "gloo",
    )
    args._n_gpu = min(args.n_gpu, 1)  # one process drives one GPU: never transformers' nn.DataParallel over all it sees
    return args


def _check_known(setting: str, value: str, allowed: list[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{setting}={value}: choose one of {', '.join(sorted(allowed))}")


def _check_schedule(ours: TrainingConfig, num_steps: int) -> None:
    """ValueError if the schedule refuses its options, which else shows only when all weights are loaded."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=ours.learning_rate)
    try:
        transformers.get_scheduler(
            ours.lr_scheduler,
            optimizer,
            ours.warmup_steps,
            num_steps,
            scheduler_specific_kwargs=ours.lr_scheduler_options,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"training.lr_scheduler_options={ours.lr_scheduler_options}: training.lr_scheduler={ours.lr_scheduler} does not take "
            f"them, or needs others: {error}"
        ) from error


def _deepspeed(ours: TrainingConfig, accumulation_steps: int) -> dict | None:
    """The DeepSpeed config as the recipe wants it; ValueError where the JSON sets what the recipe owns to something else."""
    if ours.deepspeed is None:
        return None
    # adapt_launch is the folder launch/ beside adapt/, under the name that it is installed as.
    config = importlib.import_module("adapt_launch").check_ds_config(
        ours.deepspeed,
        {
            "train_batch_size": ("training.global_batch_size", ours.global_batch_size),
            "train_micro_batch_size_per_gpu": ("training.micro_batch_size", ours.micro_batch_size),
            "gradient_accumulation_steps": ("training.global_batch_size", accumulation_steps),
            "gradient_clipping": ("training.max_grad_norm", ours.max_grad_norm),
            "bf16.enabled": ("training.precision", ours.precision == "bf16"),
            "optimizer.params.lr": ("training.learning_rate", ours.learning_rate),
            "optimizer.params.weight_decay": ("training.weight_decay", ours.weight_decay),
        },
    )
    import deepspeed

    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    if "MASTER_PORT" not in os.environ:
        alone["MASTER_PORT"] = _free_port()
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))  # one process, started without the launcher
    # Before ZeRO-3 scatters weights: accelerate initialises torch's process group on CPU, but not DeepSpeed's view of it.
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return config


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def _whole_weights(args: TrainingArguments) -> Iterator[None]:
    """Inside, from_pretrained loads whole weights on this rank; under ZeRO-3 it would scatter them over the ranks."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed is not None:
            set_hf_deepspeed_config(args.hf_deepspeed_config)


def _check_base(recipe: Recipe) -> None:
    base = recipe.model.base
    if not base.endswith(".gguf"):
        check_model_folder(base, "model.base")
    if recipe.objective.name != "ar" or not is_diffusion_checkpoint(base):
        return
    section = json.loads((Path(base) / "config.json").read_text())["diffusion"]
    if section.get("attention") == "bidirectional":
        raise ValueError(
            f"objective.name=ar: model.base={base} is a bidirectional diffusion checkpoint, which a plain load does not run "
            f"causally; give the causal LM that it came from ({section.get('base_model')})"
        )


def _diffusion_checkpoint(recipe: Recipe, output_dir: Path, is_main: bool) -> Path:
    """The folder to train from. Rank 0 converts or probes; the others come after it and read what it left."""
    base, kernel = recipe.model.base, recipe.model.attn_implementation
    if recipe.objective.name == "ar":  # the control arm: the causal LM as it is
        return Path(base)
    if is_diffusion_checkpoint(base):
        if is_main:
            load(base, device="cpu", attn_implementation=kernel)
        return Path(base)
    converted = output_dir / "converted"
    if not converted.exists() and is_main:
        convert(
            base,
            converted,
            attention=recipe.model.attention,
            mask_token=recipe.model.mask_token,
            shift_logits=recipe.model.shift_logits,
            attn_implementation=kernel,
        )
    spec = DiffusionSpec.of(AutoConfig.from_pretrained(converted), converted)
    wanted: dict[str, tuple[str, object]] = {
        "base": ("base_model", base),
        "attention": ("attention", recipe.model.attention),
    }
    wanted["shift_logits"] = ("shift_logits", recipe.model.shift_logits)
    for setting, (name, value) in wanted.items():
        if getattr(spec, name) != value:
            raise ValueError(
                f"model.{setting}={value}: {converted} was converted earlier with {getattr(spec, name)}; remove it, or choose "
                "another training.output_dir"
            )
    return converted


def _prepared(folder: Path, recipe: Recipe, spec: DiffusionSpec, args: TrainingArguments):
    """The model with its loss attached, wrapped in adapters and compiled as the recipe says."""
    ours = recipe.model
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=ours.attn_implementation, output_loading_info=True
    )
    model, loading = loaded
    absent = sorted(loading["missing_keys"])
    if absent:
        raise ValueError(f"model.base={ours.base}: has no weights for {', '.join(absent[:3])}; it is not complete")
    model.config.use_cache = False
    # Some models ship a generation config that transformers refuses to write again; the base's file is copied at the end.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    attach_loss(model)
    if ours.gradient_checkpointing:
        # transformers 5.23 deprecates the name that 5.2 knows
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if ours.torch_compile:
        _compile_layers(model)
    if ours.lora is None:
        return model
    set_seed(recipe.training.seed)  # the same adapters, whatever drew random numbers before
    with _whole_weights(args):
        return lora.add_adapters(model, ours.lora, None if recipe.objective.name == "ar" else spec.mask_token_id)


def _compile_layers(model: PreTrainedModel) -> None:
    """Compiles each decoder layer: they share one compilation, seconds instead of the minutes of the whole model."""
    num_layers = model.config.num_hidden_layers
    lists = [m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == num_layers]
    if not lists:
        raise ValueError(
            f"model.torch_compile=true: found no list of {num_layers} decoder layers in {type(model).__name__}"
        )
    for layer in lists[0]:
        layer.compile(dynamic=False)  # rows are padded to seq_len, so there is one shape


def _save_final(trainer: DiffusionTrainer, base_folder: Path, final: Path) -> None:
    """Writes the Hugging Face folder beside and renames it; adapters are kept in adapter/ and merged into the model."""
    ours = trainer.recipe
    dtype = torch.bfloat16 if ours.training.precision == "bf16" else torch.float32
    staged, adapter = final.with_name(f".{final.name}.incomplete"), final.with_name("adapter")
    unwrapped: Any = trainer.accelerator.unwrap_model(trainer.model)
    unwrapped.config.use_cache = True
    if ours.model.lora is None and ours.training.deepspeed is None:
        unwrapped.to(dtype)  # autocast has kept it in float32; DeepSpeed has cast it already
    trainer.save_model(str(adapter if ours.model.lora else staged))  # on every rank: ZeRO-3 gathers here
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        if ours.model.lora:
            with _whole_weights(trainer.args):
                lora.merge(base_folder, adapter, staged, dtype)
            AutoTokenizer.from_pretrained(base_folder).save_pretrained(staged)
        if (base_folder / "generation_config.json").is_file():
            shutil.copyfile(base_folder / "generation_config.json", staged / "generation_config.json")
        (staged / "training_args.bin").unlink(
            missing_ok=True
        )  # a pickle of this machine's settings; config.yaml says more
        staged.rename(final)
    trainer.accelerator.wait_for_everyone()


def _quiet_libraries() -> None:
    """Leaves the console to us: one bar, and one line for what happens, on rank 0."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if int(os.environ.get("RANK", "0")) != 0:
        disable_progress_bars()
    for name in ("accelerate", "bitsandbytes", "DeepSpeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|deepspeed|accelerate|peft")


def main(argv: list[str]) -> None:
    """The `adapt train` command, and what `recipes/train.py` runs on every rank."""
    _quiet_libraries()
    try:
        final = train(parse_recipe(argv, __doc__))
    except Exception:
        wait_for_rank_zero()
        raise
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{final}", file=sys.stderr)
