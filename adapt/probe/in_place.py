"""A model whose weights stay in their files: pages are read when a layer needs them, and given back when it is done.

With it a conversion is probed on all of its loaded weights, every layer, within bounded memory. It costs four forwards and a backward
over the weights, from the page cache where they fit it. The bound holds for weights that transformers takes as they are
stored; experts that it stacks into one tensor on loading are copied into memory.

A mapped file that is cut short would end the process (SIGBUS). So who wants to write to it waits for us (`files.lease`), and we stop
before the next layer. Where the filesystem has no leases (NFS), only a file that became shorter between two layers is noticed.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .. import progress
from ..files.lease import give_lease_back, size_of, take_lease, writer_waits
from ..files.loading import check_loaded
from ..files.safetensors_folder import DTYPES, Shard
from ..model.parts import backbone_of
from ..spec import DiffusionSpec
from .probe import probe

_HELD = 32 << 20  # bytes of weights that may be in memory before they are given back
_ROWS = 16


@dataclass(frozen=True)
class _Mapped:
    """A safetensors file, mapped; writers wait for us where it is leased."""

    shard: Shard
    file: IO[bytes]
    pages: mmap.mmap
    leased: bool

    def check(self) -> None:
        """ValueError where the file is about to change, or has become shorter."""
        if self.leased and writer_waits(self.file):
            raise ValueError(
                f"base={self.shard.path}: something writes to it while it is read; convert again when that is done"
            )
        if size_of(self.file) < self.shard.end:
            raise ValueError(f"base={self.shard.path}: became shorter while it was read; is something writing to it?")

    def close(self) -> None:
        """Lets writers go on."""
        if self.leased:
            give_lease_back(self.file)
        self.file.close()


@contextmanager
def mapped_model(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    shards: Mapping[str, Shard],
    *,
    writing: Path | None = None,
    **options: Any,
) -> Iterator[tuple[PreTrainedModel, dict[str, Any]]]:
    """(the model on the weights of these shards, transformers' loading info); usable inside of the `with` only.

    writing: a folder to which this process writes meanwhile. options: of `from_pretrained`, such as dtype and attn_implementation.
    Raises ValueError for a file that is shorter than its header says, and inside for one that somebody else writes to.
    """
    files: list[_Mapped] = []
    weights: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for shard in shards.values():
            files.append(_mapped(shard, lease=shard.path.parent != writing))
            stack.callback(files[-1].close)
            files[-1].check()
            weights |= {name: _tensor(files[-1].pages, shard.start, about) for name, about in shard.tensors.items()}
        loaded: Any = model_class.from_pretrained(
            None, config=config, state_dict=weights, output_loading_info=True, trust_remote_code=False, **options
        )
        model, info = loaded
        del weights, loaded
        _give_back_after_use(model, files)
        try:
            yield model, info
        finally:  # a mapped file keeps its space on the disk when it is removed, and the model is in reference cycles
            model.to("meta")
            files.clear()


def probe_in_place(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    shards: Mapping[str, Shard],
    spec: DiffusionSpec,
    what: str,
    copy_done: Future[None],
    **options: Any,
) -> None:
    """Probes all layers of the model on the weights of these shards, which are copied meanwhile; options: of `mapped_model`.

    Raises ValueError, of `what` where a weight is missing, unless the model attends as the spec promises; and what goes wrong with
    the copy, before the next forward.
    """
    cores = torch.get_num_threads()

    def all_cores_when_copied(*_: Any) -> None:
        if copy_done.done():
            copy_done.result()
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


def _mapped(shard: Shard, *, lease: bool) -> _Mapped:
    file = shard.path.open("rb")
    leased = lease and take_lease(file)
    return _Mapped(shard, file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), leased)


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


def _give_back_after_use(model: PreTrainedModel, files: list[_Mapped]) -> None:
    """Hooks on the modules that own weights; linear layers are computed by `_InPieces`, large embeddings row by row."""
    held = 0

    def give_back() -> None:
        nonlocal held
        held = 0
        for file in files:
            if hasattr(mmap, "MADV_DONTNEED"):  # a private mapping that nobody wrote to: the file has it all
                file.pages.madvise(mmap.MADV_DONTNEED)
            file.check()

    def check(*_: Any) -> None:
        for file in files:
            file.check()

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
            module.register_forward_pre_hook(check)
            module.register_forward_hook(used)
    give_back()
