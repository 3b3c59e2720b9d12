"""Refinement as a picture: one line a round, what is new in colour, blanks as boxes. The notebook and the README draw with it."""

from __future__ import annotations

import io
from typing import Any

from adapt import GenerateOutput

INK, NEW, NEW_EDGE, BLANK, QUIET = "#0f172a", "#99f6e4", "#0d9488", "#e2e8f0", "#64748b"
LINE = 1.55  # height of a round, in units of a character's width
MARGIN = 3.4  # room for the number of the round, in characters


def pieces_of(lm: Any, output: GenerateOutput, num_prompt: int) -> tuple[list[str], list[list[bool]]]:
    """(the text of each token of the first row's answer [C], for each round which of them are settled [R, C]).

    output: of `generate` or `infill` with keep_history=True. The answer ends before the first end-of-text.
    """
    tokens = output.sequences[0, num_prompt:].tolist()
    length = tokens.index(lm.end_of_text) if lm.end_of_text in tokens else len(tokens)
    ends = [lm.tokenizer.decode(tokens[: i + 1]) for i in range(length)]
    pieces = [end[len(start) :] for start, end in zip(["", *ends], ends, strict=False)]
    blank = lm.spec.mask_token_id
    rounds = [[token != blank for token in state[0, num_prompt:][:length].tolist()] for state in output.history]
    return pieces, rounds


class Picture:
    """The rounds drawn; a notebook shows it, `save` writes it as PNG or SVG by the file's ending."""

    def __init__(self, pieces: list[str], rounds: list[list[bool]], *, title: str = "", scale: float = 0.115) -> None:
        from matplotlib import font_manager
        from matplotlib.figure import Figure

        font = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono"))
        pieces = [
            "".join(c if ord(c) in font.get_charmap() else "·" for c in piece.replace("\n", "⏎")) for piece in pieces
        ]
        widths = [max(1, len(piece)) for piece in pieces]
        starts = [sum(widths[:i]) for i in range(len(pieces))]
        width, height = MARGIN + sum(widths) + 0.6, LINE * len(rounds) + (2.2 if title else 0.3)
        self.figure = Figure(figsize=(scale * width, scale * height * 1.25), facecolor="white")
        axes = self.figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(-MARGIN, sum(widths) + 0.6)
        axes.set_ylim(height - (1.9 if title else 0.0), -(1.9 if title else 0.0))
        axes.axis("off")
        letters = {"family": "DejaVu Sans Mono", "fontsize": 72 * scale / 0.602, "va": "center"}
        small = letters | {"fontsize": 0.8 * letters["fontsize"]}
        if title:
            axes.text(0, -0.9, title, color=QUIET, **small)
        before = [False] * len(pieces)
        for number, settled in enumerate(rounds):
            y = LINE * (number + 0.5)
            axes.text(-0.7, y, str(number), color=QUIET, ha="right", **small)
            for piece, start, width, on, was_on in zip(pieces, starts, widths, settled, before, strict=True):
                if on:
                    axes.text(start, y, piece, color=INK, **letters)
                if not on or not was_on:
                    _box(axes, start, y, width, NEW if on else BLANK, NEW_EDGE if on else BLANK)
            before = settled

    def save(self, file: Any, dpi: int = 200) -> None:
        self.figure.savefig(file, dpi=dpi, metadata={"Software": None} if str(file).endswith(".png") else None)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        return buffer.getvalue()


def _box(axes: Any, x: float, y: float, width: float, fill: str, edge: str) -> None:
    from matplotlib.patches import Rectangle

    box = Rectangle((x + 0.06, y - 0.58), width - 0.12, 1.16, facecolor=fill, edgecolor=edge, linewidth=0.8, zorder=0)
    axes.add_patch(box)
