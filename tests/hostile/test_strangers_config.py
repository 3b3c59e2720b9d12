"""config.json edited by hand: numbers that no model has, tensors that it does not know, a `diffusion` section of other types."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attack import attack, run
from damage import edited, tensors, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_strangers_code import CALLS

from adapt.spec import DiffusionSpec

CONFIG = "config.json"


def config(key: str, to: Any) -> Callable[[Path], None]:
    return edited(CONFIG, key, to=to)


def diffusion(key: str, to: Any) -> Callable[[Path], None]:
    return edited(CONFIG, "diffusion", key, to=to)


SIZES: dict[str, tuple[Callable[[Path], None], str]] = {
    f"{key}={to}": (config(key, to), key)
    for key, values in {
        "num_hidden_layers": (10**9, -2, 0, math.nan, math.inf, 2**63, 60_000),
        "hidden_size": (2**50, 0, -32, math.nan),
        "vocab_size": (10**10, 0, math.inf),
        "num_attention_heads": (0, 10**7, -4),
        "intermediate_size": (10**12, -3),
        "max_position_embeddings": (2**50, 0, -2, math.nan),
        "num_key_value_heads": (10**8,),
    }.items()
    for to in values
}
SIZES |= {
    f"{key}={to}": (config(key, to), key)
    for key, to in [
        ("num_labels", 10**9),
        ("num_labels", 3 * 10**7),
        ("attention_types", [[["global"], 10**8]]),
        ("attention_types", [[["global"], 1000]] * 9),
        ("hidden_sizes", [10**12]),
    ]
}
TOKENIZERS: dict[str, tuple[Callable[[Path], None], str]] = {
    f"{key}={to}": (edited("tokenizer_config.json", key, to=to), f"tokenizer_config.json says {key}")
    for key, to in [("extra_ids", 10**9), ("offset", 10**9), ("offset", -5), ("init_inputs", ["a", 10**9])]
}
TYPES: dict[str, tuple[Callable[[Path], None], str]] = {
    **{f"hidden_size={to!r}": (config("hidden_size", to), "") for to in ("32", [32], {"a": 1}, None, 32.5)},
    **{f"num_hidden_layers={to!r}": (config("num_hidden_layers", to), "") for to in ("two", [2], None)},
    "heads that do not divide": (config("num_attention_heads", 5), ""),
    "an unknown model_type": (config("model_type", "zzz"), "makes no model"),
    "a model_type of a list": (config("model_type", ["llama"]), "makes no model"),
    "an unknown activation": (config("hidden_act", "__import__('os')"), "makes no model"),
    "quantised": (config("quantization_config", {"quant_method": "fp8"}), "quantised"),
    "a list": (text(CONFIG, "[1]"), "not valid JSON"),
    "no JSON": (text(CONFIG, "{'a': 1}"), "not valid JSON"),
    "a key twice": (text(CONFIG, '{"model_type": "llama", "model_type": "gpt2"}'), "'model_type' is there twice"),
    "bottomless": (text(CONFIG, '{"a":' * 100_000 + "1" + "}" * 100_000), "not valid JSON"),
}
# What only the weights show, which plan does not read.
WEIGHTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "fewer layers than are stored": (config("num_hidden_layers", 1), "has no place for (model.layers.1."),
    "more layers than are stored": (config("num_hidden_layers", 3), "no weights for model.layers.2."),
    "fifty layers": (config("num_hidden_layers", 50), "config.json asks for"),
    "another intermediate size": (config("intermediate_size", 49), "is stored with the shape"),
    "another hidden size": (config("hidden_size", 64), "is stored with the shape"),
    "another vocabulary": (config("vocab_size", 40), "is stored with the shape"),
    "a tensor of another model": (tensors(lambda w: w.update(x=torch.ones(3))), "has no place for (x)"),
    "a tensor too few": (tensors(lambda w: w.pop("model.norm.weight")), "no weights for model.norm.weight"),
}
SECTIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    **{f"attention={to!r}": (diffusion("attention", to), "diffusion.attention=") for to in (7, None, ["prefix"], "sideways", True)},
    **{f"mask={to!r}": (diffusion("mask_token_id", to), "diffusion.mask_token_id") for to in ("5", -1, 10**9, 5.0, None, True, [5])},
    **{f"shift={to!r}": (diffusion("shift_logits", to), "diffusion.shift_logits=") for to in ("no", 1, None, [])},
    **{f"block_size={to!r}": (diffusion("block_size", to), "diffusion.block_size=") for to in ("4", 4.5, [4], False)},
    **{f"noise={to!r}": (diffusion("noise", to), "diffusion.noise=") for to in (1, None, "pink")},
    **{f"p_uniform={to!r}": (diffusion("p_uniform", to), "diffusion.p_uniform=") for to in (0.5, "0.5", [], True)},
    **{f"version={to!r}": (diffusion("format_version", to), "diffusion.format_version=") for to in (2, "1", None, 1.0)},
    "clean_context of a number": (diffusion("clean_context", 3), "diffusion.clean_context="),
    "base_model of a list": (diffusion("base_model", ["a"]), "diffusion.base_model="),
    "an unknown key": (diffusion("evil", 1), "unknown keys"),
    "no attention": (config("diffusion", {"mask_token_id": 3}), "lacks attention"),
    "a block of nothing": (config("diffusion", {"attention": "block", "mask_token_id": 3}), "diffusion.block_size=None"),
    "a list": (config("diffusion", ["prefix"]), "section is ['prefix'], not an object"),
    "a word": (config("diffusion", "prefix"), "section is 'prefix', not an object"),
}  # fmt: skip
QUICK = ("plan of a checkpoint", "train", "generate", "export")
SLOW = ("train left to right", "compare, the base", "compare, the adapted")
OF_SLOW = (
    *(
        "num_hidden_layers=1000000000",
        "hidden_size=0",
        "vocab_size=inf",
        "num_attention_heads=0",
        "no JSON",
        "quantised",
    ),
    *("fewer layers than are stored", "more layers than are stored", "another vocabulary", "a tensor of another model"),
)
ALL = SIZES | TYPES | WEIGHTS | TOKENIZERS
ROWS = [
    *((call, name) for name in ALL for call in QUICK if not (call.startswith("plan") and name in WEIGHTS | TOKENIZERS)),
    *((call, name) for name in OF_SLOW for call in SLOW),
    *(("lm_eval", name) for name in OF_SLOW[:2]),  # it reads thousands of tasks first
]


@pytest.mark.parametrize("call, name", ROWS)
def test_a_config_that_no_model_has_is_refused(yard: Path, call: str, name: str) -> None:
    (folder, argv), (change, says) = CALLS[call], ALL[name]
    change(yard / folder)
    attack(yard, argv, says, may_write=["run"])


# Plan has no embedding that tells how many tokens there are.
OF_SECTIONS = [(call, name) for call in QUICK for name in SECTIONS if not (call.startswith("plan") and "10000" in name)]


@pytest.mark.parametrize("call, name", OF_SECTIONS)
def test_a_diffusion_section_of_other_types_is_refused(yard: Path, call: str, name: str) -> None:
    change, says = SECTIONS[name]
    change(yard / "checkpoint")
    attack(yard, CALLS[call][1], says, may_write=["run"])


@pytest.mark.parametrize("call", QUICK[1:])  # plan reads no weights to hold them against
def test_no_memory_is_taken_for_sizes_that_no_model_has(yard: Path, call: str) -> None:
    edited(CONFIG, "num_hidden_layers", to=100)(yard / "checkpoint")
    edited(CONFIG, "intermediate_size", to=2**27)(yard / "checkpoint")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attack(yard, CALLS[call][1], "config.json", may_write=["run"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10  # KiB


LINKS = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "model.safetensors",
    "chat_template.jinja",
]


@pytest.mark.parametrize("file", LINKS)
@pytest.mark.parametrize("call", ["convert", "train that converts", *QUICK, "compare, the base"])
def test_a_link_out_of_a_model_folder_is_not_followed(yard: Path, call: str, file: str) -> None:
    folder, argv = CALLS[call]
    secret = yard / "secret"
    secret.write_text('{"key": "-----BEGIN PRIVATE KEY-----"}')
    (yard / folder / file).unlink(missing_ok=True)
    (yard / folder / file).symlink_to(os.path.relpath(secret, yard / folder))
    attack(yard, argv, f"{file} is a link", may_write=["run"])
    assert not [
        path
        for path in (yard / "run").rglob("*")
        if path.is_file() and "PRIVATE KEY" in path.read_text(errors="replace")
    ]


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("call", ["convert", *QUICK])
def test_a_pipe_in_a_model_folder_is_not_waited_for(yard: Path, call: str, file: str) -> None:
    folder, argv = CALLS[call]
    (yard / folder / file).unlink()
    os.mkfifo(yard / folder / file)
    attack(yard, argv, "", may_write=["run"])


def test_the_hubs_cache_of_links_is_read(yard: Path) -> None:
    """snapshots/REVISION/config.json -> ../../blobs/HASH"""
    snapshot, blobs = yard / "models--a--b" / "snapshots" / "f00", yard / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted((yard / "checkpoint").iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")

    assert run(yard, ["generate", snapshot, "--prompt", "cat"]).code == 0
    assert run(yard, ["export", snapshot, "out"]).code == 0


@pytest.fixture(scope="module")
def adapter(whole_yard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of checkpoint/, as a run leaves it."""
    folder = shutil.copytree(whole_yard, tmp_path_factory.mktemp("adapter") / "yard")
    assert run(folder, CALLS["train with lora"][1]).code == 0
    return folder / "run" / "adapter"


