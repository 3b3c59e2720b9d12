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

from ..files.model_config import check_sizes

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U32, _STRING, _ARRAY = 4, 8, 9
_VOCABULARY = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges"))
NEED_VOCABULARY = frozenset({"gpt2", "starcoder2"})
"""architectures whose vocab_size transformers takes from the tokens alone"""

_MOST_ALIGNMENT = 1 << 20  # bytes; llama.cpp writes 32
# What GGUF calls the numbers that make modules and tensors, and what a config.json does.
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "v_head_dim",
    "rope.dimension_count": "rotary_dim",
    "expert_count": "num_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_MAY_BE_ZERO = ("expert_count", "expert_feed_forward_length", "feed_forward_length")


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
    shapes: dict[str, tuple[int, ...]]
    """of the tensors; torch's are these from the last to the first"""
    entries: dict[str, _Entry]
    tensors: int
    """where the list of tensors begins"""

    @property
    def alignment(self) -> int:
        return self.get("general.alignment") or 32

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
            tensors, shapes = at, {}
            for _ in range(num_tensors):
                name, at = _string(data, at)
                (dimensions,) = struct.unpack_from("<I", data, at)
                if dimensions > 8 or name in shapes:
                    raise ValueError(f"a tensor {name[:60]!r} with {dimensions} dimensions, or twice")
                shapes[name] = struct.unpack_from(f"<{dimensions}Q", data, at + 4)
                at += 4 + 8 * dimensions + 4 + 8  # shape, type, place
            if at > len(data):
                raise ValueError("its list of tensors goes beyond its end")
            header = Header(path, data[:at], version, shapes, entries, tensors)
            _check_numbers(header)
            return header
    # Bytes that are no UTF-8 are a ValueError too; places beyond what an offset can be are the last two.
    except (ValueError, struct.error, IndexError, OverflowError) as error:
        raise ValueError(f"base={path}: damaged GGUF file ({error}); download it again") from error


def _check_numbers(header: Header) -> None:
    """ValueError for numbers that no model has, before a library makes lists, modules and paddings of them."""
    entry, alignment = header.entries.get("general.alignment"), header.alignment
    if entry is not None and (entry.kind != _U32 or alignment & (alignment - 1) or alignment > _MOST_ALIGNMENT):
        raise ValueError(f"general.alignment={alignment}; must be a power of two, at most {_MOST_ALIGNMENT}")
    architecture = header.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError("general.architecture is not there, or no text")
    for name, config_name in _SIZES.items():
        key = f"{architecture}.{name}"
        if key not in header.entries or header.entries[key].kind == _ARRAY:  # one for each layer
            continue
        value = header.get(key)
        if type(value) is not int or value < (0 if name in _MAY_BE_ZERO else 1):
            raise ValueError(f"{key}={value!r:.60}; must be a whole number of at least 1")
        check_sizes({config_name: value}, f"{key}:")


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
    alignment = header.alignment
    with out.open("wb") as write, header.path.open("rb") as read:
        write.write(b"GGUF" + struct.pack("<IQQ", header.version, len(header.shapes) if weights else 0, len(encoded)))
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
