"""config.json and its kin as strangers write them: no Python of theirs, no sizes that no model has, nothing loaded from elsewhere.

Held against that before a library reads them: transformers makes lists and tensors of numbers before anybody looks, asks on standard
input whether it may run code, and follows what a config names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .json_file import read_json

CONFIG = "config.json"
TRUST = "read it, and if you trust it say --trust_remote_code true"
_CODE = ("auto_map", "custom_generate", "custom_pipelines")
"""what names Python files of a model's own"""
# What the keys of a config are called whose numbers count modules, and whose are a size of tensors.
_LAYERS = re.compile(r"layers?$|^n_layer|num_hidden|depth")
_COUNTS = re.compile(r"heads?$|experts?$|^n_head|groups?$|labels?$")
_SIZES = re.compile(r"size|dim$|_dim_|rank|embd|inner|positions|position_embeddings|vocab|window|length|channels|width")
_REPEATED = re.compile(r"(attention|layer|block)s?_(types?|layers)$")  # lists of how often each kind of layer comes
_MOST_LAYERS, _MOST, _LARGEST = 1 << 10, 1 << 16, 1 << 28  # a layer is modules, which take a millisecond each to make
# What a tokenizer makes so many tokens of, before it reads its vocabulary.
_TOKENS = ("extra_ids", "offset", "num_madeup_words", "init_inputs")
_AT_LEAST_ONE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_NO_POSITIONS = {"max_position_embeddings": -1}  # XLNet's word for any number of them
_KERNELS = ("attn_implementation", "experts_implementation", "kernel_config")


def read_model_config(folder: Path, what: str, *, trust_remote_code: bool = False, todo: str = TRUST) -> dict[str, Any]:
    """config.json of a folder (or the file that is named) as it is; ValueError, of `what`, for one that may not be loaded."""
    raw = read_json(folder if folder.is_file() else folder / CONFIG, what)
    check_model_config(raw, what, trust_remote_code=trust_remote_code, todo=todo)
    return raw


def check_model_config(
    raw: Mapping[str, Any], what: str, *, trust_remote_code: bool = False, todo: str = TRUST
) -> None:
    """ValueError, of `what` and with what `todo`, for a config.json whose model would be code, come from elsewhere, or be absurd."""
    if not trust_remote_code:
        check_no_code(raw, what, todo=todo)
    if raw.get("quantization_config") is not None:
        raise ValueError(
            f"{what}: its weights are quantised (quantization_config); give the model in bfloat16 or float32"
        )
    if raw.get("transformers_weights") is not None:
        raise ValueError(
            f"{what}: config.json names other weights (transformers_weights={str(raw['transformers_weights'])[:60]!r}); "
            "remove that line"
        )
    _check_kernels(raw, what)
    check_sizes(raw, f"{what}: config.json")
    for name in _AT_LEAST_ONE:
        if isinstance(value := raw.get(name), int | float) and value < 1 and value != _NO_POSITIONS.get(name):
            raise ValueError(f"{what}: config.json says {name}={value}; must be a whole number of at least 1; mend it")


def check_no_code(config: Mapping[str, Any], what: str, *, todo: str = TRUST) -> None:
    """ValueError, of `what` and with what `todo`, for the config.json of a model that only its own Python files can make."""
    known = isinstance(config.get("model_type"), str) and config["model_type"] in CONFIG_MAPPING
    if config.get("auto_map") and not known:
        raise ValueError(
            f"{what}: is made by Python code of its own ({str(config['auto_map'])[:60]}), which was not run; {todo}"
        )


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config file, its inner objects too, without the keys that name Python files."""
    return {
        key: without_code(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _CODE
    }


def drop_code(config: PretrainedConfig) -> PretrainedConfig:
    """The config, from which what names Python files is removed, so that it is in no folder that is made of it."""
    for key in _CODE:
        config.__dict__.pop(key, None)
    for name in config.sub_configs:
        if isinstance(inner := getattr(config, name, None), PretrainedConfig):
            drop_code(inner)
    return config


def check_sizes(section: Any, what: str, key: str = "") -> None:
    """ValueError for numbers no model has. key: under which the section stands."""
    if isinstance(section, dict):
        for name, value in section.items():
            _check_repeats(value, what, name)
            check_sizes(value, what, name)
    elif isinstance(section, list):
        for value in section:
            if type(value) is int and abs(value) > _LARGEST:
                raise _no_model(what, key, value, _LARGEST)
            check_sizes(value, what, key)
    elif isinstance(section, int | float) and not isinstance(section, bool):
        limits = ((_LAYERS, _MOST_LAYERS), (_COUNTS, _MOST), (_SIZES, _LARGEST))
        most = next((limit for names, limit in limits if names.search(key)), None)
        if most is not None and not -1 <= section <= most:
            raise _no_model(what, key, section, most)


def _check_repeats(value: Any, what: str, key: str) -> None:
    """GPT-Neo's attention_types [[["global", "local"], 12]] become a list of 24 layers before anybody counts them."""
    if isinstance(value, list) and _REPEATED.search(key):
        pairs = [item[1] for item in value if isinstance(item, list) and len(item) == 2 and type(item[1]) is int]
        if sum(pairs) > _MOST_LAYERS:
            raise _no_model(what, key, sum(pairs), _MOST_LAYERS)


def check_tokenizer_numbers(config: Mapping[str, Any], what: str) -> None:
    """ValueError for a tokenizer_config.json that asks for more tokens of its own than any has."""
    for key in _TOKENS:
        values = config.get(key)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, int | float) and not 0 <= value <= _MOST:
                raise ValueError(
                    f"{what}: tokenizer_config.json says {key}={value}, which no tokenizer has (at most {_MOST}); mend it"
                )


def _no_model(what: str, key: str, value: float, most: int) -> ValueError:
    return ValueError(f"{what} says {key[:60]}={str(value)[:40]}, which no model has (at most {most}); mend it")


def check_made(config: PretrainedConfig, what: str) -> None:
    """ValueError for a config that was made of a file, and says zero or no number where every model has one."""
    for name in _AT_LEAST_ONE:
        value = getattr(config, name, None)
        if value is None or isinstance(value, list) or value == _NO_POSITIONS.get(name):
            continue
        if type(value) is not int or value < 1:
            raise ValueError(
                f"{what}: config.json says {name}={value!r}; must be a whole number of at least 1; mend it"
            )


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Inside, what libraries raise for a broken file becomes one line that begins with `what`."""
    try:
        yield
    except (ImportError, OSError, torch.OutOfMemoryError):
        raise
    # Found by fuzzing: Attribute-, Key-, Type-, ZeroDivisionError, RecursionError and bare Exceptions of Rust.
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{what} ({type(error).__name__}: {reason}); mend it, or download the model again") from error


def _check_kernels(section: Mapping[str, Any], what: str) -> None:
    """ValueError for a kernel that transformers would fetch from the Hub, which is code: a name with a slash in it."""
    for key, value in section.items():
        if isinstance(value, dict) and not key.endswith(_KERNELS):
            _check_kernels(value, what)
        elif "/" in str(value) and key.removesuffix("_internal").endswith(_KERNELS):
            raise ValueError(
                f"{what}: config.json asks for code of the Hub ({key}={str(value)[:60]!r}); remove that line"
            )
