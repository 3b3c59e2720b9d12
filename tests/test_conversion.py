"""Conversion keeps the weights, changes who sees whom, and leaves nothing half-written."""

import errno
import json
import math
import os
import re
import shutil
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, WINDOW, build_model, build_tokenizer, config_of, save_base
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import adapt
from adapt.attention.layout import Layout
from adapt.cli import main as cli
from adapt.conversion import copy_weights as weights
from adapt.conversion.base_model import name_of
from adapt.conversion.convert import convert
from adapt.model.forward import hidden_states
from adapt.model.head import output_head
from adapt.spec import DiffusionSpec
from adapt_recipes.quickstart.smollm2 import cached_smollm2

KINDS = ["llama", "qwen3", "gemma3", "gpt2"]
ATTENTIONS = ["bidirectional", "prefix"]
EMBEDDINGS = {"lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight", "wte.weight"}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _logits(model, tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
    with torch.no_grad():
        return output_head(model)(hidden_states(model, tokens, layout))


def _random_tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


# -- who sees whom ----------------------------------------------------------------------------------------------------

# document, view, position of each token: a document with a prompt and two canvases, another document, padding.
PREFIX_ROW = (
    [(1, 0, i) for i in range(5)]
    + [(1, 1, i) for i in range(5, 9)]
    + [(1, 2, i) for i in range(5, 8)]
    + [(2, 0, i) for i in range(2)]
    + [(2, 1, i) for i in range(2, 4)]
    + [(0, 0, 0), (0, 0, 1)]
)
BIDIRECTIONAL_ROW = [(1, 1, i) for i in range(9)] + [(2, 1, i) for i in range(5)] + [(0, 1, 0), (0, 1, 1)]


def _sees(query: tuple[int, int, int], key: tuple[int, int, int], window: int | None) -> bool:
    """The pattern in words, apart from the code: the prompt is causal, a canvas sees its prompt and itself."""
    (query_document, query_view, query_position), (key_document, key_view, key_position) = query, key
    distance = query_position - key_position
    if query_document != key_document:
        return False
    if query_view == 0:
        return key_view == 0 and distance >= 0 and (window is None or distance < window)
    in_window = window is None or abs(distance) <= window
    return in_window and ((key_view == 0 and distance >= 0) or key_view == query_view)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_moves_exactly_the_logits_of_those_that_see_it(diffusion_lm, kind, attention):
    lm = diffusion_lm(kind, attention)
    row = PREFIX_ROW if attention == "prefix" else BIDIRECTIONAL_ROW
    length = len(row)
    layout = Layout(*(torch.tensor(column).expand(length + 1, -1) for column in zip(*row, strict=True)))
    tokens = _random_tokens(1, length)
    edited = torch.where(torch.eye(length).bool(), (tokens + 7) % VOCABULARY, tokens)
    logits = _logits(lm.model, torch.cat([tokens, edited]), layout)
    moved = (logits[1:] - logits[:1]).abs().amax(-1)  # [edited token, query]

    per_layer = [WINDOW, None] if kind == "gemma3" else [None, None]
    seen = [torch.tensor([[_sees(q, k, window) for q in row] for k in row]) for window in per_layer]
    reachable = torch.eye(length).bool()
    for layer in seen:
        reachable = (reachable.float() @ (layer | torch.eye(length).bool()).float()) > 0
    assert (moved[~reachable] < 1e-5).all()
    assert (moved[seen[0] | seen[1]] > 1e-4).all()


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_bit_identical_but_for_the_row_of_the_mask_token(base_folder, checkpoint_folder, kind):
    before, after = _tensors(base_folder(kind)), _tensors(checkpoint_folder(kind, "bidirectional"))
    mask = json.loads((checkpoint_folder(kind, "bidirectional") / "config.json").read_text())["diffusion"][
        "mask_token_id"
    ]
    assert before.keys() == after.keys()
    rewritten = before.keys() & EMBEDDINGS
    assert len(rewritten) == (2 if kind == "llama" else 1)
    for name, old in before.items():
        new = after[name]
        if name in rewritten:
            rows = torch.arange(len(old)) != mask
            torch.testing.assert_close(new[mask], old.mean(0))
            assert len(new) == max(len(old), mask + 1)
            old, new = old[rows], new[: len(old)][rows]
        assert torch.equal(old, new), name


def test_a_sharded_checkpoint_keeps_its_shards_and_its_index_adds_up(base_folder, checkpoint_folder):
    before, after = (
        json.loads((f / weights.INDEX).read_text())
        for f in (base_folder("llama"), checkpoint_folder("llama", "prefix"))
    )
    assert len(set(before["weight_map"].values())) > 1
    assert after["weight_map"] == before["weight_map"]
    assert (
        after["metadata"]["total_size"] == before["metadata"]["total_size"] + 2 * 32 * 4
    )  # embedding and head: one row each
    assert after["metadata"]["total_size"] == sum(
        t.nbytes for t in _tensors(checkpoint_folder("llama", "prefix")).values()
    )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_with_the_causal_layout_or_without_is_causal_the_logits_are_the_originals(
    base_folder, checkpoint_folder, diffusion_lm, tmp_path, kind
):
    tokens = _random_tokens(2, 12)  # longer than Gemma 3's window
    original = AutoModelForCausalLM.from_pretrained(base_folder(kind))
    expected = original(tokens).logits
    causal = Layout.of("prefix", torch.ones_like(tokens), num_prompt_tokens=12)
    ours = _logits(diffusion_lm(kind, "bidirectional").model, tokens, causal)
    others = torch.arange(expected.shape[-1]) != diffusion_lm(kind, "bidirectional").spec.mask_token_id
    torch.testing.assert_close(ours[..., : len(others)][..., others], expected[..., others], rtol=1e-4, atol=1e-4)

    folder = shutil.copytree(checkpoint_folder(kind, "bidirectional"), tmp_path / "again")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("is_causal") is False
    (folder / "config.json").write_text(json.dumps(config))
    restored = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(restored.base_model(tokens).last_hidden_state, original.base_model(tokens).last_hidden_state)
    torch.testing.assert_close(restored(tokens).logits[..., : len(others)][..., others], expected[..., others])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_prefix_checkpoint_loaded_plainly_is_the_causal_model_to_the_bit(base_folder, checkpoint_folder, kind):
    tokens = _random_tokens(2, 12)
    original = AutoModelForCausalLM.from_pretrained(base_folder(kind))
    plain = AutoModelForCausalLM.from_pretrained(checkpoint_folder(kind, "prefix"))
    assert torch.equal(plain.base_model(tokens).last_hidden_state, original.base_model(tokens).last_hidden_state)
    if kind == "qwen3":  # its head has not grown, so that the same product is computed
        others = torch.arange(320) != VOCABULARY
        assert torch.equal(plain(tokens).logits[..., others], original(tokens).logits[..., others])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_bidirectional_checkpoint_loaded_plainly_attends_as_our_explicit_mask(checkpoint_folder, diffusion_lm, kind):
    tokens = _random_tokens(2, 12)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint_folder(kind, "bidirectional"))
    lm = diffusion_lm(kind, "bidirectional")
    assert lm.mask_free
    ours = _logits(lm.model, tokens, Layout.of("bidirectional", torch.ones_like(tokens)))
    torch.testing.assert_close(plain(tokens).logits, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.skipif(
    cached_smollm2() is None, reason="SmolLM2's GGUF is not in the cache; `adapt quickstart` puts it there"
)
@torch.no_grad()
def test_smollm2_from_its_gguf_keeps_its_causal_mode_and_attends_as_promised(tmp_path):
    from adapt.conversion.gguf import load_gguf

    gguf = cached_smollm2()
    assert gguf is not None
    original, tokenizer = load_gguf(gguf)
    tokens = tokenizer("The capital of France is Paris, and that of Italy is", return_tensors="pt").input_ids
    expected = original(tokens).logits
    assert tokenizer.decode(expected[0, -1].argmax()) == " Rome"
    lm = adapt.load(
        convert(gguf, tmp_path / "out", attention="prefix", verify=False), device="cpu"
    )  # the probe runs here
    plain = lm.model(tokens).logits
    others = torch.arange(expected.shape[-1]) != lm.spec.mask_token_id
    assert torch.equal(plain[..., : len(others)][..., others], expected[..., others])
    causal = _logits(lm.model, tokens, Layout.of("prefix", torch.ones_like(tokens), num_prompt_tokens=tokens.shape[1]))
    torch.testing.assert_close(causal[..., : len(others)][..., others], expected[..., others], rtol=1e-3, atol=1e-3)


# -- the mask token ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, special, wanted, mask_id, rows",
    [
        (
            "llama",
            ["<|reserved_special_token_2|>", "<|reserved_special_token_3|>"],
            None,
            VOCABULARY + 1,
            VOCABULARY + 2,
        ),
        ("qwen3", [], None, VOCABULARY, 320),  # rows beyond the tokenizer are used
        ("gemma3", [], None, VOCABULARY, VOCABULARY + 1),  # a new row
        ("gemma3", ["<unused0>"], "[MASK]", VOCABULARY + 1, VOCABULARY + 2),
    ],
    ids=["reserved", "spare row", "new row", "asked for"],
)
def test_the_mask_token_is_one_row_that_config_and_tokenizer_agree_on(tmp_path, kind, special, wanted, mask_id, rows):
    size = {} if kind == "qwen3" else {"vocab_size": VOCABULARY + len(special)}
    base = save_base(kind, tmp_path / "base", build_tokenizer(*special), **size)
    out = convert(base, tmp_path / "out", mask_token=wanted, verify=False)
    config, tokenizer = AutoConfig.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert (config.vocab_size, config.diffusion["mask_token_id"], tokenizer.mask_token_id) == (rows, mask_id, mask_id)
    assert tokenizer.mask_token == (wanted or (special[-1] if special else "<|mask|>"))
    assert tokenizer(f"a{tokenizer.mask_token} b").input_ids.count(mask_id) == 1
    assert AutoModelForCausalLM.from_pretrained(out).get_input_embeddings().num_embeddings == rows


