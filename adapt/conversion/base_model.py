"""The model that a conversion starts from: fetched, and held against its own files before memory is taken for it.

Folders come from strangers: `files.loading` says what is not believed of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..attention.windows import layer_windows
from ..files import adapters
from ..files.hub import snapshot_of
from ..files.json_file import read_json
from ..files.loading import config_of, skeleton, tokenizer_of
from ..files.model_config import without_code
from ..files.safetensors_folder import Shard, read_shards
from .embedding_rows import embedding_names
from .weight_plan import stored_dtype

# Without any of them transformers makes an empty tokenizer, and says nothing.
_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Base:
    """What is known of a base before its weights are copied."""

    name: str | Path
    """as the user gave it"""
    folder: Path
    revision: str | None
    config: PretrainedConfig
    generation: dict[str, Any]
    skeleton: PreTrainedModel
    shards: dict[str, Shard]
    stored: dict[str, dict[str, Any]]
    """{tensor name: dtype, shape, data_offsets}, of all shards"""
    embeddings: list[str]
    """names of the tensors with a row for each token"""
    num_rows: int
    dtype: torch.dtype
    """of most of the weights"""

    def token_ids_in_use(self) -> frozenset[int]:
        """Ids that mean the end or padding, which the tokenizer need not know of."""
        saved = self.generation
        each = [saved.get("eos_token_id"), saved.get("pad_token_id"), self.config.eos_token_id]
        return frozenset(i for ids in each for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int))


def read_base(base: str | Path, adapter: Path | None, scratch: Path, trust_remote_code: bool) -> Base:
    """The base, with the adapter merged into it, on files in scratch; ValueError for what cannot be adapted, or is broken."""
    folder, revision = fetch(base, scratch, trust_remote_code=trust_remote_code)
    config = read_config(folder, base, trust_remote_code=trust_remote_code)
    check_architecture(config, base)
    if adapter is not None:
        folder = adapters.merge_folder(folder, adapter, scratch / "merged", trust_remote_code=trust_remote_code)
    shards = read_shards(folder)
    model = skeleton(config, f"base={base}", shards, trust_remote_code=trust_remote_code)
    stored = {name: tensor for shard in shards.values() for name, tensor in shard.tensors.items()}
    embeddings = embedding_names(model, stored)
    num_rows = stored[embeddings[0]]["shape"][0]
    if any(stored[name]["shape"][0] != num_rows for name in embeddings):
        raise ValueError(f"base={base}: {' and '.join(embeddings)} have different numbers of rows; download it again")
    generation = _generation_config(folder, config, base)
    dtype = stored_dtype(shards)
    return Base(base, folder, revision, config, generation, model, shards, stored, embeddings, num_rows, dtype)


def fetch(base: str | Path, scratch: Path, *, trust_remote_code: bool = False) -> tuple[Path, str | None]:
    """(local folder with config, safetensors and tokenizer; the Hub revision if it came from there)."""
    if str(base).endswith(".gguf"):
        from .gguf import gguf_to_folder

        return gguf_to_folder(base, scratch / "dequantized", dtype=torch.float32), None
    if Path(base).is_dir():
        return Path(base), None
    snapshot = snapshot_of(str(base), f"base={base}", trust_remote_code=trust_remote_code)
    return snapshot, snapshot.name


def name_of(base: str | Path) -> str:
    """What a base is called where this machine's paths mean nothing: its Hub id, or the name of its folder or file.

    A run leaves its model in a folder called `model`: there the run's own name stands.
    """
    if not Path(base).exists():
        return str(base)
    path = Path(base).resolve()
    return path.parent.name if path.name == "model" else path.name


def read_config(source: Path, base: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The folder's config; ValueError for one that cannot be, or that needs code which is not trusted."""
    raw = read_json(source / "config.json", f"base={base}")
    if raw.get("diffusion") is not None:
        raise ValueError(f"base={base}: is a diffusion checkpoint already; train it with `model.base: {base}`")
    return config_of(source, f"base={base}", trust_remote_code=trust_remote_code)


def _generation_config(source: Path, config: PretrainedConfig, base: str | Path) -> dict[str, Any]:
    """generation_config.json as it is, or what transformers would make of the config where there is none."""
    if (source / "generation_config.json").is_file():
        return without_code(read_json(source / "generation_config.json", f"base={base}"))
    made = json.loads(GenerationConfig.from_model_config(config).to_json_string())
    made.pop("_from_model_config", None)  # transformers would drop keys that are not its own
    return made


def check_architecture(config: PretrainedConfig, base: str | Path) -> None:
    """ValueError for what its config shows cannot be adapted: an encoder-decoder, several inputs, layers without attention."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"base={base}: is an encoder-decoder ({config.model_type}); only decoder-only causal LMs can be adapted"
        )
    if config.get_text_config() is not config or {"audio_config", "vision_config"} & set(config.sub_configs):
        raise ValueError(
            f"base={base}: is multimodal ({config.model_type}); save its language model as a folder of its own first"
        )
    layer_windows(config)


def read_tokenizer(
    source: Path, base: str | Path, num_rows: int, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; ValueError if there is none, or if its vocabulary has more tokens than the embedding rows."""
    if not any(file for pattern in _VOCABULARIES for file in source.glob(pattern)):
        raise ValueError(
            f"base={base}: no tokenizer in it; put the model's tokenizer.json (or tokenizer.model) beside it"
        )
    tokenizer = tokenizer_of(source, f"base={base}", trust_remote_code=trust_remote_code)
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    last = max((i for token, i in vocabulary.items() if token not in added), default=-1)
    if last < 0:
        raise ValueError(f"base={base}: its tokenizer has no vocabulary; put the model's own tokenizer.json beside it")
    if last >= num_rows:
        raise ValueError(
            f"base={base}: its tokenizer has tokens up to the id {last}, but the embedding has {num_rows} rows; it is the "
            "tokenizer of another model, put the right one beside it"
        )
    return tokenizer
