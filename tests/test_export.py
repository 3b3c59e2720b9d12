"""`adapt export`: what it writes loads and decodes with transformers alone, to the same tokens as here."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY
from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer

import adapt
from adapt.cli import main as cli
from adapt.conversion.convert import convert
from adapt.decoding.settings import SamplerConfig
from adapt.export import custom_generate
from adapt.export import export as export_module
from adapt.export.export import export
from adapt.export.model_card import license_of
from adapt.files.safetensors_folder import INDEX
from adapt_eval.report.page import write_report

# What decodes differently; every one of them with and without left padding.
KINDS = {
    "bidirectional": ("llama", {"attention": "bidirectional"}),
    "bidirectional-shift-uniform": ("llama", {"shift_logits": True, "noise": "uniform"}),
    "bidirectional-windows": ("gemma3", {"attention": "bidirectional"}),
    "bidirectional-by-mask": ("stablelm", {"attention": "bidirectional"}),
    "prefix": ("gpt2", {"attention": "prefix"}),
    "prefix-shift-hybrid": (
        "qwen3",
        {"attention": "prefix", "shift_logits": True, "noise": "hybrid", "p_uniform": 0.1},
    ),
    "prefix-windows": ("gemma3", {"attention": "prefix", "shift_logits": True}),
    "block": ("llama", {"attention": "block", "block_size": 4}),
    "block-shift-uniform": (
        "gemma3",
        {"attention": "block", "block_size": 4, "shift_logits": True, "noise": "uniform"},
    ),
    "block-block": ("qwen3", {"attention": "block", "block_size": 4, "clean_context": "block"}),
}
PROMPTS = [[5, 41, 7, 92, 13], [77, 21, 140]]
CALLS = {
    "greedy": {"max_new_tokens": 9},
    "threshold": {"max_new_tokens": 9, "threshold": 0.3},
    "left_to_right": {"max_new_tokens": 6, "tokens_per_step": 2, "order": "left_to_right"},
    "sampled": {"max_new_tokens": 9, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 3},
}
# transformers alone: `python -S` sees no site-packages but the folder of links that PYTHONPATH names.
STRANGER = """
import importlib.util, json, os, sys
assert importlib.util.find_spec("adapt") is None and importlib.util.find_spec("adapt_eval") is None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

written = {}
for name, (folder, calls) in json.load(open(sys.argv[1])).items():
    model = AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    for call, (inputs, settings) in calls.items():
        inputs = {key: torch.tensor(value) for key, value in inputs.items()}
        out = model.generate(**inputs, custom_generate=folder, trust_remote_code=True, **settings)
        written[f"{name} {call}"] = out.tolist()
    torch.save(model(torch.tensor([[5, 41, 7, 92]])).logits, f"{folder}.logits")
card = open(f"{folder}/README.md").read().split("```python\\n")[1].split("```")[0]
os.chdir(os.path.dirname(folder))
exec(card)
json.dump(written, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def exported(base_folder, tmp_path_factory):
    """exported(kind) -> (the checkpoint, its export); each made once."""
    root, made = tmp_path_factory.mktemp("exports"), {}

    def folders(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            base, options = KINDS[kind]
            checkpoint = convert(base_folder(base), root / f"{kind}.checkpoint", verify=False, **options)
            made[kind] = checkpoint, export(checkpoint, root / kind)
        return made[kind]

    return folders


@pytest.fixture(scope="module")
def environment_without_us(tmp_path_factory) -> dict[str, str]:
    site = tmp_path_factory.mktemp("site")
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(folder).iterdir():
            if not entry.name.startswith(("adapt", "__editable__")) and entry.suffix != ".pth":
                (site / entry.name).symlink_to(entry)
    return os.environ | {"PYTHONPATH": str(site), "HF_HOME": str(site.parent / "home"), "PYTHONDONTWRITEBYTECODE": "1"}


def _batch() -> dict[str, torch.Tensor]:
    width = max(map(len, PROMPTS))
    return {
        "input_ids": torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS]),
    }


def _ours(lm, inputs, max_new_tokens=64, seed=None, do_sample=None, **sampler) -> torch.Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    settings = SamplerConfig(**sampler)
    out = lm.generate(max_new_tokens=max_new_tokens, sampler=settings, generator=generator, **inputs)
    return out.sequences


def _ending(lm, end: int):
    tokenizer = deepcopy(lm.tokenizer)
    tokenizer.eos_token_id = end
    return dataclasses.replace(lm, tokenizer=tokenizer)


