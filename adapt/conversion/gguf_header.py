"""What stands before a GGUF's weights: its metadata, and how to do without the vocabulary in it.

gguf's own reader makes numpy objects of every token, its score and its kind, and transformers reads a file three times: of a Gemma 3 of
270M parameters with its 262,144 tokens that took 53 of 82 CPU seconds. For weights and config the number of tokens is enough.
"""

from __future__ import annotations

import mmap
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U32, _STRING, _ARRAY = 4, 8, 9
_VOCABULARY = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges"))
NEED_VOCABULARY = frozenset({"gpt2", "starcoder2"})
"""architectures whose vocab_size transformers takes from the tokens alone"""


class _Entry(NamedTuple):
    """Where one key and its value lie in the file."""

    begin: int
    kind: int
    value: int
    end: int


@dataclass(frozen=True)
class Header:
    """Metadata of the GGUF at `path`, and where its list of tensors lies."""

    path: Path
    data: bytes
    """of the file, up to the end of the list of tensors"""
    version: int
    num_tensors: int
    entries: dict[str, _Entry]
    tensors: int
    """where the list of tensors begins"""

    def get(self, key: str) -> Any:
        """A number, text or bool; of an array its length; None where the key is not there."""
        if (entry := self.entries.get(key)) is None:
            return None
        if entry.kind == _STRING:
            return self.data[entry.value + 8 : entry.end].decode()
        if entry.kind == _ARRAY:
            return struct.unpack_from("<Q", self.data, entry.value + 4)[0]
        return struct.unpack_from(f"<{_SCALARS[entry.kind]}", self.data, entry.value)[0]


def read_header(path: Path) -> Header:
    """ValueError where the file is cut short in its header, or has things in it that GGUF 2 and 3 do not know."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            version, num_tensors, num_entries = struct.unpack_from("<IQQ", data, 4)
            if version not in (2, 3):
                raise ValueError(f"version {version}, not 2 or 3")
            entries, at = {}, 24
            for _ in range(num_entries):
                begin, (key, at) = at, _string(data, at)
                (kind,) = struct.unpack_from("<I", data, at)
                entries[key] = _Entry(begin, kind, at + 4, at := _end_of_value(data, kind, at + 4))
            tensors = at
            for _ in range(num_tensors):
                _, at = _string(data, at)
                (dimensions,) = struct.unpack_from("<I", data, at)
                at += 4 + 8 * dimensions + 4 + 8  # shape, type, place
            if at > len(data):
                raise ValueError("its list of tensors goes beyond its end")
            return Header(path, data[:at], version, num_tensors, entries, tensors)
    except (ValueError, struct.error) as error:  # bytes that are no UTF-8 are a ValueError too
        raise ValueError(f"base={path}: damaged GGUF file ({error}); download it again") from error


def write_without_vocabulary(header: Header, out: Path, *, weights: bool = True) -> Path:
    """The same GGUF at `out`, where the number of tokens stands for them; with no tensors unless `weights`."""
    architecture = header.get("general.architecture")
    kept = {
        key: entry for key, entry in header.entries.items() if architecture in NEED_VOCABULARY or key not in _VOCABULARY
    }
    encoded = [header.data[entry.begin : entry.end] for entry in kept.values()]
    if (num_tokens := header.get("tokenizer.ggml.tokens")) is not None:
        added = {f"{architecture}.vocab_size", "tokenizer.ggml.tokens"} - kept.keys()
        encoded += [_u32(key, num_tokens) for key in sorted(added)]
    alignment = header.get("general.alignment") or 32
    with out.open("wb") as write, header.path.open("rb") as read:
        write.write(b"GGUF" + struct.pack("<IQQ", header.version, header.num_tensors if weights else 0, len(encoded)))
        write.writelines(encoded)
        if weights:
            write.write(header.data[header.tensors :])
            write.write(b"\0" * (-write.tell() % alignment))
            read.seek(len(header.data) + -len(header.data) % alignment)
            shutil.copyfileobj(read, write, 1 << 22)
    return out


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    end = _end_of_string(data, at)
    return data[at + 8 : end].decode(), end


def _end_of_string(data: mmap.mmap, at: int) -> int:
    return at + 8 + struct.unpack_from("<Q", data, at)[0]


def _end_of_value(data: mmap.mmap, kind: int, at: int) -> int:
    if kind == _STRING:
        return _end_of_string(data, at)
    if kind != _ARRAY:
        return at + struct.calcsize(f"<{_scalar(kind)}")
    of, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if of != _STRING:
        return at + count * struct.calcsize(f"<{_scalar(of)}")
    for _ in range(count):
        at = _end_of_string(data, at)
    return at


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of type {kind}")
    return _SCALARS[kind]


def _u32(key: str, value: int) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<II", _U32, value)
