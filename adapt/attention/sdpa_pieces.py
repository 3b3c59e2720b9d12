"""The attention pattern as rectangles: SDPA on what is seen, instead of one dense mask over everything.

A row of packed documents, clean copies and noisy blocks sees a small part of its L x L square: a quarter of it for block
diffusion on [xt | x0]. `geometry` cuts a batch into pieces, each a stretch of queries and the stretches of keys that they see;
`sdpa_pieces` runs transformers' attention on them. A piece that sees all of its keys, or is causal, needs no mask, so that
SDPA's flash kernels apply; only groups of small blocks carry a mask, of their own rectangle. Padding is not computed at all.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .layout import PADDING_DOCUMENT, Layout
from .mask import mask_rule
from .windows import Span

NAME = "sdpa_pieces"
_LAYOUT = ("document", "view", "position", "context_length")  # what the mask rule reads of a row
GROUP = 128  # queries of small blocks that share a rectangle and its mask: fewer calls against less area


class Piece(NamedTuple):
    """Queries [start, stop) of rows [row, end_row) and the stretches of keys that they see; no keys: padding."""

    row: int
    end_row: int
    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]
    kind: str
    """full: every query sees every key; causal; or rule: the mask rule decides"""


@dataclass(frozen=True)
class Geometry:
    """The pieces of a batch, on the host; an object of its own, because loaders take a tuple in a batch apart."""

    pieces: tuple[Piece, ...]
    key: bytes = b""
    """digest of all that the mask rule reads: batches of one key have one mask"""


class MaskedPiece(NamedTuple):
    piece: Piece
    mask: Tensor | None  # [1, 1, Q, K], True where seen


Masked = dict[str, list[MaskedPiece]]
"""The pieces of a batch with the masks that they need, by layer type; under "" where all layers are of one kind."""


def geometry(rows: list[dict[str, Tensor]], length: int) -> Geometry:
    """The pieces of a batch of packed rows (`collate.pack`), padded to `length`; on the host, small and hashable."""
    pieces: list[Piece] = []
    start = 0
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and _same_layout(rows[start], rows[stop]):
            stop += 1
        pieces += [Piece(start, stop, *rest) for rest in _of_row(rows[start], length)]
        start = stop
    digest = hashlib.blake2b(str(length).encode(), digest_size=16)
    for row in rows:
        for key in _LAYOUT:
            digest.update(row[key].numpy().tobytes())
        digest.update(b"/")
    return Geometry(tuple(pieces), digest.digest())


def geometry_of(layout: Layout) -> Geometry:
    """The pieces of a layout whose rows may differ in anything; waits for the device that it is on."""
    context_lengths = layout.position_ids + 1 if layout.context_lengths is None else layout.context_lengths
    tensors = (layout.document_ids, layout.view_ids, layout.position_ids, context_lengths)
    rows: list[dict[str, Tensor]] = [
        dict(zip(_LAYOUT, (x[b].cpu() for x in tensors), strict=True)) for b in range(len(layout.position_ids))
    ]
    return geometry(rows, layout.position_ids.shape[1])


def with_masks(
    geometry: Geometry, layout: Layout, windows: dict[str, Span] | Span, right_window: Tensor | int | None
) -> Masked:
    """The pieces with the masks that they need, by layer type; under "" where all layers are of one kind."""
    made: dict[Span, list[MaskedPiece]] = {}
    by_kind = windows if isinstance(windows, dict) else {"": windows}
    for window in set(by_kind.values()):
        rule = mask_rule(layout, layout, window=window, right_window=right_window)
        made[window] = [
            MaskedPiece(piece, _mask(piece, rule, layout, window, right_window)) for piece in geometry.pieces
        ]
    return {kind: made[window] for kind, window in by_kind.items()}


def sdpa_pieces(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    pieces: Masked | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [B, H, L, D] queries, keys and values -> [B, L, H, D].

    Without pieces it is transformers' own SDPA. Raises ValueError where an architecture does not hand them on.
    """
    if pieces is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise ValueError(
                f"model.attn_implementation={NAME}: {type(module).__name__} does not take what it needs; use sdpa"
            )
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    more = [name for name in ("position_bias", "s_aux", "softcap") if kwargs.get(name) is not None]
    if more:
        raise ValueError(
            f"model.attn_implementation={NAME}: does not know the {', '.join(more)} of {type(module).__name__}; use "
            "flex_attention or eager"
        )
    attention: Any = module
    kind = attention.config.layer_types[attention.layer_idx] if len(pieces) > 1 else next(iter(pieces))
    return _run(pieces[kind], query, key, value, dropout, scaling), None


