"""`adapt export`: what it writes loads and decodes with transformers alone, to the same tokens as here."""

import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
from copy import deepcopy
from pathlib import Path

import pytest
import torch

import adapt
from adapt.conversion import convert
from adapt.export import export
from adapt.sampler import SamplerConfig

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
import importlib.util, json, sys
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
    if "tokens_per_step" in sampler:
        sampler["threshold"] = None
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
