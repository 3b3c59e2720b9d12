"""The original in lm-eval: its own Hugging Face model, which says how far it is as all our work does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from adapt.progress import Task, doing
from adapt.tokens import template_errors

_HFLM: Any = HFLM  # lm-eval's decorator hides the class from type checkers


class CausalLM(_HFLM):
    """HFLM whose bars are ours: `name` is what the arm is called."""

    def __init__(self, model: Any, *, name: str, shown: bool = True, **options: Any) -> None:
        super().__init__(model, **options)
        self.name, self.shown = name, shown
        self._task: Task | None = None

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._counted(super().generate_until, requests, "writing")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._counted(super().loglikelihood, requests, "likelihood")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return self._counted(super().loglikelihood_rolling, requests, "likelihood")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        with template_errors("apply_chat_template"):
            return super().apply_chat_template(chat_history, add_generation_prompt)

    def _counted(self, score: Callable[..., Any], requests: list[Instance], what: str) -> Any:
        with doing(f"{self.name}: {what}", total=len(requests), shown=self.shown) as self._task:
            answers = score(requests, disable_tqdm=True)
            self._count(len(requests))  # requests that differ in their last token share a row
        return answers

    def _count(self, rows: int) -> None:
        task = self._task
        if task is not None and task.total is not None:
            task.update(min(rows, task.total - task.done))  # a long text is several rows

    def _model_generate(self, context: Any, *args: Any, **options: Any) -> Any:
        written = super()._model_generate(context, *args, **options)
        self._count(len(context))
        return written

    def _model_call(self, inps: Any, *args: Any, **options: Any) -> Any:
        logits = super()._model_call(inps, *args, **options)
        self._count(len(inps))
        return logits
