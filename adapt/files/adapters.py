"""PEFT adapters as input: which model they were trained on, and the same model with them merged in, proved by its logits."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .. import progress
from .adapter_config import check_adapter_config
from .json_file import read_json
from .loading import config_of, empty_model, model_of, tokenizer_of
from .model_config import check_sizes
from .model_folder import check_files, copy_extras, copy_json
from .provenance import first_change, model_files
from .safetensors_folder import INDEX, Shard, bytes_of, read_shards

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TRAINED_ON = "trained_on.json"  # the files of the model that training had under it, written beside the adapter
_SHARD = "5GB"
# What an adapter's config may say where we merge layer by layer, and no forward shows whether that was right.
_PLAIN_LORA = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}


def base_and_adapter(base: str | Path, adapter: str | Path | None) -> tuple[str | Path, Path | None]:
    """(the model, the adapter to merge into it), where `base` may be the folder of an adapter, which names its model itself.

    Raises ValueError where the adapter is not one, or was trained on another model.
    """
    folder = Path(base)
    if (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
        if adapter is not None:
            raise ValueError(f"adapter={adapter}: base={base} is an adapter itself; give the model that both belong to")
        named = _config(folder).get("base_model_name_or_path")
        if not named:
            raise ValueError(f"base={base}: is an adapter that does not name its model; add --adapter to that model")
        if not isinstance(named, str):
            raise ValueError(
                f"base={base}: base_model_name_or_path in {CONFIG} is {named!r:.60}; must be the name of a model"
            )
        if not Path(named).is_dir() and (Path(named).is_absolute() or str(named).count("/") != 1):
            raise ValueError(
                f"base={base}: is an adapter of {named}, which is not here; give the folder of that model, and "
                f"--adapter {base}"
            )
        check_trained_on(folder, named)
        return str(named), folder
    if adapter is None:
        return base, None
    _check(Path(adapter), base)
    check_trained_on(Path(adapter), base)
    return base, Path(adapter)


def check_trained_on(adapter: Path, base: str | Path) -> None:
    """ValueError where the adapter says which files it was trained on, and those of `base` are others under the same path."""
    if not (adapter / TRAINED_ON).is_file():
        return
    before, now = read_json(adapter / TRAINED_ON, f"adapter={adapter}"), model_files(base)
    if now and (changed := first_change(before, now)):
        raise ValueError(
            f"adapter={adapter}: was trained on other weights than those in {base} ({changed} differs); put those back, or train again"
        )


def _check(adapter: Path, base: str | Path) -> None:
    named = _config(adapter).get("base_model_name_or_path")
    if named and not _same_model(str(named), str(base)):
        raise ValueError(
            f"adapter={adapter}: was trained on {named}, not on {base}; give that model, or, if it is the same under another "
            f"name, set base_model_name_or_path in {CONFIG} to it"
        )


def _config(adapter: Path) -> dict[str, Any]:
    path = adapter / CONFIG
    if not path.is_file():
        raise ValueError(f"adapter={adapter}: not a PEFT folder (no {CONFIG} in it)")
    if not (adapter / WEIGHTS).is_file():
        raise ValueError(f"adapter={adapter}: no {WEIGHTS} in it; pickled weights are not read, save it as safetensors")
    check_files(adapter, f"adapter={adapter}")
    config = read_json(path, f"adapter={adapter}")
    if module := config.get("megatron_config") and config.get("megatron_core"):
        raise ValueError(
            f"adapter={adapter}: asks for Python of its own (megatron_core={module!r:.60}), which was not run"
        )
    check_sizes(config, f"adapter={adapter}: {CONFIG}")
    check_adapter_config(config, f"adapter={adapter}")
    _check_ranks(config, adapter)
    return config


def _check_ranks(config: dict[str, Any], adapter: Path) -> None:
    """ValueError for ranks and counts of virtual tokens beyond what is stored: peft makes tensors of them before it reads."""
    try:
        with safe_open(adapter / WEIGHTS, framework="pt") as file:
            largest = max((max(file.get_slice(key).get_shape(), default=1) for key in file.keys()), default=1)  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"adapter={adapter}: {WEIGHTS} is not a safetensors file ({reason}); save it again") from error
    patterns = config.get("rank_pattern")
    ranks = [
        config.get("r"),
        *(patterns.values() if isinstance(patterns, dict) else []),
        *(config.get(key) for key in ("init_r", "target_r", "num_virtual_tokens")),
    ]
    for rank in ranks:
        if rank is not None and not (type(rank) is int and 0 < rank <= largest):
            raise ValueError(
                f"adapter={adapter}: {CONFIG} says a rank of {rank!r:.40}, but no weight is that large; save it again"
            )


def _same_model(named: str, base: str) -> bool:
    """Whether a trainer's name for a model and the user's mean one model: the same folder, or the same last part of a name."""
    if Path(named).exists() and Path(base).exists():
        return Path(named).samefile(base)
    one, other = (name.rstrip("/").rpartition("/")[2].lower() for name in (named, base))
    return one == other or (other.endswith(".gguf") and other.startswith(one))


@torch.no_grad()
def merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with the adapter's changes in its own weights, in their dtype.

    ValueError if the adapter does not fit, or if a forward shows that merging is not the same as the adapter beside the
    model (a head that shares its weights with the embedding, prompts instead of weights).
    """
    rows: Any = model.get_input_embeddings()  # before peft puts its own there
    tokens = torch.arange(2, 26, device=model.device)[None] % rows.num_embeddings
    beside, _ = _beside(model, adapter)
    expected = beside(tokens).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = beside.merge_and_unload()
        except (RuntimeError, ValueError) as error:  # of kinds that no weight can hold
            raise _misfit(adapter, model, " ".join(str(error).split())) from error
    _check_same(adapter, expected, model(tokens).logits)
    return model


