"""A model whose weights stay in their files: pages are read when a layer needs them, and given back when it is done.

With it a conversion is probed on all of its loaded weights, every layer, within bounded memory. It costs four forwards and a backward
over the weights, from the page cache where they fit it. The bound holds for weights that transformers takes as they are
stored; experts that it stacks into one tensor on loading are copied into memory.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .. import progress
from ..files.model_folder import check_loaded
from ..files.safetensors_folder import DTYPES, Shard
from ..model.parts import backbone_of
from ..spec import DiffusionSpec
from .probe import probe

_HELD = 32 << 20  # bytes of weights that may be in memory before they are given back
_ROWS = 16


@contextmanager
def mapped_model(
    model_class: type[PreTrainedModel], config: PretrainedConfig, shards: Mapping[str, Shard], **options: Any
) -> Iterator[tuple[PreTrainedModel, dict[str, Any]]]:
    """(the model on the weights of these shards, transformers' loading info); usable inside of the `with` only.

    options: of `from_pretrained`, such as dtype and attn_implementation. Raises ValueError for a file that has become shorter than
    its header says; one that becomes so later ends the process (SIGBUS), as for every mapped file.
    """
    files: list[mmap.mmap] = []
    weights: dict[str, Tensor] = {}
    for shard in shards.values():
        with shard.path.open("rb") as file:
            end = shard.start + max(about["data_offsets"][1] for about in shard.tensors.values())
            if os.fstat(file.fileno()).st_size < end:
                raise ValueError(f"base={shard.path}: became shorter while it was read; is something writing to it?")
            files.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        weights |= {name: _tensor(files[-1], shard.start, about) for name, about in shard.tensors.items()}
    loaded: Any = model_class.from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True, **options
    )
    model, info = loaded
    del weights, loaded
    _give_back_after_use(model, files)
    try:
        yield model, info
    finally:  # a file that is mapped keeps its space on the disk when it is removed, and the model is in reference cycles
        model.to("meta")
        files.clear()


def probe_in_place(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    shards: Mapping[str, Shard],
    spec: DiffusionSpec,
    what: str,
    copying: Future[None],
    **options: Any,
) -> None:
    """Probes all layers of the model on the weights of these shards, which others are `copying` meanwhile.

    Raises ValueError, of `what` where a weight is missing, unless the model attends as the spec promises; and what goes wrong with
    the copy, before the next forward.
    """
    cores = torch.get_num_threads()

    def all_cores_when_copied(*_: Any) -> None:
        if copying.done():
            copying.result()
            torch.set_num_threads(cores)

    torch.set_num_threads(max(1, cores - 1))  # OpenMP threads that wait for a core spin
    try:
        with (
            progress.doing("proving the attention pattern"),
            mapped_model(model_class, config, shards, **options) as (model, loading),
        ):
            check_loaded(loading, what)
            backbone_of(model).register_forward_pre_hook(all_cores_when_copied)
            with progress.doing("proving the attention pattern"):
                probe(model.eval(), spec.attention, spec.clean_context)
    finally:
        torch.set_num_threads(cores)


def _tensor(file: mmap.mmap, start: int, about: dict[str, Any]) -> Tensor:
    dtype, (first, last) = DTYPES[about["dtype"]], about["data_offsets"]
    if first == last:
        return torch.empty(about["shape"], dtype=dtype)
    flat = torch.frombuffer(file, dtype=torch.uint8, count=last - first, offset=start + first)
    if flat.data_ptr() % dtype.itemsize:  # the format does not promise alignment
        flat = flat.clone()
    return flat.view(dtype).view(about["shape"])


class _InPieces(torch.autograd.Function):
    """A linear layer, and the gradient of its input (the probe asks for no other), with `_HELD` bytes of its weight at a time.

    The probe asks one token of each row, so past the attention all other tokens have a gradient of zero: they are left out.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, give_back: Callable[[], None]) -> Tensor:
        ctx.weight, ctx.give_back = weight, give_back
        if len(_pieces(weight)) == 1:
            return nn.functional.linear(input, weight, bias)
        pieces = []
        for rows in _pieces(weight):
            pieces.append(nn.functional.linear(input, weight[rows], None if bias is None else bias[rows]))
            give_back()
        return torch.cat(pieces, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        all_rows = gradient.reshape(-1, gradient.shape[-1])
        is_asked = all_rows.any(-1)
        rows = all_rows[is_asked]
        total = rows.new_zeros(len(rows), ctx.weight.shape[1], dtype=torch.float32)
        for piece in _pieces(ctx.weight):
            total += rows[:, piece] @ ctx.weight[piece]
            ctx.give_back()
        of_input = gradient.new_zeros(len(all_rows), ctx.weight.shape[1])
        of_input[is_asked] = total.to(of_input.dtype)
        return of_input.view(*gradient.shape[:-1], ctx.weight.shape[1]), None, None, None


def _pieces(weight: Tensor) -> list[slice]:
    rows = max(1, _HELD // (weight[0].nbytes or 1))
    return [slice(first, first + rows) for first in range(0, len(weight), rows)]


def _give_back_after_use(model: PreTrainedModel, files: list[mmap.mmap]) -> None:
    """Hooks on the modules that own weights; linear layers are computed by `_InPieces`, large embeddings row by row."""
    held = 0

    def give_back() -> None:
        nonlocal held
        held = 0
        for file in files:
            if hasattr(mmap, "MADV_DONTNEED"):  # a private mapping that nobody wrote to: the file has it all
                file.madvise(mmap.MADV_DONTNEED)

    def used(module: nn.Module, *_: Any) -> None:
        nonlocal held
        held += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        if held > _HELD:
            give_back()

    def in_pieces(linear: nn.Linear, input: Tensor) -> Tensor:
        return _InPieces.apply(input, linear.weight, linear.bias, give_back)

    def row_by_row(embedding: nn.Embedding, input: Tensor) -> Tensor:
        # A row that is touched brings up to 2 MB around it, so a thousand of them bring the whole table.
        plain, pieces = type(embedding).forward, []
        for ids in input.reshape(-1).split(_ROWS):
            pieces.append(plain(embedding, ids))
            give_back()
        return torch.cat(pieces).view(*input.shape, -1)

    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.nbytes > _HELD:
            module.forward = partial(row_by_row, module)
        elif type(module) is nn.Linear:
            module.forward = partial(in_pieces, module)
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(used)
    give_back()