@pytest.mark.parametrize("folder, name", [("my-llama", "my-llama"), ("runs/guide/model", "guide")])
def test_a_base_is_called_what_it_is_called_elsewhere(base_folder, tmp_path, monkeypatch, folder, name):
    shutil.copytree(base_folder("qwen3"), tmp_path / folder)
    monkeypatch.chdir(tmp_path / folder)
    assert name_of(".") == name_of(tmp_path / folder) == name
    assert name_of("owner/name") == "owner/name"


def test_chat_template_generation_config_and_unknown_keys_survive(base_folder, tmp_path):
    base = shutil.copytree(base_folder("qwen3"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "from_the_future": {"a": [1]}}))
    (base / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [0, 5], "do_sample": true}')
    out = convert(base, tmp_path / "out", attention="prefix", shift_logits=True, verify=False)
    written = json.loads((out / "config.json").read_text())
    assert written["from_the_future"] == {"a": [1]}
    before, after = (json.loads((folder / "generation_config.json").read_text()) for folder in (base, out))
    assert after == {**before, "mask_token_id": VOCABULARY}
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert DiffusionSpec(**written["diffusion"]) == DiffusionSpec(
        attention="prefix", mask_token_id=VOCABULARY, shift_logits=True, base_model=base.name
    )
    changed = {key for key in config.keys() | written.keys() if config.get(key) != written.get(key)}
    assert changed == {"diffusion", "from_the_future"}


