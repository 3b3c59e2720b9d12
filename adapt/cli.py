"""The `adapt` command: finds the verb's module, runs it, turns the user's mistakes into one line.

    adapt convert HuggingFaceTB/SmolLM2-135M-Instruct out/smollm2 --attention prefix
    adapt generate out/smollm2 --prompt "The capital of France is" --show

Nothing heavy is imported before a verb is known: `adapt --help` answers at once.
"""

import difflib
import importlib
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from typing import NamedTuple, TextIO

from . import progress
from .doctor import bug_report
from .files.shortage import shortage_line


class Verb(NamedTuple):
    target: str  # "module:function"; the function takes argv (without the verb) and returns an exit code or None
    summary: str


VERBS: dict[str, Verb] = {
    "convert": Verb(
        "adapt.conversion.command:main", "a causal LM (Hub id, folder or GGUF file) into a diffusion checkpoint"
    ),
    "plan": Verb("adapt.planning.plan:main", "what a recipe will cost: memory of each GPU, largest micro-batch, time"),
    "train": Verb(
        "adapt.training.command:main", "train a recipe in one process (on N GPUs: deepspeed recipes/train.py ...)"
    ),
    "plot": Verb(
        "adapt.training.watch.plot:main", "the curves of several runs against tokens, as a figure and a table"
    ),
    "generate": Verb("adapt.generate:main", "write text, or fill blanks, by refining"),
    "compare": Verb("adapt_eval.compare_command:main", "quality and speed against the original, with intervals"),
    "lm_eval": Verb("adapt_eval.lm_eval_command:main", "lm-eval's own command line, with `--model adapt`"),
    "export": Verb("adapt.export.command:main", "a folder that works without this package"),
    "doctor": Verb("adapt.doctor.doctor:main", "what this machine can run, and what is missing"),
    "quickstart": Verb("adapt_recipes.quickstart.quickstart:main", "the whole path on a small model, on a laptop CPU"),
}

_EXAMPLES = """\
examples:
  adapt quickstart
  adapt convert HuggingFaceTB/SmolLM2-135M-Instruct out/smollm2 --attention prefix
  adapt generate out/smollm2 --prompt "The capital of France is" --show
  adapt compare --base HuggingFaceTB/SmolLM2-135M-Instruct --adapted out/smollm2 --tasks gsm8k --out out/report
  adapt VERB --help        the verb's options and examples
  ADAPT_PROGRESS_SECONDS=60 adapt VERB ... 2> log    a line a minute, not every ten seconds
  adapt VERB ... --debug   the whole traceback instead of one line, and all that libraries say"""

# Which extra brings a module that a verb may miss; tests/test_cli.py holds this against pyproject.toml.
_EXTRA_OF_MODULE = {
    "accelerate": "train",
    "bitsandbytes": "quant",
    "datasets": "train",
    "deepspeed": "train",
    "gguf": "train",
    "jinja2": "report",
    "lm_eval": "eval",
    "matplotlib": "report",
    "ninja": "train",
    "peft": "train",
    "scipy": "eval",
    "tensorboard": "track",
    "trackio": "track",
    "wandb": "track",
}

# What libraries raise for a user's file and derive from neither ValueError nor OSError; by name, so that neither is
# imported here.
_USER_ERROR_NAMES = {"HTTPError", "SafetensorError", "YAMLError"}  # httpx, which huggingface_hub asks with, has its own


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 after a one-line error, 2 for wrong usage, 130 when interrupted.

    With `--debug` anywhere among the arguments an error is raised, not summed up, and libraries say what they like.
    """
    _open_closed_streams()
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if not args or args[0] in ("-h", "--help"):
        return _printed(_help())
    if args[0] == "--version":
        return _printed(_version())
    verb, *rest = args
    if verb not in VERBS:
        return _complain("adapt", _unknown(verb), code=2)

    _put_own_scripts_on_path()
    progress.debug = debug
    if not debug:
        _quiet_libraries()
    try:
        return _quiet_when_closed(lambda: _run(verb, rest))
    except KeyboardInterrupt:
        if debug:
            raise
        return 130 if os.environ.get("RANK", "0") != "0" else _complain(f"adapt {verb}", "interrupted", code=130)
    except Exception as error:
        if debug:
            raise
        try:
            line = _one_line(error)
        except Exception:  # even its words fail
            line = None
        return _complain(f"adapt {verb}", line or bug_report.written(error, [verb, *rest]), code=1)


def _run(verb: str, args: list[str]) -> int | None:
    """Runs it, and speaks for what does not speak for itself."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if not os.environ.get(name, "0").isdecimal():
            raise ValueError(f"{name}={os.environ[name]}: must be a whole number, as a launcher sets it; unset it")
    module, _, function = VERBS[verb].target.partition(":")
    with progress.doing(f"adapt {verb}", bar=False):
        with progress.doing(f"adapt {verb}: starting"):
            run: Callable[[list[str]], int | None] = getattr(importlib.import_module(module), function)
        return run(args)


