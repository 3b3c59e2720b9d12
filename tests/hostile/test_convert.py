"""Broken and hostile folders: `adapt convert` says one line, writes nothing, runs nothing and takes no memory for it."""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import data, edited, header, removed, tensors, text, void, without
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, build_tokenizer, save_base
from transformers import AutoConfig

from adapt.cli import main as cli
from adapt.conversion.convert import convert

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """qwen3: one file, tied embedding; llama: four shards and an index, untied."""
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_base(kind, folder / kind, build_tokenizer()) for kind in ("qwen3", "llama")}


# -- what is done to a good folder ------------------------------------------------------------------------------------


def mapped_to(file: Any) -> Callable[[Path], None]:
    """The index says that the first tensor is in that file."""

    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][min(index["weight_map"])] = file
        (folder / INDEX).write_text(json.dumps(index))

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(32)}, folder / "pytorch_model.bin")


def pickle_with_our_name(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))


class Bomb:
    """Unpickled it makes the folder that no test may find."""

    def __reduce__(self):
        return os.mkdir, ("/tmp/adapt-was-unpickled",)


def code(folder: Path) -> None:
    edited("config.json", "auto_map", to={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})(folder)
    edited("config.json", "model_type", to="evil")(folder)
    (folder / "evil.py").write_text("import pathlib\npathlib.Path(__file__).with_name('RAN').touch()\n")


def tokenizer_code(folder: Path) -> None:
    edited("tokenizer_config.json", "auto_map", to={"AutoTokenizer": ["evil.Slow", "evil.Fast"]})(folder)
    edited("tokenizer_config.json", "tokenizer_class", to="EvilTokenizer")(folder)
    removed("tokenizer.json")(folder)
    (folder / "vocab.json").write_text("{}")
    (folder / "evil.py").write_text("import pathlib\npathlib.Path(__file__).with_name('RAN').touch()\n")


def another_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    larger = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1000)}, unk_token="w0"))
    larger.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=larger, eos_token="w1").save_pretrained(folder)


