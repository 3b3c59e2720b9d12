"""Samples during training: every N steps the model as it is continues one prompt, shown beside what it wrote last time.

A sample leaves no trace in the run: no random number is drawn, nothing is compiled, and the time that it takes is kept out
of the rates. Under ZeRO-3, where each forward gathers weights from all ranks, all ranks decode the same; else rank 0 does.
"""

from __future__ import annotations

import json
import shutil
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ... import progress
from ...decoding.settings import SamplerConfig
from ...lm import DiffusionLM
from ...spec import DiffusionSpec
from ...tokens import start_token_id, text_ids
from ..checkpoints.run_folder import grow
from ..recipe import Recipe
from .metrics import RunningMetrics, drop_lines_after
from .trackers import log_to_trackers

NEW_TOKENS = 64  # tokens of a sample, where data.canvas_length does not say how long a canvas is


def sample_prompt(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, examples: Dataset, max_positions: int) -> Tensor:
    """What samples continue, [1, P]. ValueError where a position is missing for what should be written after it."""
    ours = recipe.training
    tokens: Any = tokenizer
    if ours.sample_prompt is None:
        ids = list(examples[0]["context"])
    else:
        ids = text_ids(tokens, ours.sample_prompt)
    ids = ids or [start_token_id(tokens)]
    room = max_positions - num_new_tokens(recipe)
    if len(ids) > room and ours.sample_prompt is None:
        ids = ids[:room]
    if not 0 < len(ids) <= room:
        raise ValueError(
            f"training.sample_prompt: has {len(ids)} tokens, and with the {num_new_tokens(recipe)} that are written after it more "
            f"than the {max_positions} positions of model.base={recipe.model.base}; give a shorter one"
        )
    return torch.tensor([ids])


def num_new_tokens(recipe: Recipe) -> int:
    """Tokens of a sample: a canvas as it is trained, or NEW_TOKENS of them where canvases are laid one after another."""
    whole_canvas = recipe.data.canvas_start == "prompt" and recipe.objective.name != "ar"
    return recipe.data.canvas_length or NEW_TOKENS if whole_canvas else NEW_TOKENS


class Samples(TrainerCallback):
    """Decodes, shows and keeps (samples.jsonl: step, prompt, text, nfe, tpf) a sample every training.sample_steps steps."""

    def __init__(
        self, trainer: Trainer, metrics: RunningMetrics, recipe: Recipe, spec: DiffusionSpec, prompt: Tensor
    ) -> None:
        self.trainer, self.metrics, self.recipe, self.spec, self.prompt = trainer, metrics, recipe, spec, prompt
        self.tokenizer: Any = trainer.processing_class
        self.path = Path(recipe.training.output_dir) / "samples.jsonl"
        self.last: dict | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            grow(self.path)
            lines = drop_lines_after(self.path, state.global_step)
            self.last = lines[-1] if lines else None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.recipe.training.sample_steps:
            return
        if not (state.is_world_process_zero or is_deepspeed_zero3_enabled()):
            return
        started = time.perf_counter()
        try:
            with progress.doing("writing a sample"):
                sample = {"step": state.global_step, **self._decode()}
        except ValueError as error:  # such as NaN weights, of which the loss tells too: a look is not worth a run
            return progress.say(f"sample of step {state.global_step}: not decoded: {error}")
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")
            progress.say(beside(sample, self.last))
            log_to_trackers(self.trainer, {"sample": f"{sample['prompt']} → {sample['text']}"})
        self.last = sample
        self.metrics.leave_out(time.perf_counter() - started)

    def _decode(self) -> dict[str, Any]:
        """prompt, text, nfe and tpf of a sample of the model as it is."""
        unwrapped: Any = self.trainer.accelerator.unwrap_model(self.trainer.model)
        model = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
        prompt = self.prompt.to(model.device)
        # Under autocast, where the run is: attention sees the same dtypes as in training.
        with _undisturbed(unwrapped), _one_opinion(model), self.trainer.accelerator.autocast():
            ids, nfe, num_tokens = self._greedy(model, prompt)
        return {
            "prompt": self.tokenizer.decode(self.prompt[0], skip_special_tokens=True),
            "text": self.tokenizer.decode(ids, skip_special_tokens=True),
            "nfe": nfe,
            "tpf": num_tokens / max(nfe, 1),
        }

    def _greedy(self, model: PreTrainedModel, prompt: Tensor) -> tuple[list[int], int, int]:
        """(tokens written, forwards, tokens written before the end of the text)."""
        end, data = self.tokenizer.eos_token_id, self.recipe.data
        if self.recipe.objective.name == "ar":
            generate: Any = model.generate
            options = {"do_sample": False, "use_cache": True, "eos_token_id": end, "pad_token_id": end}
            written = generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_new_tokens(self.recipe), **options
            )[0, prompt.shape[1] :].tolist()
            return written, len(written), len(written) - written.count(end)
        sampler = SamplerConfig(canvas_length=data.canvas_length if data.canvas_start == "anywhere" else None)
        output = DiffusionLM(model, self.tokenizer, self.spec).generate(
            prompt, max_new_tokens=num_new_tokens(self.recipe), sampler=sampler
        )
        return output.sequences[0, prompt.shape[1] :].tolist(), output.nfe, int(output.num_tokens.sum())


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and uncompiled (each round has another shape); after it all is as before."""
    training = [module for module in model.modules() if module.training]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _one_opinion(model: PreTrainedModel) -> Iterator[None]:
    """Inside, where all ranks decode, the logits are rank 0's: one token chosen otherwise, and a rank waits for ever."""
    if not is_deepspeed_zero3_enabled():
        yield
        return

    def logits_of_rank_zero(module, inputs, logits: Tensor) -> Tensor:
        logits = logits.contiguous()
        torch.distributed.broadcast(logits, src=0)
        return logits

    head: Any = model.get_output_embeddings()
    handle = head.register_forward_hook(logits_of_rank_zero)
    try:
        yield
    finally:
        handle.remove()


def beside(sample: dict, last: dict | None) -> str:
    """The sample under the one before it, in labelled lines for a terminal or a log file."""
    columns = min(shutil.get_terminal_size((100, 24)).columns, 120)
    label = max(len(f"step {sample['step']}"), len("prompt"))

    def lines(name: str, text: str) -> str:
        whole = " ⏎ ".join(" ".join(line.split()) for line in text.strip("\n").split("\n"))
        indent = "  " + " " * label + "  "
        return textwrap.fill(whole, columns, initial_indent=f"  {name:<{label}}  ", subsequent_indent=indent) or (
            f"  {name:<{label}}  (nothing)"
        )

    parts = [
        f"sample: {sample['nfe']} forwards, {sample['tpf']:.2f} tokens per forward",
        lines("prompt", sample["prompt"]),
    ]
    if last is not None:
        parts.append(lines(f"step {last['step']}", last["text"]))
    return "\n".join([*parts, lines(f"step {sample['step']}", sample["text"])])