def _beside(model: PreTrainedModel, adapter: Path, **options: Any) -> tuple[Any, set[str]]:
    """(PEFT's model, names of the adapter's tensors); ValueError where the one has what the other has not."""
    import peft

    _config(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft warns of is refused below, by what it does
        try:
            with safe_open(adapter / WEIGHTS, framework="pt") as file:
                stored = set(file.keys())
            beside: Any = peft.PeftModel.from_pretrained(model, str(adapter), **options)
        # What peft raises for weights of other shapes, for modules that are not there, and for a config of another version.
        except (AttributeError, KeyError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            raise _misfit(adapter, model, " ".join(str(error).split())) from error
        wanted = set(peft.get_peft_model_state_dict(beside, save_embedding_layers=False))
    if astray := sorted(stored - wanted - set(beside.state_dict())) + sorted(wanted - stored):
        raise _misfit(adapter, model, f"{astray[0]} is in one of them only")
    if not hasattr(beside, "merge_and_unload"):
        raise ValueError(f"adapter={adapter}: is of a kind that has no weights to merge; train it as LoRA")
    return beside, stored


def _misfit(adapter: Path, model: PreTrainedModel, reason: str) -> ValueError:
    return ValueError(f"adapter={adapter}: does not fit this {type(model).__name__} ({reason[:200]})")


def _check_same(adapter: Path, expected: Tensor, found: Tensor) -> None:
    scale = expected.float().abs().amax()
    if not (expected.float() - found.float()).abs().amax() <= scale * (1e-3 if found.dtype == torch.float32 else 0.1):
        raise ValueError(
            f"adapter={adapter}: merged in, it does not compute what it does beside the model (does it change a head that "
            "shares its weights with the embedding?)"
        )


def merge_folder(source: Path, adapter: Path, out: Path, *, trust_remote_code: bool = False) -> Path:
    """Writes the model in `source` with the adapter merged in as the folder `out`, with the adapter's tokenizer if it has one.

    Tensor by tensor where the adapter is LoRA on layers whose weights are stored as the model has them, so that memory is bounded
    by the largest tensor; else with the whole model loaded. Raises ValueError for weights that `read_shards` refuses.
    """
    shards = read_shards(source)
    out.mkdir()
    trusted: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    what = f"base={source}"
    config = config_of(source, what, **trusted)
    changes = _changes(config, adapter, {name for shard in shards.values() for name in shard.tensors}, **trusted)
    if changes is not None:
        _merge_tensors(shards, out, changes)
        for name in ("config.json", "generation_config.json", INDEX):
            if (source / name).is_file():
                copy_json(source / name, out, what)
    else:
        merged(model_of(source, what, dtype="auto", **trusted), adapter).save_pretrained(out, max_shard_size=_SHARD)
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    home, whose = (adapter, f"adapter={adapter}") if has_tokenizer else (source, what)
    tokenizer_of(home, whose, **trusted).save_pretrained(out)
    copy_extras(source, out, **trusted)
    return out


def _changes(
    config: PretrainedConfig, adapter: Path, weights: set[str], *, trust_remote_code: bool
) -> dict[str, Callable[[Tensor], Tensor]] | None:
    """{name of a stored weight: what the adapter makes of it}; None for adapters whose merging needs the model as a whole."""
    import peft
    from accelerate import init_empty_weights
    from peft.tuners import lora

    usual = vars(peft.LoraConfig())
    if any(value and key not in _PLAIN_LORA and value != usual.get(key) for key, value in _config(adapter).items()):
        return None
    with init_empty_weights():
        model: Any = empty_model(config, trust_remote_code=trust_remote_code)
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]  # before peft puts its own there
    tied = {id(end) for end in ends} if config.tie_word_embeddings else set()
    beside, stored = _beside(model, adapter, low_cpu_mem_usage=True, torch_device="cpu")
    layers: dict[str, Any] = {}
    for name, module in beside.base_model.model.named_modules():
        if type(module) in (lora.Linear, lora.Embedding) and id(module.get_base_layer()) not in tied:
            layers[name] = module
    owners = {key: next((n for n in layers if key.startswith(f"base_model.model.{n}.lora_")), None) for key in stored}
    prefix = model.base_model_prefix + "."  # files of the bare backbone (GPT-2) have none
    names = {n: f"{n}.weight" if f"{n}.weight" in weights else f"{n.removeprefix(prefix)}.weight" for n in layers}
    if None in owners.values() or not set(names.values()) <= weights:
        return None
    # peft has sent the adapter where the layers' weights are, which is nowhere.
    tensors = load_file(adapter / WEIGHTS)
    for key, owner in owners.items():
        path = key.removeprefix(f"base_model.model.{owner}.").removesuffix(".weight").split(".")
        parts = getattr(layers[str(owner)], path[0])
        value = torch.nn.Parameter(tensors[key].float(), requires_grad=False)
        if isinstance(parts, torch.nn.ParameterDict):
            parts["default"] = value
        else:
            parts["default"].weight = value
    return {names[name]: partial(_with_change, layer) for name, layer in layers.items()}


def _with_change(layer: Any, weight: Tensor) -> Tensor:
    """The weight of a LoRA layer, computed in float32, as peft merges it."""
    base = layer.get_base_layer()
    absent, base.weight = base.weight, torch.nn.Parameter(weight.float(), requires_grad=False)
    layer.merge()
    changed = base.weight.data.to(weight.dtype)
    base.weight = absent
    layer.merged_adapters.clear()
    return changed


@torch.no_grad()
def _merge_tensors(shards: dict[str, Shard], out: Path, changes: dict[str, Callable[[Tensor], Tensor]]) -> None:
    with progress.doing("merging the adapter", total=len(changes)) as task:
        for name, shard in shards.items():
            shutil.copyfile(shard.path, out / name)
            with safe_open(shard.path, framework="pt") as read, (out / name).open("r+b") as write:
                for key in sorted(changes.keys() & shard.tensors.keys()):
                    write.seek(shard.start + shard.tensors[key]["data_offsets"][0])
                    write.write(bytes_of(changes[key](read.get_tensor(key))))
                    task.update()