def in_two_files(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    save_file(load_file(second) | load_file(first), second, metadata={"format": "pt"})


def nested(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


E, N = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
DAMAGED = "model.safetensors is not a safetensors file, or is cut short or damaged"
CONFIG = "config.json says {}, which no model has"


def nan(weights: dict[str, torch.Tensor], name: str, value: float = math.nan) -> None:
    weights[name].view(-1)[5] = value


# name -> (kind of base, what is done to it, what the line says[, more arguments])
CASES: dict[str, tuple] = {
    # weights that are not there, or not weights
    "no weights": ("qwen3", removed("model.safetensors"), "no model.safetensors or model.safetensors.index.json"),
    "pickled weights only": ("qwen3", pickled, "pickled weights are not read, convert them to safetensors"),
    "a pickle under our name": ("qwen3", pickle_with_our_name, DAMAGED),
    "empty file": ("qwen3", text("model.safetensors", b""), DAMAGED),
    "seven bytes": ("qwen3", text("model.safetensors", b"\0" * 7), DAMAGED),
    "a header of exabytes": ("qwen3", data(lambda old: b"\xff" * 8 + old[8:]), DAMAGED),
    "a header as long as the file": ("qwen3", data(lambda old: struct.pack("<Q", len(old)) + old[8:]), DAMAGED),
    "no tensors": ("qwen3", text("model.safetensors", struct.pack("<Q", 2) + b"{}"), "holds no tensor"),
    "header is a list": ("qwen3", text("model.safetensors", struct.pack("<Q", 2) + b"[]"), DAMAGED),
    "header is no JSON": ("qwen3", data(lambda old: old[:8] + b"x" + old[9:]), DAMAGED),
    "header is no UTF-8": ("qwen3", data(lambda old: old[:20] + b"\xff\xfe" + old[22:]), DAMAGED),
    "header flipped by a bit": ("qwen3", data(lambda old: old[:10] + bytes([old[10] ^ 64]) + old[11:]), ""),
    "cut by a byte": ("qwen3", data(lambda old: old[:-1]), DAMAGED),
    "cut in half": ("qwen3", data(lambda old: old[: len(old) // 2]), DAMAGED),
    "cut in the header": ("qwen3", data(lambda old: old[:100]), DAMAGED),
    "a byte too many": ("qwen3", data(lambda old: old + b"\0"), DAMAGED),
    "git-lfs pointer": ("qwen3", text("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), DAMAGED),
    "html of an error page": ("qwen3", text("model.safetensors", "<!DOCTYPE html><title>404</title>"), DAMAGED),
    "offsets past the end": ("qwen3", header(lambda h: h[E].update(data_offsets=[0, 10**12])), DAMAGED),
    "offsets backwards": ("qwen3", header(lambda h: h[E].update(data_offsets=h[E]["data_offsets"][::-1])), DAMAGED),
    "negative offsets": ("qwen3", header(lambda h: h[E].update(data_offsets=[-8, 8])), DAMAGED),
    "overlapping tensors": ("qwen3", header(lambda h: h[E].update(data_offsets=h[N]["data_offsets"])), DAMAGED),
    "a shape of exabytes": ("qwen3", header(lambda h: h[E].update(shape=[2**40, 2**20])), DAMAGED),
    "a shape that overflows": ("qwen3", header(lambda h: h[E].update(shape=[2**63, 2**63])), DAMAGED),
    "a negative shape": ("qwen3", header(lambda h: h[E].update(shape=[-320, -32])), DAMAGED),
    "a shape of words": ("qwen3", header(lambda h: h[E].update(shape="320")), DAMAGED),
    "an unknown dtype": ("qwen3", header(lambda h: h[E].update(dtype="F31")), DAMAGED),
    "another dtype": ("qwen3", header(lambda h: h[E].update(dtype="BF16")), DAMAGED),
    "no dtype": ("qwen3", header(lambda h: h[E].pop("dtype")), DAMAGED),
    "metadata of numbers": ("qwen3", header(lambda h: h.update(__metadata__={"format": 1})), DAMAGED),
    "a tensor that is missing": ("qwen3", tensors(lambda w: w.pop(N)), f"no weights for {N}"),
    "a tensor with another name": ("qwen3", tensors(lambda w: w.update(x=w.pop(N))), f"no weights for {N}"),
    "no embedding": ("qwen3", tensors(lambda w: w.pop(E)), "none of the tensors in its files is the embedding"),
    # weights that are wrong
    "wrong shape": ("qwen3", tensors(lambda w: w.update({N: w[N][:, :-1].contiguous()})), f"{N} is stored with the shape"),
    "transposed": ("qwen3", tensors(lambda w: w.update({N: w[N].T.contiguous()})), f"{N} is stored with the shape"),
    "a wider embedding": ("qwen3", tensors(lambda w: w.update({E: w[E].repeat(1, 2)})), f"{E} is stored with the shape"),
    "embedding of no rows": ("qwen3", tensors(lambda w: w.update({E: w[E][:0].contiguous()})), "embedding has 0 rows"),
    "NaN in the embedding": ("qwen3", tensors(lambda w: nan(w, E)), f"{E} has NaN or infinity in it"),
    "infinity in the embedding": ("qwen3", tensors(lambda w: nan(w, E, math.inf)), f"{E} has NaN or infinity"),
    "NaN in a layer": ("qwen3", tensors(lambda w: nan(w, N)), "NaN or infinity"),
    "infinity in a norm": ("qwen3", tensors(lambda w: nan(w, "model.norm.weight", math.inf)), "NaN or infinity"),
    "all zeros": ("qwen3", tensors(lambda w: [t.zero_() for t in w.values()]), "different rows in its embedding"),
    "a dead layer": (
        "qwen3",
        tensors(lambda w: [t.zero_() for n, t in w.items() if "v_proj" in n]),
        "the probe failed on Qwen3ForCausalLM",
    ),
    "quantised": (
        "qwen3",
        tensors(lambda w: w.update({n: t.to(torch.float8_e4m3fn) for n, t in w.items()})),
        "stored as F8_E4M3, which is quantised",
    ),
    "quantised in one layer": (
        "qwen3",
        tensors(lambda w: w.update({n: t.to(torch.float8_e4m3fn) for n, t in w.items() if "layers.1.mlp" in n})),
        "stored as F8_E4M3, which is quantised",
    ),
    "quantised, and another dtype asked for": (
        "qwen3",
        tensors(lambda w: w.update({n: t.to(torch.float8_e4m3fn) for n, t in w.items() if "layers.1.mlp" in n})),
        "stored as F8_E4M3, which is quantised",
        ["--dtype", "bfloat16"],
    ),
    "too large for float16": (
        "qwen3",
        tensors(lambda w: nan(w, N, 1e6)),
        f"dtype=float16: {N} holds 1e+06, which float16 cannot",
        ["--dtype", "float16"],
    ),
    # the index
    "missing shard": ("llama", removed("model-00002-of-00004.safetensors"), "names model-00002-of-00004.safetensors, which"),
    "index points at nothing": ("llama", mapped_to("model-9.safetensors"), "names model-9.safetensors, which is missing"),
    "index points to another shard": ("llama", mapped_to("model-00002-of-00004.safetensors"), "where it is not"),
    "index climbs out": ("llama", mapped_to("../model.safetensors"), "is not the name of a safetensors file of this folder"),
    "index climbs far out": ("llama", mapped_to("../" * 9 + "etc/passwd.safetensors"), "is not the name of a safetensors"),
    "index is absolute": ("llama", mapped_to("/etc/passwd.safetensors"), "is not the name of a safetensors file"),
    "index of Windows": ("llama", mapped_to("..\\x.safetensors"), "is not the name of a safetensors file"),
    "index with a zero byte": ("llama", mapped_to("a\0.safetensors"), "is not the name of a safetensors file"),
    "index names a hidden file": ("llama", mapped_to(".bashrc.safetensors"), "is not the name of a safetensors file"),
    "index names a pickle": ("llama", mapped_to("pytorch_model.bin"), "is not the name of a safetensors file"),
    "index names config.json": ("llama", mapped_to("config.json"), "is not the name of a safetensors file"),
    "index names a number": ("llama", mapped_to(7), "is not the name of a safetensors file"),
    "index names nothing": ("llama", mapped_to(None), "is not the name of a safetensors file"),
    "index of no tensors": ("llama", edited(INDEX, "weight_map", to={}), "has no weight_map"),
    "index of a list": ("llama", edited(INDEX, "weight_map", to=["a"]), "has no weight_map"),
    "index without a map": ("llama", without(INDEX, "weight_map"), "has no weight_map"),
    "index is a list": ("llama", text(INDEX, "[]"), f"{INDEX} is not valid JSON (a list"),
    "index is cut short": ("llama", text(INDEX, '{"weight_map": {'), f"{INDEX} is not valid JSON"),
    "index is binary": ("llama", text(INDEX, b"\xff\xfe\x00"), f"{INDEX} is not valid JSON"),
    "index says a key twice": ("llama", text(INDEX, '{"weight_map": {}, "weight_map": {}}'), "'weight_map' is there twice"),
    "a tensor in two shards": ("llama", in_two_files, "is in both model-00001"),
    # config.json
    "config is missing": ("qwen3", removed("config.json"), "not a model folder (no config.json in it)"),
    "config is empty": ("qwen3", text("config.json", ""), "config.json is not valid JSON"),
    "config is a list": ("qwen3", text("config.json", "[1]"), "config.json is not valid JSON (a list, not an object)"),
    "config is a number": ("qwen3", text("config.json", "7"), "config.json is not valid JSON (a int"),
    "config is binary": ("qwen3", text("config.json", b"\x80\x02}q"), "config.json is not valid JSON"),
    "config is bottomless": ("qwen3", nested, "config.json is not valid JSON"),
    "no model_type": ("qwen3", without("config.json", "model_type"), "config.json makes no model"),
    "unknown model_type": ("qwen3", edited("config.json", "model_type", to="zzz"), "config.json makes no model"),
    "model_type is a list": ("qwen3", edited("config.json", "model_type", to=["x"]), "config.json makes no model"),
    "a million layers": ("qwen3", edited("config.json", "num_hidden_layers", to=10**6), CONFIG.format("num_hidden_layers=1000000")),
    "a billion layers": ("qwen3", edited("config.json", "num_hidden_layers", to=10**9), CONFIG.format("num_hidden_layers=1000000000")),
    "more layers than weights": ("qwen3", edited("config.json", "num_hidden_layers", to=50), "config.json"),
    "minus two layers": ("qwen3", edited("config.json", "num_hidden_layers", to=-2), CONFIG.format("num_hidden_layers=-2")),
    "a hidden size of exabytes": ("qwen3", edited("config.json", "hidden_size", to=2**60), CONFIG.format(f"hidden_size={2**60}")),
    "a hidden size of zero": ("qwen3", edited("config.json", "hidden_size", to=0), "base="),
    "a hidden size of words": ("qwen3", edited("config.json", "hidden_size", to="32"), "config.json"),
    "another hidden size": ("qwen3", edited("config.json", "hidden_size", to=64), "is stored with the shape"),
    "another intermediate size": ("qwen3", edited("config.json", "intermediate_size", to=49), "is stored with the shape"),
    "an absurd intermediate size": ("qwen3", edited("config.json", "intermediate_size", to=10**12), "which no model has"),
    "an absurd vocabulary": ("qwen3", edited("config.json", "vocab_size", to=10**12), "which no model has"),
    "infinite vocabulary": ("qwen3", edited("config.json", "vocab_size", to=math.inf), "which no model has"),
    "absurd heads": ("qwen3", edited("config.json", "num_attention_heads", to=10**7), "which no model has"),
    "no heads": ("qwen3", edited("config.json", "num_attention_heads", to=0), "base="),
    "three heads of eight": ("qwen3", edited("config.json", "num_attention_heads", to=3), "is stored with the shape"),
    "a head dim of words": ("qwen3", edited("config.json", "head_dim", to="eight"), "config.json"),
    "an absurd head dim": ("qwen3", edited("config.json", "head_dim", to=2**40), "which no model has"),
    "absurd positions": ("qwen3", edited("config.json", "max_position_embeddings", to=2**50), "which no model has"),
    "a layer of another kind": ("qwen3", edited("config.json", "layer_types", to=["full_attention", "mamba"]), "base="),
    "too few layer types": ("qwen3", edited("config.json", "layer_types", to=["full_attention"]), "config.json"),
    "an unknown activation": ("qwen3", edited("config.json", "hidden_act", to="__import__('os')"), "config.json"),
    "an unknown rope": ("qwen3", edited("config.json", "rope_parameters", to={"rope_type": "zz", "rope_theta": 1e4}), "base="),
    "padding far away": ("qwen3", edited("config.json", "pad_token_id", to=10**6), "config.json"),
    "quantised by config": ("qwen3", edited("config.json", "quantization_config", to={"quant_method": "fp8"}), "quantised"),
    "other weights by config": ("qwen3", edited("config.json", "transformers_weights", to="../x.safetensors"), "remove that line"),
    "remote code": ("qwen3", code, "which was not run; read it, and if you trust it say --trust_remote_code true"),
    "converted already": ("qwen3", edited("config.json", "diffusion", to={"attention": "prefix"}), "is a diffusion checkpoint already"),
    "generation config is broken": ("qwen3", text("generation_config.json", "{"), "generation_config.json is not valid JSON"),
    "generation config is a list": ("qwen3", text("generation_config.json", "[]"), "generation_config.json is not valid JSON"),
    # the tokenizer
    "no tokenizer": ("qwen3", removed("tokenizer.json", "tokenizer_config.json"), "no tokenizer in it"),
    "tokenizer is broken": ("qwen3", text("tokenizer.json", "{"), "its tokenizer cannot be read"),
    "tokenizer is empty": ("qwen3", text("tokenizer.json", "{}"), "its tokenizer cannot be read"),
    "tokenizer of another model": ("qwen3", another_tokenizer, "it is the tokenizer of another model"),
    "tokenizer config is a list": ("qwen3", text("tokenizer_config.json", "[]"), "tokenizer_config.json is not valid JSON"),
    "tokenizer code": ("qwen3", tokenizer_code, "its tokenizer cannot be read"),
    "template climbs out": (
        "qwen3",
        lambda folder: (
            removed("chat_template.jinja")(folder),
            edited("tokenizer_config.json", "chat_template", to=[{"name": "default", "template": "x"},
                                                                 {"name": "../../../../out", "template": "x"}])(folder),
        ),
        "",
    ),
    # settings
    "a mask token in the vocabulary": ("qwen3", void, "mask_token=the: occurs in plain text", ["--mask_token", "the"]),
    "an unknown dtype setting": ("qwen3", void, "dtype=int4: choose one of bfloat16, float16, float32", ["--dtype", "int4"]),
    "padding by nothing": ("qwen3", void, "pad_to_multiple_of=0: must be from 1", ["--pad_to_multiple_of", "0"]),
    "padding by billions": ("qwen3", void, "pad_to_multiple_of=1000000000: must be", ["--pad_to_multiple_of", "1000000000"]),
    "negative noise": ("qwen3", void, "mask_init_std=-1.0: must be from 0 to 1", ["--mask_init_std", "-1"]),
    "an unknown kernel": ("qwen3", void, "attn_implementation", ["--attn_implementation", "magic"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_broken_folder_is_refused_in_one_line_and_nothing_is_written(bases, tmp_path, capsys, name):
    kind, damage, said, *more = CASES[name]
    base = shutil.copytree(bases[kind], tmp_path / "in" / "base")
    damage(base)
    before = _everything(tmp_path)
    code = cli(["convert", str(base), str(tmp_path / "out" / "model"), *(more[0] if more else [])])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert code == 1, lines
    assert lines[-1].startswith("adapt convert: error: ")
    assert sum("error:" in line for line in lines) == 1
    assert said in lines[-1]
    after = {path: content for path, content in _everything(tmp_path).items() if path != "out"}
    assert after == before
    assert not Path("/tmp/adapt-was-unpickled").exists()


@pytest.mark.parametrize(
    "name", [n for n in CASES if len(CASES[n]) == 3 and any(w in n for w in ("absurd", "illion", "exabytes"))]
)
def test_no_memory_is_taken_for_absurd_sizes(bases, tmp_path, capsys, name):
    kind, damage, *_ = CASES[name]
    base = shutil.copytree(bases[kind], tmp_path / "base")
    damage(base)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert cli(["convert", str(base), str(tmp_path / "out")]) == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10  # KiB


def test_there_are_eighty_cases_and_more():
    assert len(CASES) >= 80


def _everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# -- fuzzing ----------------------------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**66), 2**66) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
_SMALL = st.integers(-3, 70)
_FUZZ = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


def _said(base: Path, out: Path) -> str | None:
    """What convert complains of, or None; any other exception than ValueError is our mistake."""
    try:
        convert(base, out, mask_token="<|mask|>")
    except ValueError as error:
        return str(error).strip()
    return None


@pytest.fixture(scope="module")
def fuzzed(bases, tmp_path_factory) -> Callable[[str, str, dict], None]:
    """fuzzed("qwen3", "config.json", content): a good conversion or one line, and nothing in OUT; content replaces the file."""
    root = tmp_path_factory.mktemp("fuzzed")

    def attempt(kind: str, file: str, content: object) -> None:
        base, out = root / "base", root / "out"
        for folder in (base, out):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bases[kind], base)
        (base / file).write_text(json.dumps(content))
        said = _said(base, out)
        left = sorted(path.name for path in root.iterdir())
        if said is not None:
            assert "\n" not in said
            assert any(name in said for name in (str(base), "base=", "attention=")), said
            assert left == ["base"]
        else:
            assert left == ["base", "out"]
            assert AutoConfig.from_pretrained(out).diffusion["mask_token_id"] == VOCABULARY

    return attempt


@_FUZZ
@given(st.data())
def test_fuzzed_configs_make_a_checkpoint_or_one_line(fuzzed, bases, data) -> None:
    content = json.loads((bases["qwen3"] / "config.json").read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(content)), min_size=1, max_size=3, unique=True)):
        if data.draw(st.integers(0, 9)) == 0:
            del content[key]
        else:
            content[key] = data.draw(
                st.one_of(_SMALL, _JSON, st.sampled_from([content[other] for other in sorted(content)]))
            )
    fuzzed("qwen3", "config.json", content)


@_FUZZ
@given(st.data())
def test_fuzzed_indexes_make_a_checkpoint_or_one_line(fuzzed, bases, data) -> None:
    content = json.loads((bases["llama"] / INDEX).read_text())
    weight_map = content["weight_map"]
    files = st.sampled_from([*sorted(set(weight_map.values())), "../x.safetensors", "a/b.safetensors", "/x", ".", ""])
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            weight_map[data.draw(st.sampled_from(sorted(weight_map)) | st.text(max_size=5))] = data.draw(files | _JSON)
        elif data.draw(st.booleans()):
            content[data.draw(st.sampled_from(["metadata", "weight_map", "x"]))] = data.draw(_JSON)
            if not isinstance(content["weight_map"], dict) or not content["weight_map"]:
                break
            weight_map = content["weight_map"]
        else:
            weight_map.pop(data.draw(st.sampled_from(sorted(weight_map))))
            if not weight_map:
                break
    fuzzed("llama", INDEX, content)


@settings(_FUZZ, max_examples=15)
@given(st.data())
def test_fuzzed_headers_make_a_checkpoint_or_one_line(fuzzed, bases, data) -> None:
    """A bit of the header or of the data flips: the first is seen, the second is weights like any other, or NaN."""
    whole = bytearray((bases["qwen3"] / "model.safetensors").read_bytes())
    (length,) = struct.unpack("<Q", whole[:8])
    at = data.draw(st.integers(0, 7 + length) | st.integers(8 + length, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    folder = bases["qwen3"].parent / "flipped"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bases["qwen3"], folder)
    (folder / "model.safetensors").write_bytes(whole)
    out = folder.parent / "out of flipped"
    said = _said(folder, out)
    assert out.exists() == (said is None)
    shutil.rmtree(out, ignore_errors=True)
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