def _quiet_libraries() -> None:
    """Leaves the console to us: errors of libraries stay, their bars, advice and warnings go.

    Best before they are imported: most read the environment once. Processes that are started later inherit it.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # the default of all bars but ours
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name, call in (
        ("transformers", lambda library: library.logging.set_verbosity_error()),
        ("transformers", lambda library: library.logging.disable_progress_bar()),
        ("datasets", lambda library: library.disable_progress_bars()),
    ):
        if name in sys.modules:
            call(sys.modules[name])
    for name in ("accelerate", "bitsandbytes", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Filters, because these two set their level when they are imported.
    for name in ("DeepSpeed", "bitsandbytes.backends.cpu.ops"):
        logger = logging.getLogger(name)
        if _errors_alone not in logger.filters:
            logger.addFilter(_errors_alone)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|deepspeed|accelerate|peft")


def _errors_alone(record: logging.LogRecord) -> bool:
    return progress.debug or record.levelno >= logging.ERROR


def _quiet_when_closed(job: Callable[[], int | None]) -> int:
    """The job's exit code; 141 (128 + SIGPIPE) without a word when the reader of our output has gone (`| head`)."""
    try:
        code = job() or 0
        sys.stdout.flush()  # a closed pipe must show here, not in the interpreter's own flush at exit
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _printed(text: str) -> int:
    try:
        return _quiet_when_closed(lambda: print(text))
    except OSError as error:
        return _complain("adapt", f"output: cannot be written ({error.strerror}); give it another place", code=1)


def _open_closed_streams() -> None:
    """What was closed before we began (`>&-`) is None to Python, which libraries and we write to: it goes nowhere, without a word."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for as long as we run)


def _drop_unwritable(stream: TextIO) -> None:
    """Lets what a stream holds and cannot be written go nowhere: the interpreter would write it again at exit, and say so."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _one_line(error: Exception) -> str | None:
    """What to tell the user in one line, or None when only we can mend it."""
    if short := shortage_line(error):
        return short
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRA_OF_MODULE.get((error.name or "").partition(".")[0])
        if extra is None:
            return None
        return f"needs {error.name}, which is not installed; run: pip install 'adapt-dlm[{extra}]'"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, (ValueError, OSError)) or any(c.__name__ in _USER_ERROR_NAMES for c in type(error).__mro__):
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _complain(who: str, what: str, *, code: int) -> int:
    with suppress(OSError):  # a full disk: the exit code has to say it
        print(f"{who}: error: {what}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        _drop_unwritable(stream)
    return code


def _unknown(verb: str) -> str:
    close = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"unknown verb '{verb}': {hint}allowed: {', '.join(sorted(VERBS))}"


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    intro = "Turn a pretrained causal language model into a diffusion language model, and measure it."
    return f"usage: adapt VERB [options]\n\n{intro}\n\nverbs:\n{verbs}\n\n{_EXAMPLES}"


def _version() -> str:
    def of(distribution: str) -> str:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            return "not installed"

    others = ", ".join(f"{name} {of(name)}" for name in ("torch", "transformers", "deepspeed"))
    return f"adapt {of('adapt-dlm')} (Python {platform.python_version()}, {others})"


def _put_own_scripts_on_path() -> None:
    """Makes `deepspeed` and `ninja` of this environment findable when `.venv/bin/adapt` is run without activating it.

    torch compiles DeepSpeed's CPU ops with the `ninja` that it finds on PATH, and nothing else.
    """
    scripts = os.path.dirname(sys.executable)
    path = os.environ.get("PATH", "")
    if scripts not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, (scripts, path)))


if __name__ == "__main__":
    raise SystemExit(main())
