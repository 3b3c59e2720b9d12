"""Trains a diffusion checkpoint (or its AR control) with transformers' Trainer, alone or under DeepSpeed.

    adapt train --config recipes/stories260k/prefix.yaml
    deepspeed --num_gpus 8 recipes/train.py --config recipes/smollm2-135m/prefix.yaml --training.learning_rate 2e-4

The run is one list of packed rows (`packing.py`); a step reads the next global_batch_size of them. Its loss is divided once, by
the tokens of that whole global batch, so the curve is the same for any split over ranks and accumulation steps.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints, set_seed

from .attention import Layout
from .checkpoint import DiffusionSpec, is_diffusion_checkpoint, load
from .collate import Batch, Canvases, PackedRows, collate
from .config import LoraConfig, Recipe, parse_recipe
from .conversion import convert
from .data import load_examples
from .metrics import MetricsFile, RunningMetrics
from .model import attach_loss
from .objective import diffusion_loss
from .packing import Packing

COMPLETE = "COMPLETE"  # written last into a checkpoint; without it a kill has cut the save short


class DiffusionTrainer(Trainer):
    """The Trainer with our loss, our normaliser, rows in their own order, and checkpoints that are whole or ignored."""

    def __init__(self, recipe: Recipe, canvases: Canvases, num_examples: int, **kwargs) -> None:
        super().__init__(data_collator=collate, **kwargs)
        self.recipe, self.spec = recipe, canvases.spec
        self.weight = "uniform" if canvases.is_ar else recipe.objective.weight
        self.loss_is_scaled_for_ga = True
        self.metrics = RunningMetrics(self.args.device)

    def compute_loss(self, model, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None):
        # 1. What each token sees.
        layout = Layout(inputs["document_ids"], inputs["view_ids"], inputs["position_ids"])
        # 2. Forward; the head on noised rows only. -log p of each noised token, [N].
        nll = model(
            input_ids=inputs["input_ids"],
            layout=layout,
            right_window=self._right_window(inputs["input_ids"].shape[1]),
            rows=inputs["rows"],
            targets=inputs["targets"],
        )
        # 3. Sum in nats, divided once by the count over ranks and accumulation (the backward pass averages over ranks).
        loss_sum, _, metrics = diffusion_loss(nll, inputs["elbo_weight"], inputs["num_maskable"], self.weight)
        self.metrics.add(metrics, num_tokens=inputs["input_ids"].numel())
        assert num_items_in_batch is not None
        return loss_sum * self.args.world_size / num_items_in_batch

    def _right_window(self, length: int) -> int | None:
        """Annealing, causal to bidirectional: how many tokens to its right a canvas token sees at this step; None = all."""
        steps = self.recipe.objective.anneal_steps
        if self.state.global_step >= steps:
            return None
        return int(length * self.state.global_step / steps)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """Tokens that the loss of one optimizer step is divided by, over accumulation and ranks."""
        counts = [
            batch["num_maskable"] if self.weight == "elbo" else torch.tensor(len(batch["targets"])) for batch in batch_samples
        ]
        total = torch.stack([count.to(device) for count in counts]).sum()
        return self.accelerator.gather(total.reshape(1)).sum().clamp(min=1)

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self.metrics.drain(self.accelerator)}
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every rank has written its shard of the optimizer
        if self.args.should_save:
            run_dir = self._get_output_dir(trial=trial)
            (Path(run_dir) / f"checkpoint-{self.state.global_step}" / COMPLETE).touch()
            rotate_checkpoints(output_dir=run_dir, save_total_limit=self.recipe.training.keep_checkpoints)


def train(recipe: Recipe) -> Path:
    """Runs a recipe to its end and returns the folder of the final model, which `from_pretrained` loads.

    Raises ValueError for settings that do not fit together, before weights are loaded or anything is written.
    """
    output_dir = Path(recipe.training.output_dir)
    # 1. Everything that can be refused cheaply.
    args = _training_arguments(recipe, output_dir / "checkpoints")
    is_main = args.process_index == 0
    final = output_dir / "model"
    if final.exists():
        raise ValueError(f"training.output_dir={output_dir}: holds a finished run (model/); choose a new folder or remove it")
    # 2. The checkpoint: converted first if it is a causal LM, and probed.
    with args.main_process_first(local=False, desc="convert"):
        folder = _diffusion_checkpoint(recipe, output_dir, is_main)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # 3. The data, as rows in the order of the run.
    with args.main_process_first(local=False, desc="tokenise"):
        examples = load_examples(recipe.data, tokenizer, is_main_process=is_main)
    args.deepspeed = _deepspeed(recipe, args)  # from here on, from_pretrained scatters weights under ZeRO-3
    args.__post_init__()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=recipe.model.attn_implementation
    )
    spec = DiffusionSpec.of(model.config, folder)
    canvases = Canvases(
        spec, recipe.noise, recipe.objective, recipe.data.canvas_length, tokenizer.eos_token_id, recipe.training.seed
    )
    lengths = [np.array([len(ids) for ids in examples[column]]) for column in ("context", "target")]
    packing = Packing(canvases.sizes(*lengths), recipe.data.seq_len, recipe.training.seed)
    num_steps = recipe.training.num_steps or packing.num_rows(recipe.training.num_epochs or 0) // recipe.training.global_batch_size
    if num_steps == 0:
        raise ValueError(
            f"training.num_epochs={recipe.training.num_epochs}: the data has {packing.num_rows(1)} packed rows an epoch, fewer "
            f"than training.global_batch_size={recipe.training.global_batch_size}; lower it, or set training.num_steps"
        )
    args.max_steps = num_steps
    rows = PackedRows(examples, packing, canvases, num_steps * recipe.training.global_batch_size)
    # 4. The loop.
    if is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        recipe.save(output_dir / "config.yaml")
    trainer = DiffusionTrainer(
        recipe,
        canvases,
        len(examples),
        model=_prepared(model, recipe, spec),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[MetricsFile(output_dir / "metrics.jsonl")],
    )
    trainer.train(resume_from_checkpoint=_newest_checkpoint(output_dir / "checkpoints") if recipe.training.resume else None)
    _save_final(trainer, folder, final)
    return final


def _training_arguments(recipe: Recipe, checkpoints: Path) -> TrainingArguments:
    ours = recipe.training
    set_seed(ours.seed)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=ours.num_steps or 1,
        per_device_train_batch_size=ours.micro_batch_size,
        gradient_accumulation_steps=ours.accumulation_steps(world_size),
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
        gradient_checkpointing=recipe.model.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.model.gradient_checkpointing else None,
        dataloader_num_workers=recipe.data.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend=None if torch.cuda.is_available() or world_size == 1 else "gloo",
    )


def _deepspeed(recipe: Recipe, args: TrainingArguments) -> dict | None:
    """The DeepSpeed config as the recipe wants it; ValueError where the JSON sets what the recipe owns to something else."""
    if recipe.training.deepspeed is None:
        return None
    from adapt_launch import check_ds_config

    ours = recipe.training
    return check_ds_config(
        ours.deepspeed,
        {
            "train_batch_size": ("training.global_batch_size", ours.global_batch_size),
            "train_micro_batch_size_per_gpu": ("training.micro_batch_size", ours.micro_batch_size),
            "gradient_accumulation_steps": ("training.global_batch_size", args.gradient_accumulation_steps),
            "gradient_clipping": ("training.max_grad_norm", ours.max_grad_norm),
            "bf16.enabled": ("training.precision", ours.precision == "bf16"),
            "optimizer.params.lr": ("training.learning_rate", ours.learning_rate),
            "optimizer.params.weight_decay": ("training.weight_decay", ours.weight_decay),
        },
    )


def _diffusion_checkpoint(recipe: Recipe, output_dir: Path, is_main: bool) -> Path:
    """The folder to train from. Rank 0 converts or probes; the others come after it and read what it left."""
    base, kernel = recipe.model.base, recipe.model.attn_implementation
    if is_diffusion_checkpoint(base):
        if is_main:
            load(base, device="cpu", attn_implementation=kernel)
        return Path(base)
    converted = output_dir / "converted"
    if is_main and not converted.exists():
        convert(
            base,
            converted,
            attention=recipe.model.attention,
            mask_token=recipe.model.mask_token,
            shift_logits=recipe.model.shift_logits,
            attn_implementation=kernel,
        )
    return converted


def _prepared(model: PreTrainedModel, recipe: Recipe, spec: DiffusionSpec):
    """The model with its loss attached, compiled and wrapped in adapters as the recipe says."""
    model.config.use_cache = False
    attach_loss(model)
    if recipe.model.torch_compile:
        model.base_model.compile(dynamic=True)
    return _with_lora(model, recipe.model.lora, spec) if recipe.model.lora else model


def _with_lora(model: PreTrainedModel, lora: LoraConfig, spec: DiffusionSpec):
    import peft

    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding).rsplit(".", 1)[-1]
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            trainable_token_indices={name: [spec.mask_token_id]},
        ),
    )


def _newest_checkpoint(checkpoints: Path) -> str | None:
    """The newest checkpoint that was saved to its end; those that a kill cut short are removed."""
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    whole = [path for path in found if (path / COMPLETE).is_file()]
    if int(os.environ.get("RANK", "0")) == 0:
        for path in set(found) - set(whole):
            shutil.rmtree(path, ignore_errors=True)
    return str(whole[-1]) if whole else None


def _save_final(trainer: DiffusionTrainer, base_folder: Path, final: Path) -> None:
    """Writes the Hugging Face folder beside and renames it; adapters are kept in adapter/ and merged into the model."""
    is_lora = trainer.recipe.model.lora is not None
    staged = final.with_name(f".{final.name}.incomplete")
    adapter = final.with_name("adapter")
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    unwrapped.config.use_cache = True
    trainer.save_model(str(adapter if is_lora else staged))  # on every rank: ZeRO-3 gathers here
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        if is_lora:
            _merge_adapter(base_folder, adapter, staged)
        staged.rename(final)
    trainer.accelerator.wait_for_everyone()


def _merge_adapter(base_folder: Path, adapter: Path, out: Path) -> None:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # or ZeRO-3 would scatter these weights too
    lm = load(base_folder, adapter=adapter, device="cpu")
    lm.model.save_pretrained(out)
    lm.tokenizer.save_pretrained(out)


def main(argv: list[str]) -> None:
    """The `adapt train` command, and what `recipes/train.py` runs on every rank."""
    final = train(parse_recipe(argv, __doc__))
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{final}", file=sys.stderr)