@pytest.mark.parametrize("to", [2**40, 0, -1, math.nan, "8", [8], True, 1000])
@pytest.mark.parametrize("key", ["r", "init_r", "rank_pattern"])
def test_an_adapter_of_an_absurd_rank_is_refused(yard: Path, adapter: Path, key: str, to: Any) -> None:
    shutil.copytree(adapter, yard / "adapter")
    edited("adapter_config.json", key, to={"q_proj": to} if key == "rank_pattern" else to)(yard / "adapter")
    attack(yard, ["generate", "checkpoint", "--prompt", "cat", "--adapter", "adapter"], "adapter=adapter")


# -- fuzzing ----------------------------------------------------------------------------------------------------------

_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**66), 2**66) | st.integers(-3, 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)
_FUZZ = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@_FUZZ
@given(st.data())
def test_a_fuzzed_config_writes_or_is_one_line(whole_yard: Path, tmp_path_factory, data: st.DataObject) -> None:

    yard = tmp_path_factory.mktemp("fuzzed")
    shutil.copytree(whole_yard / "checkpoint", yard / "checkpoint")
    content = json.loads((yard / "checkpoint" / CONFIG).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        section = (
            data.draw(st.sampled_from([content, content["diffusion"]]))
            if isinstance(content.get("diffusion"), dict)
            else content
        )
        section[data.draw(st.sampled_from(sorted(section)))] = data.draw(_VALUE)
    (yard / "checkpoint" / CONFIG).write_text(json.dumps(content))
    answer = run(yard, ["generate", "checkpoint", "--prompt", "cat", "--max_new_tokens", "4"])
    assert answer.code == 0 or answer.line.startswith("adapt generate: error: "), (answer, content)
    shutil.rmtree(yard)


@settings(_FUZZ, max_examples=300)
@given(st.dictionaries(st.sampled_from([*DiffusionSpec.__dataclass_fields__, "other"]), _VALUE, max_size=5))
def test_a_fuzzed_diffusion_section_is_a_spec_or_one_line(section: dict[str, Any]) -> None:
    from transformers import LlamaConfig

    whole = {"attention": "prefix", "mask_token_id": 3} | section
    config = LlamaConfig()
    config.diffusion = whole
    said, spec = "", None
    try:
        spec = DiffusionSpec.of(config, "folder")
    except ValueError as error:
        said = str(error)
    assert "\n" not in said
    assert said.startswith("checkpoint=folder: ") if spec is None else type(spec.mask_token_id) is int


def test_there_are_two_hundred_rows_and_more() -> None:
    assert len(ROWS) + len(OF_SECTIONS) > 200


@pytest.mark.parametrize("objective", ["nelbo", "ar"])
def test_an_example_longer_than_the_positions_is_refused(yard: Path, objective: str) -> None:
    edited(CONFIG, "max_position_embeddings", to=4)(yard / "checkpoint")
    attack(
        yard,
        ["train", "--config", "recipe.yaml", "--objective.name", objective],
        "has 4; set data.seq_len=4",
        may_write=["run"],
    )
