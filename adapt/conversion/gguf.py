"""GGUF files as a source of weights: any `.gguf` becomes a dense Hugging Face model and its tokenizer.

    python -c "from adapt.conversion.gguf import gguf_to_folder; gguf_to_folder('MODEL.gguf', 'model')"

transformers reads the weights. What it does not always bring back is how the tokenizer cut text: see `gguf_tokenizer.py`. A file
whose rule we cannot rebuild is refused.
"""

from __future__ import annotations

import importlib.util
import math
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import progress
from ..files.loading import check_loaded, check_memory, empty_model
from ..files.marks import publish_marked
from ..files.model_config import check_made, one_line
from ..files.outputs import check_new_folder, scratch_beside
from .gguf_header import Header, read_header, write_without_vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

_COMPUTED = re.compile(r"^rope_|\.rope_|rope_freqs|rot_embd")
"""tensors that transformers computes"""


def load_gguf(
    path: str | Path, dtype: torch.dtype | None = None, *, scratch: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """(model with dense weights in `dtype`, default float32; tokenizer as the model was trained with).

    scratch: a folder for a copy of the weights while they are read; default: the machine's own for such files.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    header = read_header(_gguf_file(path))
    tokenizer = _tokenizer(header)
    with tempfile.TemporaryDirectory(prefix="gguf-", dir=scratch) as folder:
        weights = write_without_vocabulary(header, Path(folder) / "weights.gguf")
        _check_tensors(header.path, weights)
        with one_line(f"base={path}: its header makes no model"):
            config = AutoConfig.from_pretrained(folder, gguf_file=weights.name, trust_remote_code=False)
        _check_complete(config, header)
        with progress.doing(f"dequantising {header.path.name}"), one_line(f"base={path}: cannot be loaded"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=weights.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=dtype if dtype is not None else torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
            )
    model, loading = loaded
    check_loaded(loading, f"base={path}")
    tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    return model.eval(), tokenizer


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file with its pre-tokenizer restored; ValueError where that cannot be done."""
    return _tokenizer(read_header(_gguf_file(path)))


def gguf_to_folder(path: str | Path, out: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write the model as an ordinary Hugging Face folder, whole or not at all; the folder."""
    out = check_new_folder(out).resolve()
    with scratch_beside(out) as scratch:
        model, tokenizer = load_gguf(path, dtype, scratch=scratch)
        staged = scratch / "model"
        with progress.doing("writing the dequantised weights"):
            model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        publish_marked(staged, out)
    return out


def _tokenizer(header: Header) -> PreTrainedTokenizerFast:
    from transformers import TOKENIZER_MAPPING, AutoConfig, PreTrainedTokenizerFast

    from . import gguf_tokenizer

    with tempfile.TemporaryDirectory(prefix="gguf-") as folder:
        name = write_without_vocabulary(header, Path(folder) / "config.gguf", weights=False).name
        with one_line(f"base={header.path}: its header makes no model"):
            config = AutoConfig.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    # What AutoTokenizer would choose, once it had read the whole file to know the config.
    tokenizer_class: Any = TOKENIZER_MAPPING.get(type(config), PreTrainedTokenizerFast)
    if not issubclass(tokenizer_class, PreTrainedTokenizerFast):  # mistral-common's, which reads files of its own
        tokenizer_class = PreTrainedTokenizerFast
    with one_line(f"base={header.path}: its tokenizer cannot be read"):
        tokenizer = tokenizer_class.from_pretrained(
            header.path.parent, gguf_file=header.path.name, trust_remote_code=False
        )
    # llama.cpp's word for every byte-level BPE; sentencepiece has no pre-tokenizer to lose
    if header.get("tokenizer.ggml.model") == "gpt2":
        rule, adds_bos = header.get("tokenizer.ggml.pre"), header.get("tokenizer.ggml.add_bos_token")
        gguf_tokenizer.restore(tokenizer, rule, adds_bos)
    return tokenizer


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


def _check_tensors(path: Path, weights: Path) -> None:
    """ValueError of `path` where its tensors, copied to `weights`, are not all there."""
    from gguf import GGUFReader

    with one_line(f"base={path}: damaged GGUF file"):  # what it raises depends on where the bytes end
        GGUFReader(weights)


def _check_complete(config: PretrainedConfig, header: Header) -> None:
    """ValueError where the file holds more or much less than the model that its header describes; takes no memory.

    transformers leaves a tensor that it has no place for unread: with a smaller block_count a model would lose its last layers.
    """
    import torch

    what = f"base={header.path}"
    check_made(config, what)
    with one_line(f"{what}: its header makes no model"), torch.device("meta"):
        model = empty_model(config)
    stored = {name: math.prod(shape) for name, shape in header.shapes.items() if not _COMPUTED.search(name)}
    if config.tie_word_embeddings:
        stored.pop("output.weight", None)
    check_memory(model, what, sum(stored.values()))
    parameters = {id(parameter): parameter.numel() for parameter in model.parameters()}
    buffers = model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wanted = sum(parameters.values()) + sum(model.state_dict()[name].numel() for name in buffers)
    if sum(stored.values()) > wanted:
        raise ValueError(
            f"{what}: holds {sum(stored.values()):,} weights, but its header makes a model of {wanted:,} "
            f"({config.num_hidden_layers} layers), which would leave some unread; download the model again"
        )