# -- interruptions ----------------------------------------------------------------------------------------------------


def _convert_and_die(base: Path, out: Path, at: str) -> None:
    """Convert in a forked process that kills itself on writing the file `at`, in the probe, or at the rename."""

    def hook(event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if (writes and Path(str(args[0])).name == at) or (event == "os.rename" and at == "rename"):
            os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads
        child = os.fork()
    if child == 0:
        try:
            sys.addaudithook(hook)
            if at == "probe":
                adapt.probe.in_place.probe = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            convert(base, out)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"was not killed at {at}"


@pytest.mark.parametrize("at", ["model.safetensors", "config.json", "tokenizer_config.json", "probe", "rename"])
def test_a_killed_conversion_leaves_nothing_that_looks_like_its_result(base_folder, tmp_path, at):
    out = tmp_path / "out"
    _convert_and_die(base_folder("gemma3"), out, at)
    assert not out.exists()
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    assert adapt.files.model_folder.is_diffusion_checkpoint(convert(base_folder("gemma3"), out, verify=False))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), Exception("No space left on device (os error 28)")]
)
def test_a_full_disk_is_one_line_and_leaves_nothing(base_folder, tmp_path, monkeypatch, capsys, error):
    def full(*_args, **_options):
        raise error

    monkeypatch.setattr(weights, "copy_bytes", full)
    assert cli(["convert", str(base_folder("gemma3")), str(tmp_path / "out")]) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .splitlines()[-1]
        .startswith(f"adapt convert: error: out={tmp_path}/out: the disk is full")
    )
    assert not list(tmp_path.iterdir())