def _run(
    chosen: list[MaskedPiece], query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    gqa = query.shape[1] != key.shape[1]
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for piece, mask in chosen:
        rows = slice(piece.row, piece.end_row)
        queries = query[rows, :, piece.start : piece.stop]
        parts = groups.setdefault((piece.row, piece.end_row), [])
        if not piece.keys:
            parts.append(queries.new_zeros(*queries.shape[:-1], value.shape[-1]))  # MLA: not the queries' width
            continue
        keys, values = (_stretches(x[rows], piece.keys) for x in (key, value))
        # CUDA has no fast kernel for grouped heads with a mask or in float32: torch's own fallback keeps all scores.
        if gqa and query.is_cuda and (mask is not None or value.dtype == torch.float32):
            keys, values = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (keys, values))
        parts.append(
            F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and piece.kind == "causal",
                scale=scaling,
                enable_gqa=queries.shape[1] != keys.shape[1],
            )
        )
    return (
        torch.cat([torch.cat(parts, dim=2) for parts in groups.values()]).transpose(1, 2).contiguous()
    )  # AfMoE views it


def _stretches(x: Tensor, stretches: tuple[tuple[int, int], ...]) -> Tensor:
    parts = [x[:, :, start:stop] for start, stop in stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _same_layout(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in _LAYOUT)


def _of_row(row: dict[str, Tensor], length: int) -> list[tuple[int, int, tuple[tuple[int, int], ...], str]]:
    """(start, stop, keys, kind) of one row, in order and without gaps up to `length`."""
    document, view = row["document"], row["view"]
    found: list[tuple[int, int, tuple[tuple[int, int], ...], str]] = []
    changes = (document[1:] != document[:-1]) | (view[1:] != view[:-1])
    edges = [0, *(changes.nonzero().flatten() + 1).tolist(), len(document)]
    clean = (0, 0)  # where the document's clean copy stands
    group: list[
        tuple[int, int, int]
    ] = []  # canvases (start, stop, tokens of the clean copy that they see) of one piece

    def close() -> None:
        if group:
            start, stop, sees = group[0][0], group[-1][1], max(canvas[2] for canvas in group)
            keys = _joined((clean[0], min(clean[0] + sees, clean[1])), (start, stop))
            found.append((start, stop, keys, "full" if len(group) == 1 else "rule"))
            group.clear()

    for start, stop in itertools.pairwise(edges):
        if start == stop:
            continue
        new_document = start == 0 or document[start] != document[start - 1]
        if new_document or (group and stop - group[0][0] > GROUP):
            close()
        if document[start] == PADDING_DOCUMENT:
            found.append((start, stop, (), "full"))
        elif view[start] == 0:
            close()
            clean = (start, stop)
            found += _clean(row, start, stop)
        else:
            clean = (start, start) if new_document else clean
            group.append((start, stop, int(row["context_length"][start])))
    close()
    if length > len(document):
        found.append((len(document), length, (), "full"))
    return found


def _clean(row: dict[str, Tensor], start: int, stop: int) -> list[tuple[int, int, tuple[tuple[int, int], ...], str]]:
    sees = row["context_length"][start:stop]
    if torch.equal(sees, row["position"][start:stop] + 1):
        return [(start, stop, ((start, stop),), "causal")]
    firsts = range(start, stop, GROUP)
    return [
        (first, last, ((start, min(start + int(sees[first - start : last - start].max()), stop)),), "rule")
        for first, last in ((first, min(first + GROUP, stop)) for first in firsts)
    ]


def _joined(one: tuple[int, int], other: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    if one[0] == one[1]:
        return (other,)
    return ((one[0], other[1]),) if one[1] == other[0] else (one, other)


def _mask(piece: Piece, rule: Any, layout: Layout, window: Span, right_window: Tensor | int | None) -> Tensor | None:
    needs_rule = window is not None or (right_window is not None and piece.kind != "causal")
    if not piece.keys or (piece.kind != "rule" and not needs_rule):
        return None
    device = layout.position_ids.device
    queries = torch.arange(piece.start, piece.stop, device=device)[:, None]
    keys = torch.cat([torch.arange(start, stop, device=device) for start, stop in piece.keys])
    zero = torch.zeros((), dtype=torch.long, device=device)
    return rule(zero + piece.row, zero, queries, keys)[None, None]


AttentionInterface.register(NAME, sdpa_pieces)
AttentionMaskInterface.register(NAME, sdpa_mask)
