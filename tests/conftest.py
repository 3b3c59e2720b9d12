"""What holds for every test: no network, one thread per process, and one place where several processes may run."""

import gc
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch, transformers or matplotlib are imported. What a test launches inherits it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault(
    "ADAPT_PROGRESS_SECONDS", "0"
)  # what a slow machine has time to say would be in what tests compare
# DeepSpeed compiles an op here: two checkouts would rebuild each other's, and a killed build leaves a lock that all wait for.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
# `deepspeed` and `ninja` of this environment, whether it is activated or not.
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")

import pytest

if TYPE_CHECKING:
    from adapt.lm import DiffusionLM


# first: pytest-xdist reads the groups in its own hook
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`distributed` tests come first and share one xdist worker: two launches at a time would fight for the cores."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if item.get_closest_marker("distributed"):
                item.add_marker(pytest.mark.xdist_group("distributed"))
    items.sort(key=lambda item: item.get_closest_marker("distributed") is None)


def pytest_collection_finish() -> None:
    """Garbage is not looked for in what the imports made: accelerate collects after each run, for a third of a tiny one's time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _no_shared_memory_left(request: pytest.FixtureRequest):
    """Removes the 67 MB that each killed rank of a DeepSpeed run on CPU leaves in /dev/shm."""
    if request.node.get_closest_marker("distributed") is None:
        yield
        return
    before = set(Path("/dev/shm").glob("*deepspeed_allreduce_buffer_*"))  # and its lock
    yield
    for left in set(Path("/dev/shm").glob("*deepspeed_allreduce_buffer_*")) - before:
        left.unlink(missing_ok=True)


@pytest.fixture
def free_port() -> int:
    """A TCP port nobody listens on, for `deepspeed --master_port`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """base_folder("llama") is a tiny random causal LM with its tokenizer; also qwen3, gemma3, gpt2, stablelm."""
    from tiny_models import build_tokenizer, save_base

    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_base(kind, tmp_path_factory.mktemp(kind), build_tokenizer())
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def checkpoint_folder(
    base_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """checkpoint_folder("llama", "prefix", shift_logits=False): that model, converted. Not to be written to.

    "block/causal" and "block/block" are block attention of 4 tokens with that clean context.
    """
    from adapt.conversion.convert import convert

    made: dict[tuple, Path] = {}

    def folder(kind: str, attention: str, shift_logits: bool = False) -> Path:
        key = (kind, attention, shift_logits)
        if key not in made:
            out = tmp_path_factory.mktemp("converted") / "-".join(map(str, key)).replace("/", "-")
            attention, _, clean_context = attention.partition("/")
            of_blocks = {"block_size": 4, "clean_context": clean_context} if clean_context else {}
            made[key] = convert(
                base_folder(kind), out, attention=attention, shift_logits=shift_logits, verify=False, **of_blocks
            )
        return made[key]

    return folder


@pytest.fixture(scope="session")
def diffusion_lm(checkpoint_folder: Callable[..., Path]) -> "Callable[..., DiffusionLM]":
    """diffusion_lm("llama", "prefix", shift_logits=False): the checkpoint, loaded and probed. Not to be changed."""
    import adapt

    made: dict[tuple, DiffusionLM] = {}

    def lm(kind: str, attention: str, shift_logits: bool = False) -> "DiffusionLM":
        key = (kind, attention, shift_logits)
        if key not in made:
            made[key] = adapt.load(checkpoint_folder(*key), device="cpu")
        return made[key]

    return lm