def test_plain_transformers_without_this_package_write_the_same_tokens(
    exported, environment_without_us, tmp_path
) -> None:
    asked, expected, logits = {}, {}, {}
    for kind in KINDS:
        checkpoint, folder = exported(kind)
        lm = adapt.load(checkpoint, device="cpu")
        calls = {}
        for rows in ("one row", "padded"):
            inputs = _batch() if rows == "padded" else {"input_ids": torch.tensor(PROMPTS[:1])}
            plain = {key: value.tolist() for key, value in inputs.items()}
            for call, settings in CALLS.items():
                calls[f"{rows} {call}"] = plain, settings
                expected[f"{kind} {rows} {call}"] = _ours(lm, inputs, **settings).tolist()
            # Ends at a token that it is known to write.
            end = expected[f"{kind} {rows} greedy"][0][-4]
            calls[f"{rows} ends"] = plain, {"max_new_tokens": 9, "eos_token_id": end}
            expected[f"{kind} {rows} ends"] = _ours(_ending(lm, end), inputs, max_new_tokens=9).tolist()
        asked[kind] = str(folder), calls
        with torch.no_grad():
            logits[kind] = lm.model(torch.tensor([[5, 41, 7, 92]])).logits
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    command = [sys.executable, "-S", "-c", STRANGER, tmp_path / "asked.json", tmp_path / "written.json"]
    done = subprocess.run(command, env=environment_without_us, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    written = json.loads((tmp_path / "written.json").read_text())
    assert written == expected
    assert len({json.dumps(tokens) for tokens in written.values()}) > len(KINDS) * len(CALLS), "they hardly differ"
    for kind in KINDS:
        assert torch.equal(torch.load(f"{asked[kind][0]}.logits"), logits[kind]), kind


@pytest.fixture(scope="module")
def loaded(exported):
    """loaded(kind) -> (our DiffusionLM of the checkpoint, the model that plain transformers make of the export)."""
    made = {}

    def pair(kind: str):
        if kind not in made:
            checkpoint, folder = exported(kind)
            made[kind] = adapt.load(checkpoint, device="cpu"), AutoModelForCausalLM.from_pretrained(folder)
        return made[kind]

    return pair


def _plain(model, inputs, **settings):
    return custom_generate.generate(model=model, **inputs, **settings)


def test_settings_come_from_keywords_then_the_config_passed_then_the_model(loaded) -> None:
    lm, model = loaded("prefix")
    inputs = {"input_ids": torch.tensor(PROMPTS[:1])}
    config = GenerationConfig(max_new_tokens=7, tokens_per_step=3)
    assert torch.equal(_plain(model, inputs), _ours(lm, inputs, max_new_tokens=64))
    assert torch.equal(_plain(model, inputs, generation_config=config), _ours(lm, inputs, 7, tokens_per_step=3))
    few = _plain(model, inputs, generation_config=config, max_new_tokens=5, tokens_per_step=1)
    assert torch.equal(few, _ours(lm, inputs, 5, tokens_per_step=1))
    assert torch.equal(_plain(model, inputs, max_length=12), _ours(lm, inputs, 7))
    assert torch.equal(_plain(model, inputs, max_length=12, max_new_tokens=3), _ours(lm, inputs, 3))
    drawn = _ours(lm, inputs, 9, seed=5, temperature=0.7)
    assert torch.equal(_plain(model, inputs, max_new_tokens=9, temperature=0.7, seed=5), drawn)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(_plain(model, inputs, max_new_tokens=9, temperature=0.7, generator=generator), drawn)
    asked = GenerationConfig(max_new_tokens=9, do_sample=True, temperature=0.7)
    assert torch.equal(_plain(model, inputs, generation_config=asked, seed=5), drawn)
    assert torch.equal(_plain(model, inputs, max_new_tokens=9, temperature=0.7, do_sample=False), _ours(lm, inputs, 9))
    torch.manual_seed(8)
    once = _plain(model, inputs, max_new_tokens=20, do_sample=True)
    torch.manual_seed(8)
    assert torch.equal(_plain(model, inputs, max_new_tokens=20, do_sample=True), once)
    assert not torch.equal(_plain(model, inputs, max_new_tokens=20, do_sample=True), once)


def test_generation_output_and_padding_are_those_of_transformers(loaded) -> None:
    lm, model = loaded("prefix")
    inputs = {"input_ids": torch.tensor(PROMPTS[:1])}
    output = _plain(model, inputs, max_new_tokens=9, return_dict_in_generate=True)
    assert torch.equal(output.sequences, _ours(lm, inputs, 9))
    assert output.nfe >= 1
    end = int(output.sequences[0, 8])
    padded = _plain(model, inputs, max_new_tokens=9, eos_token_id=[end], pad_token_id=11)[0, 5:].tolist()
    first = padded.index(end)
    assert padded[first + 1 :] == [11] * (8 - first)
    assert _plain(model, inputs, max_new_tokens=9, eos_token_id=end)[0, 5:].tolist()[first:] == [end] * (9 - first)


class Recorder(TextStreamer):
    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.got: list[torch.Tensor] = []
        self.shown: list[str] = []

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        self.got.append(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.shown.append(text)


def test_a_streamer_of_transformers_gets_each_token_once_and_in_order(loaded, exported) -> None:
    for kind in ("bidirectional", "block"):
        lm, model = loaded(kind)
        inputs = {"input_ids": torch.tensor(PROMPTS[:1])}
        streamer = Recorder(lm.tokenizer, skip_prompt=True)
        got = streamer.got
        written = _plain(model, inputs, max_new_tokens=16, threshold=0.3, streamer=streamer)
        assert torch.equal(got[0], inputs["input_ids"])
        assert [int(token) for token in got[1:]] == written[0, 5:].tolist()
        assert "".join(streamer.shown) == lm.tokenizer.decode(written[0, 5:])
        end = int(written[0, 10])
        got.clear()
        _plain(model, inputs, max_new_tokens=16, threshold=0.3, eos_token_id=end, streamer=streamer)
        assert [int(token) for token in got[1:]].count(end) == 1
        assert int(got[-1]) == end
    with pytest.raises(ValueError, match="streams one row, but input_ids has 2"):
        _plain(model, _batch(), max_new_tokens=4, streamer=streamer)


def test_infill_is_ours_and_streams_from_the_first_blank(loaded) -> None:
    lm, model = loaded("bidirectional")
    text = torch.tensor([[5, VOCABULARY, 7, VOCABULARY, VOCABULARY, 9]])
    got: list[torch.Tensor] = []
    streamer = TextStreamer(lm.tokenizer)
    streamer.put = got.append
    filled = _plain(model, {"input_ids": text}, infill=True, streamer=streamer)
    assert torch.equal(filled, lm.infill(text).sequences)
    assert torch.cat([got[0][0], *got[1:]]).tolist() == filled[0].tolist()


def test_what_refinement_does_not_have_is_refused_in_one_line(loaded) -> None:
    _, model = loaded("prefix")
    inputs = {"input_ids": torch.tensor(PROMPTS[:1])}
    cases = [
        ({"num_beams": 4}, "num_beams: decoding by refinement has no such setting"),
        ({"top_k": 20, "do_sample": True}, "top_k: "),
        ({"logits_processor": [1]}, "logits_processor: "),
        ({"generation_config": GenerationConfig(repetition_penalty=1.2)}, "repetition_penalty: "),
        ({"thresold": 0.3}, "thresold: .* threshold"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\]: a diffusion model ends with one token"),
        ({"canvas_length": 0}, "sampler.canvas_length=0"),
        ({"threshold": 0.5, "tokens_per_step": 2}, "are two rules for the same thing; give one"),
        ({"max_new_tokens": 1000}, "max_new_tokens=1000: with the prompt's 5 tokens"),
        ({"input_ids": None}, "input_ids: none given"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            _plain(model, inputs | settings)
        assert "\n" not in str(error.value)
    assert _plain(model, inputs, num_beams=1, use_cache=True, top_k=0, max_new_tokens=2).shape == (1, 7)


def test_a_model_that_does_not_attend_as_its_config_says_is_refused(exported) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported("bidirectional-by-mask")[1])
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    model.model.layers[0].self_attn.forward = model.model.layers[1].self_attn.forward
    with pytest.raises(ValueError, match="the probe failed"):
        _plain(model, {"input_ids": torch.tensor(PROMPTS[:1])}, max_new_tokens=2)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_an_adapter_is_merged_into_shards_of_the_size_and_dtype_asked_for(checkpoint_folder, tmp_path, kind) -> None:
    peft = pytest.importorskip("peft", reason="the peft package is not installed")
    checkpoint = checkpoint_folder(kind, "block/causal")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        target_modules=["q_proj", "up_proj"],
        trainable_token_indices={"embed_tokens": [VOCABULARY]},
    )
    trained = peft.get_peft_model(model, config).eval()
    trained.save_pretrained(tmp_path / "adapter")
    out = export(checkpoint, tmp_path / "out", adapter=tmp_path / "adapter", max_shard_size="20KB")
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    tokens = torch.tensor([[5, 41, 7, VOCABULARY]])
    with torch.no_grad():
        logits, expected = AutoModelForCausalLM.from_pretrained(out)(tokens).logits, trained(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)
    half = export(tmp_path / "adapter", tmp_path / "half", dtype="bfloat16")
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(half / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in index["weight_map"]} == {torch.bfloat16}
    merged = AutoModelForCausalLM.from_pretrained(out).to(torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(half)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in merged.state_dict().items())


@pytest.fixture
def _no_model_is_loaded(monkeypatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.mark.usefixtures("_no_model_is_loaded")
def test_an_export_loads_no_model_and_its_weights_are_the_files_of_the_checkpoint(checkpoint_folder, tmp_path) -> None:
    checkpoint = checkpoint_folder("llama", "prefix")
    out = export(checkpoint, tmp_path / "out")
    files = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    assert len(files) > 1
    assert files == sorted(path.name for path in out.glob("*.safetensors"))
    assert all((out / name).read_bytes() == (checkpoint / name).read_bytes() for name in files)
    one, other = (json.loads((folder / INDEX).read_text()) for folder in (checkpoint, out))
    assert one == other
    half = export(checkpoint, tmp_path / "half", dtype="bfloat16")
    for name in files:
        before, after = load_file(checkpoint / name), load_file(half / name)
        assert all(torch.equal(after[tensor], value.bfloat16()) for tensor, value in before.items())


@pytest.mark.usefixtures("_no_model_is_loaded")
def test_the_weights_of_an_export_are_proved_where_they_lie(checkpoint_folder, tmp_path) -> None:
    checkpoint = shutil.copytree(checkpoint_folder("llama", "prefix"), tmp_path / "checkpoint")
    name = "model.layers.1.self_attn.v_proj.weight"
    path = checkpoint / json.loads((checkpoint / INDEX).read_text())["weight_map"][name]
    tensors = load_file(path)
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the probe failed"):
        export(checkpoint, tmp_path / "out")
    path.unlink()
    with pytest.raises(ValueError, match=rf"^checkpoint={checkpoint}: .* names {path.name}, which is missing"):
        export(checkpoint, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [checkpoint]


def test_lora_is_merged_into_an_export_tensor_by_tensor(checkpoint_folder, tmp_path) -> None:
    peft = pytest.importorskip("peft", reason="the peft package is not installed")
    checkpoint = checkpoint_folder("llama", "prefix")
    config = peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj", "up_proj"])
    torch.manual_seed(1)
    trained = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config).eval()
    trained.save_pretrained(tmp_path / "adapter")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AutoModelForCausalLM, "from_pretrained", None)
        out = export(checkpoint, tmp_path / "out", adapter=tmp_path / "adapter")
    tokens = torch.tensor([[5, 41, 7, VOCABULARY]])
    with torch.no_grad():
        logits, expected = AutoModelForCausalLM.from_pretrained(out)(tokens).logits, trained(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)
    assert not torch.equal(logits, AutoModelForCausalLM.from_pretrained(checkpoint)(tokens).logits)


def _report(checkpoint: Path) -> dict:
    from adapt_eval.measure import provenance

    arm = provenance.checkpoint(checkpoint, AutoModelForCausalLM.from_pretrained(checkpoint))
    score = {"value": 0.5, "stderr": 0.1, "ci95": [0.3, 0.7]}
    row = {"task": "gsm8k", "metric": "exact_match,strict", "higher_is_better": True, "n": 25, "base": score}
    row |= {"adapted": score | {"value": 0.25}, "control": None, "delta": -0.25, "ci95": [-0.4, -0.1], "p_value": 0.01}
    return {
        "provenance": {"arms": {"adapted": arm}, "command": "adapt compare ...", "sampler": {"threshold": 0.7}},
        "quality": [row],
        "likelihood": [],
        "speed": [],
        "pareto": [],
        "warnings": ["Some rows rest on 25 items only; their intervals are wide."],
    }


def test_the_card_shows_the_figures_of_this_checkpoint_with_their_warnings(exported, tmp_path) -> None:
    checkpoint, _ = exported("prefix")
    found = _report(checkpoint)
    found["provenance"]["command"] = f"adapt compare --base={tmp_path}/base --adapted {checkpoint} --tasks gsm8k"
    report = write_report(found, tmp_path / "compared") / "report.json"
    card = ModelCard.load(export(checkpoint, tmp_path / "out", report=report, license="mit") / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "mit",
        "transformers",
        "text-generation",
    )
    result = card.data.eval_results[0]
    assert (result.dataset_name, result.metric_name, result.metric_value) == ("gsm8k", "exact_match,strict", 0.25)
    assert "Some rows rest on 25 items only" in card.text
    assert "| gsm8k | exact_match,strict | 25 | 50.0 %" in card.text
    assert "max_new_tokens=64, threshold=0.7)" in card.text, "the example decodes as the figures were measured"
    assert f"adapt compare --base=base --adapted {checkpoint.name} --tasks gsm8k" in card.text
    assert str(tmp_path.parent) not in card.text


def test_the_licence_that_the_base_names_goes_with_what_is_made_of_it(base_folder, tmp_path) -> None:
    base = shutil.copytree(base_folder("qwen3"), tmp_path / "base")
    for text, found in (
        ("no metadata", None),
        ("---\nlicense: apache-2.0\n---\n# Base\nIt beats all others.", "apache-2.0"),
    ):
        (base / "README.md").write_text(text)
        out = adapt.convert(base, tmp_path / f"out-{found}", attention="prefix", verify=False)
        assert license_of(out, adapt.load(out, device="cpu", verify=False).spec) == found
    assert (out / "README.md").read_text() == '---\nlicense: "apache-2.0"\n---\n'
    (tmp_path / "secret").write_text("---\nlicense: mit\n---\n")
    (base / "README.md").unlink()
    (base / "README.md").symlink_to(tmp_path / "secret")
    assert not (adapt.convert(base, tmp_path / "linked", verify=False) / "README.md").exists()


def test_a_checkpoint_and_its_export_tell_a_stranger_no_path_of_this_machine(exported, tmp_path_factory) -> None:
    here = str(tmp_path_factory.getbasetemp()).encode()
    for folder in exported("prefix"):
        for file in folder.rglob("*"):
            assert not file.is_file() or here not in file.read_bytes(), file


def test_bad_requests_are_one_line_and_write_nothing(exported, base_folder, tmp_path, monkeypatch, capsys) -> None:
    checkpoint, other = exported("prefix")[0], exported("block")[0]
    (tmp_path / "there").mkdir()
    (tmp_path / "other.json").write_text(json.dumps(_report(other)))
    (tmp_path / "bad.json").write_text('{"quality": []}')
    (tmp_path / "alone.json").write_text(json.dumps(_report(checkpoint)))
    cases = [
        ([checkpoint, "there"], "out=there: exists already"),
        ([checkpoint, "new", "--format", "gguf"], "format=gguf: choose one of hf"),
        ([checkpoint, "new", "--dtype", "int8"], "dtype=int8: choose one of bfloat16, float16, float32"),
        ([checkpoint, "new", "--max_shard_size", "big"], "max_shard_size=big: give a size like 500MB"),
        ([checkpoint, "new", "--adapter", "nowhere"], "adapter=nowhere: not a PEFT folder"),
        ([checkpoint, "new", "--report", "nowhere"], "report=nowhere: no such file"),
        ([checkpoint, "new", "--report", "bad.json"], "report=bad.json: not a report.json of `adapt compare`"),
        ([checkpoint, "new", "--report", "other.json"], f"report=other.json: is about {other}"),
        ([checkpoint, "new", "--report", "alone.json"], "report=alone.json: has no report.md beside it"),
        ([checkpoint, "new", "--sampler.threshold", "2"], "sampler.threshold=2"),
        ([base_folder("llama"), "new"], "its config.json has no `diffusion` section"),
        (["nowhere/at/all", "new"], "checkpoint=nowhere/at/all: no such folder"),
    ]
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    for arguments, message in cases:
        assert cli(["export", *map(str, arguments)]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert len([line for line in error.splitlines() if line.startswith("adapt export")]) == 1
        assert sorted(tmp_path.iterdir()) == before


def test_an_export_cut_short_or_out_of_disk_leaves_nothing(exported, tmp_path, monkeypatch) -> None:
    def stop(error: BaseException):
        def write(*_, **__):
            raise error

        monkeypatch.setattr(export_module, "write_card", write)

    stop(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        export(exported("prefix")[0], tmp_path / "out")
    stop(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ValueError, match=r"out=.*the disk is full"):
        export(exported("prefix")[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_sampler_given_at_export_is_what_the_export_decodes_with(exported, tmp_path) -> None:
    checkpoint, _ = exported("prefix")
    settings = SamplerConfig(tokens_per_step=2, canvas_length=4, temperature=0.9, top_p=0.8)
    model = AutoModelForCausalLM.from_pretrained(export(checkpoint, tmp_path / "out", sampler=settings))
    inputs = {"input_ids": torch.tensor(PROMPTS[:1])}
    expected = _ours(adapt.load(checkpoint, device="cpu"), inputs, seed=1, **dataclasses.asdict(settings))
    assert torch.equal(_plain(model, inputs, seed=1), expected)
