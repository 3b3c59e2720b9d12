"""GGUF files as a source of weights: any `.gguf` becomes a dense Hugging Face model and its tokenizer.

    python -c "from adapt.conversion.gguf import gguf_to_folder; gguf_to_folder('MODEL.gguf', 'model')"

transformers reads the weights. What it does not always bring back is how the tokenizer cut text: see `gguf_tokenizer.py`. A file
whose rule we cannot rebuild is refused.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import progress
from ..files.staging import publish, scratch_beside

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def load_gguf(
    path: str | Path, dtype: "torch.dtype | None" = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    """(model with dense weights in `dtype`, default float32; tokenizer as the model was trained with)."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    path = _gguf_file(path)
    tokenizer = load_tokenizer(path)
    with progress.doing(f"dequantising {path.name}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype if dtype is not None else torch.float32,
            output_loading_info=True,
        )
    model, info = loaded
    # transformers only warns of a tensor that it did not find and leaves it random.
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ValueError(f"base={path}: no weights for {', '.join(missing[:3])}; convert from the Hugging Face folder")
    tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    return model.eval(), tokenizer


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a GGUF file with its pre-tokenizer restored; ValueError where that cannot be done."""
    from transformers import AutoTokenizer

    from . import gguf_tokenizer

    path = _gguf_file(path)
    kind, name, adds_bos = _metadata(path, "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if kind == "gpt2":  # llama.cpp's word for every byte-level BPE; sentencepiece has no pre-tokenizer to lose
        gguf_tokenizer.restore(tokenizer, name, adds_bos)
    return tokenizer


def gguf_to_folder(path: str | Path, out: str | Path, dtype: "torch.dtype | None" = None) -> Path:
    """Write the model as an ordinary Hugging Face folder, whole or not at all; the folder."""
    out = Path(out).resolve()
    if out.exists():
        raise ValueError(f"out={out}: exists already; remove it or choose another folder")
    model, tokenizer = load_gguf(path, dtype)
    with scratch_beside(out) as scratch:
        staged = scratch / "model"
        with progress.doing("writing the dequantised weights"):
            model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        publish(staged, out)
    return out


def _gguf_file(path: str | Path) -> Path:
    path = Path(path).expanduser().resolve()
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"base={path}: reading GGUF needs the gguf package; `pip install 'adapt-dlm[train]'`")
    if not path.is_file():
        raise ValueError(f"base={path}: no such file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"base={path}: not a GGUF file (it does not begin with GGUF)")
    return path


def _metadata(path: Path, *keys: str) -> list[Any]:
    """Metadata values by key, None where a key is not there."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (IndexError, KeyError, ValueError) as error:  # what it raises depends on where the bytes end
        raise ValueError(f"base={path}: damaged GGUF file ({error}); download it again") from error
    fields = [reader.get_field(key) for key in keys]
    return [None if field is None else field.contents() for field in fields]