# -- what is refused --------------------------------------------------------------------------------------------------


def _folder(tmp_path: Path, base_folder, what: str) -> Path:
    """A folder that cannot be converted."""
    if what in ("mamba", "qwen3_next", "t5", "gemma3_multimodal"):
        return _config_only(tmp_path / what, what)
    source = base_folder("llama" if what == "missing shard" else "gemma3")
    folder = shutil.copytree(source, tmp_path / what)
    first = min(folder.glob("*.safetensors"))
    if what == "missing shard":
        first.unlink()
    elif what == "bin only":
        first.rename(folder / "pytorch_model.bin")
    elif what == "cut short":
        first.write_bytes(first.read_bytes()[:-100])
    elif what == "git-lfs pointer":
        first.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif what == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif what == "broken config":
        (folder / "config.json").write_text('{"model_type": "gem')
    elif what == "no config":
        (folder / "config.json").unlink()
    return folder


def _config_only(folder: Path, kind: str) -> Path:
    from transformers import Gemma3Config, MambaConfig, Qwen3NextConfig, T5Config

    config = {
        "mamba": lambda: MambaConfig(num_hidden_layers=2),
        "qwen3_next": lambda: Qwen3NextConfig(num_hidden_layers=4),
        "t5": T5Config,
        "gemma3_multimodal": Gemma3Config,
    }[kind]()
    config.save_pretrained(folder)
    return folder


REFUSED_FOLDERS = {
    "mamba": "layers [0, 1] are linear_attention",
    "qwen3_next": "layers [0, 1, 2] are linear_attention",
    "t5": "is an encoder-decoder (t5)",
    "gemma3_multimodal": "is multimodal (gemma3)",
    "missing shard": "names model-00001-of-",
    "bin only": "no model.safetensors or model.safetensors.index.json in it; pickled weights are not read",
    "cut short": "download the model again",
    "git-lfs pointer": "not a safetensors file",
    "no tokenizer": "no tokenizer in it",
    "broken config": "config.json",
    "no config": "not a model folder (no config.json in it)",
}


