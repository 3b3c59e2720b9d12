"""What a checkpoint's .pt files may call when they are read: DeepSpeed unpickles them whole, and a pickle is a program.

Before anything reads a checkpoint, the pickle in each of its files is read as a list of instructions, none of which is run, and held
against the handful of names that torch, DeepSpeed 0.19 and transformers write. Tensors lie beside the pickle and are not read, so it
costs an open file each. COMPLETE is no help here: it is a plain checksum, which whoever plants a pickle writes anew.
"""

from __future__ import annotations

import os
import pickletools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from .seal import gathered, share

_PICKLES = {".bin", ".pkl", ".pt", ".pth"}
_NEVER_READ = "training_args.bin"
# Shorter than what is read of the file: nothing may follow that leads elsewhere.
_TAG = re.compile(r"global_step\d{1,20}(_universal)?\n?")
_DTYPES = {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}
# As pickle's GLOBAL spells them, module and name. All of them make values; none opens, imports or runs what it is given.
_NAMES = {
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter"),
    *("torch._tensor _rebuild_from_type_v2", "torch Tensor", "torch Size", "torch device"),
    *("torch.nn.parameter Parameter", "torch.storage UntypedStorage"),
    *(f"torch {name}" for name in vars(torch) if name.endswith("Storage")),
    *(dtype.replace(".", " ") for dtype in _DTYPES),
    *("collections OrderedDict", "collections defaultdict", "_codecs encode", "__builtin__ dict", "__builtin__ set"),
    *("numpy dtype", "numpy ndarray"),
    *(f"numpy.{core}.multiarray {name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    "deepspeed.utils.tensor_fragment fragment_address",
    "deepspeed.runtime.zero.config ZeroStageEnum",
    *(f"deepspeed.runtime.fp16.loss_scaler {name}" for name in ("LossScaler", "DynamicLossScaler")),
}
# Ways to name something else than by GLOBAL, of which torch.save writes none.
_OTHER_WAYS = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER"}

_PUTS, _GETS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}
_CALLS, _IN_PLACE = {"REDUCE", "NEWOBJ", "NEWOBJ_EX"}, {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_MARK, _MADE = "a mark", "an instance by "
# BUILD sets attributes. On a class or a function they outlive the reading, and a changed __module__ is imported by the next save;
# numpy's scalar hands on what it is given, so that only what these make may be given a state.
_WITH_STATE = {
    f"{_MADE}{name}"
    for name in _NAMES
    if name.rpartition(" ")[2]
    in {"OrderedDict", "dtype", "_reconstruct", "LossScaler", "DynamicLossScaler", "fragment_address"}
}


def check_checkpoint(checkpoint: Path | None) -> None:
    """ValueError on all ranks, of which each looks at a share, where reading the checkpoint would run or reach what is not in it."""
    if checkpoint is None:
        return
    found = next((problem for problem in gathered(_problem(checkpoint)) if problem), None)
    if found:
        raise ValueError(
            f"training.output_dir: {checkpoint}: {found}; put a copy that you trust in its place, or remove it to go on from the "
            "one before"
        )


def _problem(checkpoint: Path) -> str | None:
    names = sorted(
        os.path.relpath(os.path.join(root, name), checkpoint)
        for root, folders, files in os.walk(checkpoint)
        for name in [*folders, *files]
    )
    for name in names:
        if (checkpoint / name).is_symlink():
            return f"{name} is a link, and what it leads to is not part of the checkpoint"
    for name in ("latest", "latest_universal"):
        if (checkpoint / name).exists() and not _TAG.fullmatch(_beginning(checkpoint / name)):
            return f"{name} does not name a folder of the checkpoint"
    pickles = [name for name in names if Path(name).suffix in _PICKLES and Path(name).name != _NEVER_READ]
    return next((problem for name in share(pickles) if (problem := _of_file(checkpoint / name, name))), None)


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(100).decode(errors="replace")


def _of_file(path: Path, name: str) -> str | None:
    if not path.is_file():
        return f"{name} is not a file"
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return f"{name} is not what torch.save writes; other pickles are not read"
    try:
        # What torch.load reads with: another reader might see another pickle.
        archive: Any = torch._C.PyTorchFileReader(str(path))
        if archive.has_record("constants.pkl"):
            return f"{name} is a TorchScript archive, which is a program"
        strange = next(_strange(archive.get_record("data.pkl")), None)
    # What the archive's reader and pickletools raise for bytes that are neither.
    except (LookupError, OSError, RuntimeError, ValueError) as error:
        return f"{name} is damaged ({' '.join(str(error).split())[:80]})"
    return strange and f"{name} would call {strange[:80]}, which no checkpoint of ours does (it was not run)"


def _strange(pickle: bytes) -> Iterator[str]:
    stack: list[str | None] = []
    memo: dict[int, str | None] = {}
    for code, argument, _ in pickletools.genops(pickle):
        if code.name == "GLOBAL" and argument not in _NAMES:
            yield str(argument).replace(" ", ".")
        elif code.name in _OTHER_WAYS:
            yield f"something by {code.name}"
        changed = _step(stack, memo, code, argument)
        if code.name == "BUILD" and changed not in _WITH_STATE:
            yield f"BUILD on {changed or 'a value'}"


def _step(
    stack: list[str | None], memo: dict[int, str | None], code: pickletools.OpcodeInfo, argument: Any
) -> str | None:
    """What the instruction leaves on top of the stack: a global's name, what made an instance, a mark, or None for plain values.

    ValueError where the stack holds something else than the instruction takes.
    """
    if code.name in _PUTS:
        memo[len(memo) if argument is None else argument] = stack[-1]
        return stack[-1]
    if code.name in _GETS and argument not in memo:
        raise ValueError(f"{code.name} of what is not there")
    if code.name == "POP" and stack[-1] == _MARK:
        return stack.pop()
    target = _pop(stack, code.stack_before)
    if code.name in _CALLS:
        top = f"{_MADE}{target}"
    elif code.name in _IN_PLACE or code.name == "DUP":
        top = target
    elif code.name in _GETS:
        top = memo[argument]
    else:
        top = {"GLOBAL": str(argument), "MARK": _MARK}.get(code.name)
    stack.extend([top] * len(code.stack_after))
    return top


def _pop(stack: list[str | None], operands: list[pickletools.StackObject]) -> str | None:
    """Takes them off the stack; returns the first, on which the instruction works."""
    count = len(operands)
    if pickletools.stackslice in operands:
        above = stack[::-1].index(_MARK) if _MARK in stack else len(stack)
        del stack[len(stack) - above :]
        count -= 1
    taken = stack[len(stack) - count :] if count else []
    expected = pickletools.markobject in operands
    if len(taken) < count or taken.count(_MARK) != expected:
        raise ValueError("its stack does not hold what an instruction takes")
    del stack[len(stack) - count :]
    return taken[0] if taken else None


class _Loop(TrainerCallback):
    has_begun = False

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.has_begun = True


@contextmanager
def errors_while_reading(checkpoint: Path | None, trainer: Trainer) -> Iterator[None]:
    """Inside, what libraries raise for a checkpoint of other types than theirs is one line, until the first step begins."""
    loop = _Loop()
    trainer.add_callback(loop)
    try:
        yield
    except (OSError, torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        if checkpoint is None or loop.has_begun or reason.startswith("training.") or "gloo/transport" in reason:
            raise
        raise ValueError(
            f"training.output_dir: {checkpoint} cannot be read ({type(error).__name__}: {reason}); put a whole copy in its place, or "
            "remove it to go on from the one before"
        ) from error
