"""Models of the Hub, as folders of its cache: what libraries read is what was checked, and is not asked of the Hub again."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from .model_folder import LICENCES
from .staging import is_full_disk

CONFIGS = ("config.json", "adapter_config.json")  # the second so that it is seen: transformers would follow it
TEXTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
ALL = (*TEXTS, "*.safetensors", "README.md", *LICENCES)


def local_folder(
    name: str | Path, what: str, wanted: tuple[str, ...] = ALL, *, trust_remote_code: bool = False
) -> Path:
    """A folder or file that is here as it is, or where the files of a Hub id are; ValueError, of `what`, where they cannot be had."""
    if Path(name).exists():
        return Path(name)
    return snapshot_of(str(name), what, wanted, trust_remote_code=trust_remote_code)


def snapshot_of(name: str, what: str, wanted: tuple[str, ...] = ALL, *, trust_remote_code: bool = False) -> Path:
    """The folder in the Hub's cache with what is wanted of a model, named after its revision; ValueError, of `what`, without it."""
    patterns = [*wanted, *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]))
    except GatedRepoError as error:
        raise ValueError(
            f"{what}: its owner gives it only to those who have asked; ask on https://huggingface.co/{name}, then "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{what}: no such folder here, and the Hub has no model of that name that you may read; check the "
            "spelling, or `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{what}: no such folder here, and the Hub cannot be asked (offline, and the model is not in its cache); "
            "give the path of a folder, or go online (and unset HF_HUB_OFFLINE) and try again"
        ) from error
    except Exception as error:  # huggingface_hub raises a dozen unrelated types; each means: no such model to be had
        if is_full_disk(error):
            raise ValueError(
                f"{what}: the disk of the Hub's cache is full ({constants.HF_HUB_CACHE}); free some space there, or move it "
                "(export HF_HOME=/another/disk)"
            ) from error
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{what}: no such folder here, and the Hub does not give it ({type(error).__name__}: {reason})"
        ) from error
