"""What is held at each moment: every storage from the operation that makes it to the moment that nobody holds it."""

from __future__ import annotations

import weakref
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

KINDS = ("activations", "logits", "gradients", "passing gradients")
"""of bytes. Passing: those of weights, each only until it is whole and handed on, as where an earlier micro-batch's are added to,
or where ZeRO-2 and ZeRO-3 scatter them"""


class AllocationLog(TorchDispatchMode):
    """When each storage is made and let go of, counted in operations."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.now = vocab_size, 0
        self.bytes: list[int] = []
        self.starts: list[int] = []
        self.ends: dict[int, int] = {}
        self.handed_on: dict[int, int] = {}
        self.is_logits: list[bool] = []
        self.alive: dict[int, int] = {}  # id of a storage -> its number
        self.gradients: set[int] = set()
        self.marks: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.prim.device.default:
            self.now += 1
            for tensor in tree_iter(out):
                if isinstance(tensor, Tensor):
                    self._count(tensor)
        return out

    def ignore(self, *modules: torch.nn.Module) -> None:
        """Leaves the weights out, which are counted elsewhere; a view of one makes no storage."""
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._count(tensor, size=0)

    def _count(self, tensor: Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        number = self.alive[key] = len(self.bytes)
        self.bytes.append(storage.nbytes() if size is None else size)
        self.starts.append(self.now)
        self.is_logits.append(tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size)

        def gone() -> None:
            if self.alive.get(key) == number:
                del self.alive[key]
            self.ends.setdefault(number, self.now)

        weakref.finalize(storage, gone)

    def mark(self, name: str) -> None:
        self.marks.setdefault(name, self.now)

    @contextmanager
    def handing_on(self, model: torch.nn.Module):
        """Inside, it is noted when the gradient of each weight is whole."""

        def whole(weight: Tensor) -> None:
            assert weight.grad is not None
            number = self.alive.get(weight.grad.untyped_storage()._cdata)
            if number is not None:
                self.handed_on[number] = self.now

        hooks = [p.register_post_accumulate_grad_hook(whole) for p in model.parameters() if p.requires_grad]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def marking(self, layers: torch.nn.ModuleList):
        """Inside, it is noted where the forward and the backward pass of each layer begin and end."""

        def hook_of(i: int):
            def before(_, args, kwargs) -> None:
                if "backward" in self.marks or not torch.is_grad_enabled():  # computed again, or a teacher
                    return
                self.mark(f"forward {i}")
                hidden = args[0] if args else kwargs["hidden_states"]
                if hidden.requires_grad:
                    hidden.register_hook(lambda _: self.mark(f"back from {i}"))

            return before

        hooks = [layer.register_forward_pre_hook(hook_of(i), with_kwargs=True) for i, layer in enumerate(layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def close(self, model: torch.nn.Module) -> None:
        self.ends = self.ends.copy() | {number: self.now + 1 for number in self.alive.values()}
        self.gradients = {
            number
            for p in model.parameters()
            if p.grad is not None and (number := self.alive.get(p.grad.untyped_storage()._cdata)) is not None
        }

    def timeline(self) -> np.ndarray:
        steps = np.zeros((self.marks["end"] + 2, len(KINDS)))
        for number, size in enumerate(self.bytes):
            start, end = self.starts[number], min(self.ends.get(number, self.marks["end"] + 1), self.marks["end"] + 1)
            if number in self.gradients:
                passing = self.handed_on.get(number, end)
                steps[start, 2:] += size
                steps[end, 2] -= size
                steps[max(passing, start + 1), 3] -= size
            else:
                kind = int(self.is_logits[number])
                steps[start, kind] += size
                steps[max(end, start + 1) if end == start else end, kind] -= size
        return steps.cumsum(0)[:-1]


def repeated(held: np.ndarray, marks: dict[str, int], num_layers: int) -> np.ndarray:
    """The timeline of num_layers equal layers from that of three: the middle one again and again.

    What a repeated layer holds changes evenly from one to the next, so its first and last stand for all. Where autocast ends,
    before the backward pass, it lets go of copies that nothing else keeps, as under gradient checkpointing.
    """
    more = num_layers - 3
    f1, f2, turn = marks["forward 1"], marks["forward 2"], marks["backward"]
    b2, b1 = marks["back from 2"], marks["back from 1"]
    kept, returned = held[f2] - held[f1], held[b1] - held[b2]
    still_kept, left = np.array([-returned[:2], kept[2:]]).ravel(), np.array([0, 0, *returned[2:]])
    parts = [held[:f2], held[f1:turn] + more * kept, held[turn:b1] + more * still_kept, held[b2:] + more * left]
    return np.concatenate(parts)
