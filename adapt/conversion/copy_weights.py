"""Copies safetensors weights tensor by tensor: bytes as they are, except for the tensors that a conversion rewrites.

Memory is bounded by chunks of rows, not by a tensor and not by the model: what is rewritten streams by rows, the rest goes from file to
file inside the kernel.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from .. import progress
from ..files.finite import first_not_finite
from ..files.loading import OLD_BUFFERS
from ..files.safetensors_folder import INDEX, SINGLE, Shard, read_shards
from .background import Written, beside
from .embedding_rows import NewRows
from .tensor_streams import PIECE, copy_bytes, not_finite, num_threads, rewrite_tensor
from .weight_plan import plan_of

_SAMPLE = 4096  # bytes


class Copy:
    """The weights of `shards`, as they will stand in the folder `out`.

    rewrite: embeddings by name. dtype: floating tensors are cast to it, but for those named in keep_dtype. What differs
    from the source is written first, what does not beside whatever the caller does meanwhile (`writing`).
    """

    def __init__(
        self,
        shards: Mapping[str, Shard],
        out: Path,
        rewrite: Mapping[str, NewRows],
        *,
        dtype: torch.dtype | None = None,
        keep_dtype: Collection[str] = (),
    ) -> None:
        self._out, self._rewrite = out, rewrite
        self._plans = {name: plan_of(shard, rewrite, dtype, keep_dtype) for name, shard in shards.items()}

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(plan.num_bytes for plan in self._plans.values())

    @contextmanager
    def writing(self, out: Path) -> Iterator[tuple[dict[str, Shard], Future[None]]]:
        """Inside, the files are written, to become `out`: (where each tensor can be read, whether it is written or not; what is done
        when all are).

        Raises ValueError for weights with NaN or infinity in them, for weights that do not fit into float16, and for what was
        not written as planned; OSError of the disk.
        """
        self._make_files()
        unchanged = sum(size for name in self._plans for _, _, size in self._as_they_are(name))
        with progress.doing("writing the weights", total=unchanged or None, unit="MB") as task:
            with beside(self._write_unchanged(task)) as copy_done:
                yield self._write_changed(), copy_done
                copy_done.result()
            self._check(out)

    def _make_files(self) -> None:
        """Those that differ from the source: a header, and holes for the tensors."""
        for name, plan in self._plans.items():
            if plan.changed:
                with (self._out / name).open("wb") as file:
                    file.write(plan.header)
                    file.truncate(len(plan.header) + plan.num_bytes)

    def _write_changed(self) -> dict[str, Shard]:
        """Returns where each tensor can be read then: here, or, as it is not changed, in the source."""
        readable: dict[str, Shard] = {}
        for name, plan in self._plans.items():
            shard = plan.source
            kept = {t: tensor for t, tensor in shard.tensors.items() if t not in plan.changed}
            if kept:
                readable[f"{name} of the source"] = replace(shard, tensors=kept)
            if not plan.changed:
                continue
            readable[name] = plan.written(self._out / name)
            with (
                shard.path.open("rb", buffering=0) as read,
                (self._out / name).open("r+b", buffering=0) as write,
                num_threads(1),  # pieces are too small to share: threads waited three times as long as they worked
            ):
                for tensor, new in readable[name].tensors.items():  # in the order of the data
                    old = shard.tensors[tensor]
                    read.seek(shard.start + old["data_offsets"][0])
                    write.seek(readable[name].start + new["data_offsets"][0])
                    rewrite_tensor(read, write, tensor, old, new, self._rewrite.get(tensor))
        return readable

    def _write_unchanged(self, task: progress.Task) -> Iterator[Written]:
        """Copies what is as in the source, piece by piece, and writes the index."""
        for name, plan in self._plans.items():
            path, mode = self._out / name, "r+b" if plan.changed else "wb"
            with plan.source.path.open("rb", buffering=0) as read, path.open(mode, buffering=0) as write:
                for source, target, size in self._as_they_are(name):
                    for at, step in copy_bytes(read, write, source, target, size):
                        task.update(step)
                        yield Written(path, at, step)
            self._check_finite(name)  # while the pages of what was read are still in memory
        if SINGLE not in self._plans:
            self._write_index()

    def _check_finite(self, name: str) -> None:
        """ValueError for NaN or infinity in what was copied as it is; `rewrite_tensor` looks at the rest."""
        plan = self._plans[name]
        copied = {
            t: tensor
            for t, tensor in plan.source.tensors.items()
            if t not in plan.changed and not OLD_BUFFERS.search(t)  # masks may be of -inf, and nothing reads them
        }
        if tensor := first_not_finite(replace(plan.source, tensors=copied)):
            raise not_finite(plan.source.path, tensor)

    def _as_they_are(self, name: str) -> Iterator[tuple[int, int, int]]:
        """(where in the source's file, where in ours, bytes): all of it, or the tensors that do not change."""
        plan = self._plans[name]
        if not plan.changed:
            yield 0, 0, plan.source.path.stat().st_size
            return
        data = len(plan.header)
        for tensor, new in plan.tensors.items():
            if tensor not in plan.changed:
                start, end = plan.source.tensors[tensor]["data_offsets"]
                yield plan.source.start + start, data + new["data_offsets"][0], end - start

    def _write_index(self) -> None:
        source = next(iter(self._plans.values())).source.path.parent
        index = json.loads((source / INDEX).read_text())
        metadata = index.get("metadata")
        metadata = dict(metadata) if isinstance(metadata, dict) else {}
        if "total_parameters" in metadata:
            shapes = (tensor["shape"] for plan in self._plans.values() for tensor in plan.tensors.values())
            metadata["total_parameters"] = sum(math.prod(shape) for shape in shapes)
        index["metadata"] = {**metadata, "total_size": self.num_bytes}
        (self._out / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _check(self, out: Path) -> None:
        """ValueError unless what was written, to become `out`, is as planned: headers, and some bytes of every copied piece."""
        try:
            written = read_shards(self._out)
        except ValueError as error:
            raise ValueError(
                f"out={out}: its weights were not written as planned ({error}); is something writing there?"
            ) from error
        for name, shard in written.items():
            plan = self._plans[name]
            wrong = shard.tensors != (plan.tensors if plan.changed else plan.source.tensors)
            with plan.source.path.open("rb") as theirs, shard.path.open("rb") as ours:
                same = (
                    _samples(theirs, plan.source, t) == _samples(ours, shard, t)
                    for t in plan.source.tensors.keys() - plan.changed
                )
                if wrong or not all(same):
                    raise ValueError(
                        f"out={out}: {name} was not written as planned; is something writing to it, or to {plan.source.path}?"
                    )


def _samples(file: io.BufferedIOBase, shard: Shard, tensor: str) -> list[bytes]:
    """`_SAMPLE` bytes from the beginning of a tensor, every `PIECE` further, and its end."""
    start, end = (shard.start + offset for offset in shard.tensors[tensor]["data_offsets"])

    def at(place: int) -> bytes:
        file.seek(place)
        return file.read(min(_SAMPLE, end - place))

    return [at(place) for place in [*range(start, end, PIECE), max(start, end - _SAMPLE)]]
