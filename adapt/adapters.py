"""PEFT adapters as input: which model they were trained on, and the same model with them merged in, proved by its logits."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


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
        if not Path(named).is_dir() and (Path(named).is_absolute() or str(named).count("/") != 1):
            raise ValueError(
                f"base={base}: is an adapter of {named}, which is not here; give the folder of that model, and "
                f"--adapter {base}"
            )
        return str(named), folder
    if adapter is None:
        return base, None
    _check(Path(adapter), base)
    return base, Path(adapter)


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
    try:
        config = json.loads(path.read_text())
        assert isinstance(config, dict)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"{path}: not the JSON of an adapter ({error}); save it again") from error
    return config


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
    import peft

    _config(adapter)
    tokens = torch.arange(2, 26, device=model.device)[None] % model.get_input_embeddings().num_embeddings  # pyright: ignore
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft warns of is refused below, by what it does
        try:
            with safe_open(adapter / WEIGHTS, framework="pt") as file:
                stored = set(file.keys())
            beside: Any = peft.PeftModel.from_pretrained(model, str(adapter))
        # What peft raises for weights of other shapes, for modules that are not there, and for a config of another version.
        except (KeyError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            raise _misfit(adapter, model, " ".join(str(error).split())) from error
        wanted = set(peft.get_peft_model_state_dict(beside, save_embedding_layers=False))
    if astray := sorted(stored - wanted - set(beside.state_dict())) + sorted(wanted - stored):
        raise _misfit(adapter, model, f"{astray[0]} is in one of them only")
    if not hasattr(beside, "merge_and_unload"):
        raise ValueError(f"adapter={adapter}: is of a kind that has no weights to merge; train it as LoRA")
    expected = beside(tokens).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = beside.merge_and_unload()
    _check_same(adapter, expected, model(tokens).logits)
    return model


def _misfit(adapter: Path, model: PreTrainedModel, reason: str) -> ValueError:
    return ValueError(f"adapter={adapter}: does not fit this {type(model).__name__} ({reason[:200]})")


def _check_same(adapter: Path, expected: Tensor, found: Tensor) -> None:
    scale = expected.float().abs().amax()
    if not (expected.float() - found.float()).abs().amax() <= scale * (1e-3 if found.dtype == torch.float32 else 0.1):
        raise ValueError(
            f"adapter={adapter}: merged in, it does not compute what it does beside the model (does it change a head that "
            "shares its weights with the embedding?)"
        )


def merge_folder(source: Path, adapter: Path, out: Path) -> Path:
    """Writes the model in `source` with the adapter merged in as the folder `out`, with the adapter's tokenizer if it has one."""
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    merged(model, adapter).save_pretrained(out)
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    AutoTokenizer.from_pretrained(adapter if has_tokenizer else source).save_pretrained(out)
    for name in ("LICENSE", "LICENSE.txt"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    return out
