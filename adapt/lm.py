"""A diffusion checkpoint in memory: an ordinary Hugging Face folder whose config.json has a `diffusion` section, loaded and proved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import progress
from .decoding.room import check_room
from .decoding.rounds import GenerateOutput
from .decoding.sampler import generate, infill
from .decoding.settings import SamplerConfig
from .decoding.show import CanvasView
from .files import adapters
from .files.loading import config_of, model_of, tokenizer_of
from .files.model_folder import check_model_folder
from .model.precision import DTYPES, default_dtype
from .probe.probe import probe
from .settings.bounds import one_of
from .spec import DiffusionSpec
from .tokens import Chat, check_prompts, ids_with_blanks, left_padded, num_blanks, prompt_ids, start_token_id


class Written(NamedTuple):
    """Texts without special tokens, and what the sampler said of the batch."""

    texts: list[str]
    output: GenerateOutput


@dataclass(frozen=True)
class DiffusionLM:
    """A diffusion language model: the Hugging Face model, its tokenizer, and the `diffusion` section of its config.

    It is a `decoding.decoder.Decoder`: sampler and likelihood take it as it is.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: DiffusionSpec
    mask_free: bool = False
    """Plain bidirectional attention needs no explicit mask on this model (the probe has shown it)."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def end_of_text(self) -> int | None:
        tokenizer: Any = self.tokenizer  # transformers types its token ids as anything
        return tokenizer.eos_token_id

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer; the embedding may have more rows."""
        return len(self.tokenizer)

    @property
    def start_token_id(self) -> int:
        """What stands before a text whose first token needs a predictor: start-of-text, or else end-of-text."""
        return start_token_id(self.tokenizer)

    def generate(
        self, input_ids: Tensor, *, max_new_tokens: int, sampler: SamplerConfig | None = None, **options
    ) -> GenerateOutput:
        """Writes `max_new_tokens` after each prompt [B, P] (left-padded) by refining blanks; see `decoding.sampler.generate`."""
        return generate(self, input_ids, max_new_tokens=max_new_tokens, sampler=sampler or SamplerConfig(), **options)

    def infill(self, input_ids: Tensor, *, sampler: SamplerConfig | None = None, **options) -> GenerateOutput:
        """Fills the mask tokens of input_ids [B, L], wherever they are; see `decoding.sampler.infill`."""
        return infill(self, input_ids, sampler=sampler or SamplerConfig(), **options)

    @overload
    def write(self, prompts: str | Chat, **options: Any) -> str: ...
    @overload
    def write(self, prompts: Sequence[str] | Sequence[Chat], **options: Any) -> list[str]: ...
    def write(
        self, prompts: str | Chat | Sequence[str] | Sequence[Chat], *, max_new_tokens: int = 64, **options: Any
    ) -> str | list[str]:
        """What follows the prompt, or answers the chat ([{"role": "user", "content": "..."}]), as text; of many, a list.

        options: sampler, batch_size, seed and show, as in `write_batches`.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))
        many = cast("Sequence[str | Chat]", [prompts] if single else prompts)
        batches = self.write_batches(many, max_new_tokens=max_new_tokens, **options)
        texts = [text for batch in batches for text in batch.texts]
        return texts[0] if single else texts

    def write_batches(
        self,
        prompts: Sequence[str | Chat],
        *,
        max_new_tokens: int,
        sampler: SamplerConfig | None = None,
        batch_size: int = 8,
        seed: int = 0,
        show: bool = False,
    ) -> Iterator[Written]:
        """`write` as an iterator over batches, with what each cost.

        seed: for a temperature above 0. show: draw the refinement of the first row on standard error.
        """
        check_prompts(prompts, batch_size)
        check_room(self, prompt=1, blanks=max_new_tokens)
        rows = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        for start in range(0, len(rows), batch_size):  # of all, before the first is written
            batch = rows[start : start + batch_size]
            check_room(self, prompt=max(map(len, batch)), blanks=max_new_tokens, rows=len(batch), sampler=sampler)
        for start in range(0, len(rows), batch_size):
            input_ids, attention_mask = left_padded(self.tokenizer, rows[start : start + batch_size])
            num_prompt = input_ids.shape[1]
            output = self.generate(
                input_ids,
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                sampler=sampler,
                generator=torch.Generator(self.device).manual_seed(seed + start),
                streamer=self._canvas_view(num_prompt) if show else None,
            )
            yield Written(self._texts(output.sequences[:, num_prompt:]), output)

    @overload
    def fill(self, texts: str, **options: Any) -> str: ...
    @overload
    def fill(self, texts: Sequence[str], **options: Any) -> list[str]: ...
    def fill(self, texts: str | Sequence[str], **options: Any) -> str | list[str]:
        """The text with its blanks written ("The [?] sat on the [?3].": one token, three tokens); of many, a list.

        options: sampler, seed and show, as in `fill_one`.
        """
        each = [texts] if isinstance(texts, str) else texts
        written = [self.fill_one(text, **options).texts[0] for text in each]
        return written[0] if isinstance(texts, str) else written

    def fill_one(
        self, text: str, *, sampler: SamplerConfig | None = None, seed: int = 0, show: bool = False
    ) -> Written:
        """`fill` of one text, with what it cost."""
        check_room(self, prompt=0, blanks=num_blanks(text), what="infill")
        ids = ids_with_blanks(self.tokenizer, text)
        if self.spec.shift_logits and ids[0] == self.spec.mask_token_id:
            ids = [self.start_token_id, *ids]
        output = self.infill(
            torch.tensor([ids]),
            sampler=sampler,
            generator=torch.Generator(self.device).manual_seed(seed),
            streamer=self._canvas_view(0) if show else None,
        )
        return Written(self._texts(output.sequences), output)

    def _canvas_view(self, num_prompt: int) -> CanvasView:
        return CanvasView(self.tokenizer, self.spec.mask_token_id, num_prompt)

    def _texts(self, tokens: Tensor) -> list[str]:
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def load(
    folder: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
) -> DiffusionLM:
    """The checkpoint as a DiffusionLM in eval mode, on `device` (default: CUDA if there is one).

    adapter: a PEFT folder to merge in. dtype: "auto" = as saved; default: as saved, or float32 where the device emulates that
    (`model.precision`). trust_remote_code: run Python files that come with the model. verify: run the probe, which raises
    ValueError if the loaded weights do not attend as the checkpoint promises.
    """
    # 1. Everything that can be refused before weights are read.
    folder, adapter = adapters.base_and_adapter(folder, adapter)
    check_model_folder(folder)
    device, dtype = _device(device), _dtype(dtype)
    spec, tokenizer = spec_and_tokenizer(folder, trust_remote_code=trust_remote_code)
    if dtype is None:
        stored = config_of(folder, f"checkpoint={folder}", trust_remote_code=trust_remote_code).dtype
        dtype = default_dtype(stored, device)
    # 2. The weights, all of them.
    with progress.doing(f"loading {folder}"):
        model = _weights(folder, dtype, attn_implementation, trust_remote_code)
        if adapter is not None:
            model = adapters.merged(model, adapter)
        model.to(device).eval()  # pyright: ignore[reportArgumentType]
    if spec.mask_token_id >= (rows := len(model.get_input_embeddings().weight)):  # pyright: ignore[reportArgumentType]
        raise ValueError(
            f"checkpoint={folder}: diffusion.mask_token_id is {spec.mask_token_id}, but the embedding has {rows} rows; convert again"
        )
    # 3. The proof.
    mask_free = False
    if verify:
        with progress.doing("proving the attention pattern"):
            mask_free = probe(model, spec.attention, spec.clean_context)
    return DiffusionLM(model, tokenizer, spec, mask_free)


def spec_and_tokenizer(
    folder: str | Path, *, trust_remote_code: bool = False
) -> tuple[DiffusionSpec, PreTrainedTokenizerBase]:
    """What a checkpoint is besides its weights; ValueError where the two do not go together."""
    trusted: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    what = f"checkpoint={folder}"
    config = config_of(folder, what, **trusted)
    spec = DiffusionSpec.of(config, folder)
    tokenizer = tokenizer_of(folder, what, **trusted)
    if tokenizer.mask_token_id != spec.mask_token_id:
        raise ValueError(
            f"checkpoint={folder}: diffusion.mask_token_id is {spec.mask_token_id}, but the tokenizer's mask token has "
            f"the id {tokenizer.mask_token_id}; keep the tokenizer files of the conversion beside the weights"
        )
    return spec, tokenizer


def _weights(
    folder: str | Path, dtype: torch.dtype | str | None, kernel: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    options = {name: value for name, value in (("dtype", dtype), ("attn_implementation", kernel)) if value is not None}
    try:
        return model_of(folder, f"checkpoint={folder}", trust_remote_code=trust_remote_code, **options)
    except ImportError as error:  # a kernel of a package that is not installed
        raise ValueError(
            f"model.attn_implementation={kernel}: {error}; install it, or use sdpa or flex_attention"
        ) from error


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(f"device={device}: not usable here ({reason}); use cpu, or install torch for it") from error
    return torch.device(device)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    if dtype is None or isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    one_of("dtype", dtype, ("auto", *DTYPES))
    return DTYPES[dtype]