@pytest.mark.parametrize("what", REFUSED_FOLDERS)
def test_a_base_that_cannot_be_converted_is_refused_in_one_line(base_folder, tmp_path, capsys, what):
    base = _folder(tmp_path, base_folder, what)
    assert cli(["convert", str(base), str(tmp_path / "new" / "out")]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("adapt convert: error: ")
    assert REFUSED_FOLDERS[what] in errors[-1]
    assert not list(tmp_path.glob("new/*"))


REFUSED_OPTIONS = [
    (["--attention", "block"], "block_size=None: attention=block needs one; try 16 or 32"),
    (["--attention", "block", "--block_size", "0"], "block_size=0: must be from 1 to"),
    (
        ["--attention", "block", "--block_size", "4", "--clean_context", "full"],
        "clean_context=full: choose one of block, causal",
    ),
    (["--attention", "diagonal"], "attention=diagonal: choose one of bidirectional, block, prefix"),
    (["--block_size", "4"], "block_size=4: belongs to attention=block"),
    (["--mask_token", "<|endoftext|>"], "mask_token=<|endoftext|>: "),
    (["--mask_token", "the"], "mask_token=the: occurs in plain text"),
    (["--mask_token", " "], "mask_token=' ': is empty"),
    (["--mask_token", "<|assistant|>"], "mask_token=<|assistant|>: the chat template writes it"),
]


@pytest.mark.parametrize(
    "options, said", REFUSED_OPTIONS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_an_option_that_cannot_be_is_refused_in_one_line(base_folder, tmp_path, capsys, options, said):
    assert cli(["convert", str(base_folder("gemma3")), str(tmp_path / "out"), *options]) == 1
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_or_a_base_that_does_not_is_refused(base_folder, checkpoint_folder, tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert cli(["convert", str(base_folder("gemma3")), str(tmp_path / "mine")]) == 1
    assert "mine: exists already (is a file); choose a new folder" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "precious"
    assert cli(["convert", "./nowhere", str(tmp_path / "out")]) == 1
    assert "error: base=./nowhere: no such folder" in capsys.readouterr().err
    assert cli(["convert", str(checkpoint_folder("gemma3", "prefix")), str(tmp_path / "out")]) == 1
    assert "is a diffusion checkpoint already" in capsys.readouterr().err


def test_a_mask_token_that_the_tokenizer_splits_is_refused(base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerBase, "encode", lambda self, text, **_: [1, self.mask_token_id])
    with pytest.raises(ValueError, match=re.escape("mask_token=<|mask|>: the tokenizer splits or changes it")):
        convert(base_folder("gemma3"), tmp_path / "out")


def test_weights_that_lack_a_tensor_are_not_loaded_at_random(checkpoint_folder, tmp_path):
    folder = shutil.copytree(checkpoint_folder("gemma3", "prefix"), tmp_path / "lacking")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"], config["layer_types"] = 3, [*config["layer_types"], "full_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no weights for model\.layers\.2"):
        adapt.load(folder, device="cpu")


def test_a_single_file_comes_before_an_index_as_in_transformers(base_folder, tmp_path):
    base = shutil.copytree(base_folder("llama"), tmp_path / "base")
    model = build_model(config_of("llama"), seed=5)
    model.save_pretrained(tmp_path / "other", max_shard_size="1GB")
    shutil.copy(tmp_path / "other" / "model.safetensors", base)
    out = convert(base, tmp_path / "out", verify=False)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out).model.norm.weight, model.model.norm.weight)
    assert torch.equal(
        _tensors(out)["model.layers.0.self_attn.q_proj.weight"], model.model.layers[0].self_attn.q_proj.weight
    )
    assert not (out / weights.INDEX).exists()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_in_rows_that_the_probe_does_not_read_are_refused(
    base_folder, tmp_path, dtype: str | None, value: float
) -> None:
    base = shutil.copytree(base_folder("gpt2"), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("wpe.weight"))
    weights[name][100] = value
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"base=.*{name} has NaN or infinity in it"):
        convert(base, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()
