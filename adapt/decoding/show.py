"""Refinement to look at: a streamer that redraws the canvas in the terminal after each round."""

from __future__ import annotations

import math
import re
import shutil
import sys
import time
from typing import Any, TextIO

from torch import Tensor
from transformers import PreTrainedTokenizerBase

# A newline that was kept, or an escape sequence, would tear the canvas apart: each control character is one sign.
_SIGNS = {code: 0x2400 + code for code in range(32)} | {ord("\n"): "↵", ord("\t"): "⇥", 127: "␡"}


class CanvasView:
    """A streamer that redraws the first row's canvas after each round: new tokens in bold, blanks as dots, newlines as ↵."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, mask_token_id: int, num_prompt: int, file: TextIO | None = None
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.mask_token_id, self.num_prompt, self.file = mask_token_id, num_prompt, file or sys.stderr
        self.live = self.file.isatty()
        self.round, self.lines, self.before = 0, 0, None

    def put(self, value: Tensor) -> None:
        self.round += 1

        def decode(tokens: list[int]) -> str:
            return self.tokenizer.decode(tokens).translate(_SIGNS)

        canvas = value[0, self.num_prompt :].tolist()
        before = self.before or [self.mask_token_id] * len(canvas)
        end = self.tokenizer.eos_token_id
        pieces: list[str] = []
        run: list[int] = []
        for i, token in enumerate(canvas):
            if token == end or token == self.mask_token_id:
                pieces += [decode(run), "·" if token != end else ""]
                run = []
            elif self.live and token != before[i]:
                pieces += [decode(run), f"\033[1;32m{decode([token])}\033[0m"]
                run = []
            else:
                run.append(token)
        text = "".join([*pieces, decode(run)])
        if self.live and self.lines:
            print(f"\033[{self.lines}F\033[J", end="", file=self.file)
        print(f"round {self.round:3d}  {text}", file=self.file, flush=True)
        columns = shutil.get_terminal_size().columns
        shown = f"round {self.round:3d}  " + re.sub(r"\033\[[\d;]*m", "", text)
        self.lines = max(1, math.ceil(len(shown) / columns))
        self.before = canvas
        if self.live:
            time.sleep(0.05)  # a small model is faster than the eye

    def end(self) -> None:
        self.lines = 0
