"""`adapt lm_eval`: lm-eval's own command line with `--model adapt` registered.

adapt lm_eval --model adapt --model_args pretrained=out/smollm2,threshold=0.8 --tasks gsm8k --batch_size 8
"""

from __future__ import annotations

import sys

from . import lm  # noqa: F401  registers the model
from .model_args import model_args_help


def main(argv: list[str]) -> int:
    """lm-eval's own command line with `--model adapt` registered; its help ends with the --model_args that are ours."""
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    # lm-eval puts `run` in front only of two arguments or more; one alone is a subcommand or --help.
    sys.argv = ["adapt lm_eval", *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
        if not argv or {"-h", "--help"} & set(argv):
            print(f"\n{model_args_help()}")
    return 0
