"""PEFT adapters: what is merged computes what PEFT computes, and what does not belong together is refused in one line."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import VOCABULARY, build_tokenizer, save_base
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapt
from adapt.conversion.convert import convert
from adapt.files import adapters

peft = pytest.importorskip("peft", reason="the peft package is not installed")
TOKENS = torch.tensor([[5, 41, 7, 92, 13, 200, 3]])


def train_adapter(base: Path, out: Path, **options) -> Path:
    """An adapter of `base` whose weights are random, as after training."""
    torch.manual_seed(1)
    usual = {"target_modules": "all-linear", "init_lora_weights": False}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **usual | options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft advises against some of what is tried here
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(out, save_embedding_layers=False)
    return out


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def lora(base_folder, tmp_path_factory) -> Path:
    return train_adapter(base_folder("llama"), tmp_path_factory.mktemp("adapters") / "lora")


@pytest.mark.parametrize(
    "kind, options",
    [
        ("llama", {"r": 4}),
        ("llama", {"use_dora": True, "use_rslora": True}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"q_proj": 2}}),
        ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_a_converted_base_with_adapter_computes_what_peft_does(base_folder, tmp_path, kind, options) -> None:
    base = base_folder(kind)
    adapter = train_adapter(base, tmp_path / "adapter", **options)
    folder = convert(base, tmp_path / "out", adapter=adapter, attention="prefix")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits[..., :VOCABULARY]
    expected = peft_logits(base, adapter)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    plain = AutoModelForCausalLM.from_pretrained(base)(TOKENS).logits
    assert (plain - expected).abs().max() > 0.1, "the adapter changes nothing"


@pytest.mark.parametrize(
    "kind, options, by_file",
    [
        ("llama", {"lora_alpha": 3, "alpha_pattern": {"q_proj": 5}}, True),
        ("llama", {"use_dora": True, "target_modules": ["down_proj", "embed_tokens"]}, True),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, True),
        ("qwen3", {"target_modules": ["k_proj"], "init_lora_weights": "pissa"}, False),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    ],
)
def test_merging_by_file_loads_no_model_and_is_merging_as_a_whole(
    base_folder, tmp_path, monkeypatch, kind, options, by_file
) -> None:
    base = base_folder(kind)
    adapter = train_adapter(base, tmp_path / "adapter", **options)
    whole = adapters.merged(AutoModelForCausalLM.from_pretrained(base), adapter).state_dict()
    loads = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **b: loads.append(a) or load(*a, **b))
    folder = adapters.merge_folder(base, adapter, tmp_path / "out")
    assert bool(loads) is not by_file
    found = load(folder).state_dict()
    for name, weight in whole.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


def test_merging_by_file_keeps_dtypes_shards_and_metadata(base_folder, lora, tmp_path) -> None:
    base = base_folder("llama")
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(half, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(base).save_pretrained(half)
    folder = adapters.merge_folder(half, lora, tmp_path / "out")
    whole = adapters.merged(AutoModelForCausalLM.from_pretrained(half, dtype="auto"), lora).state_dict()
    files = sorted(path.name for path in half.glob("*.safetensors*"))
    assert sorted(path.name for path in folder.glob("*.safetensors*")) == files
    for name in files[:-1]:
        with safe_open(half / name, "pt") as before, safe_open(folder / name, "pt") as after:
            assert list(before.keys()) == list(after.keys())
            assert before.metadata() == after.metadata()
            for key in before.keys():  # noqa: SIM118
                assert torch.equal(after.get_tensor(key), whole[key]), key


def test_the_folder_of_an_adapter_is_a_base(base_folder, lora, tmp_path) -> None:
    folder = convert(lora, tmp_path / "out", attention="prefix")
    assert adapt.load(folder, device="cpu").spec.base_model == base_folder("llama").name
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits[..., :VOCABULARY]
    torch.testing.assert_close(logits, peft_logits(base_folder("llama"), lora), rtol=1e-4, atol=1e-3)


def test_an_adapter_on_a_checkpoint_is_merged_at_load(checkpoint_folder, tmp_path) -> None:
    checkpoint = checkpoint_folder("llama", "prefix")
    adapter = train_adapter(checkpoint, tmp_path / "adapter", trainable_token_indices={"embed_tokens": [VOCABULARY]})
    expected = peft_logits(checkpoint, adapter)
    for lm in (adapt.load(checkpoint, adapter=adapter, device="cpu"), adapt.load(adapter, device="cpu")):
        with torch.no_grad():
            torch.testing.assert_close(lm.model(TOKENS).logits, expected, rtol=1e-4, atol=1e-3)


def test_merging_reads_no_pickle_and_no_weights_of_a_damaged_base(base_folder, lora, tmp_path) -> None:
    pickled = shutil.copytree(base_folder("llama"), tmp_path / "pickled")
    weights = AutoModelForCausalLM.from_pretrained(pickled).state_dict()
    for path in pickled.glob("model*.safetensors*"):
        path.unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    cut = shutil.copytree(base_folder("llama"), tmp_path / "cut")
    shard = min(cut.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    for base, message in ((pickled, "pickled weights are not read"), (cut, f"{shard.name} is not a safetensors file")):
        adapter = _edited(lora, tmp_path / f"for {base.name}", base_model_name_or_path=str(base))
        with pytest.raises(ValueError, match=message):
            convert(base, tmp_path / "out", adapter=adapter)
    assert not list(tmp_path.glob("*out*"))


def _edited(adapter: Path, out: Path, **changes) -> Path:
    shutil.copytree(adapter, out)
    config = json.loads((out / "adapter_config.json").read_text()) | changes
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def test_a_name_that_means_the_same_model_is_accepted(base_folder, lora, tmp_path) -> None:
    base = tmp_path / "Llama-7B"
    shutil.copytree(base_folder("llama"), base)
    adapter = _edited(lora, tmp_path / "adapter", base_model_name_or_path="someone/llama-7b")
    assert convert(base, tmp_path / "out", adapter=adapter, attention="prefix").is_dir()


def test_adapters_that_do_not_fit_are_one_line_and_nothing_is_written(base_folder, lora, tmp_path) -> None:
    llama, gpt2 = base_folder("llama"), base_folder("gpt2")
    deeper = save_base("llama", tmp_path / "deeper", build_tokenizer(), num_hidden_layers=3)
    short = train_adapter(llama, tmp_path / "short", target_modules=["q_proj"])
    pickled = _edited(lora, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    broken = _edited(lora, tmp_path / "broken")
    (broken / "adapter_config.json").write_text("{")
    cut = _edited(lora, tmp_path / "cut")
    (cut / "adapter_model.safetensors").write_bytes((lora / "adapter_model.safetensors").read_bytes()[:-100])
    soft = tmp_path / "soft"
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(soft)
    cases = [
        (gpt2, lora, f"was trained on {llama}, not on {gpt2}"),
        (gpt2, _edited(lora, tmp_path / "unnamed", base_model_name_or_path=None), "does not fit this GPT2LMHeadModel"),
        (deeper, _edited(short, tmp_path / "short2", base_model_name_or_path=""), "one of them only"),
        (
            llama,
            _edited(train_adapter(deeper, tmp_path / "deep"), tmp_path / "deep2", base_model_name_or_path=""),
            "one of them only",
        ),
        (llama, _edited(lora, tmp_path / "rank", r=3), "does not fit this LlamaForCausalLM"),
        (llama, _edited(lora, tmp_path / "modules", target_modules=["nothing"]), "does not fit this LlamaForCausalLM"),
        (llama, _edited(lora, tmp_path / "kind", peft_type="NO_SUCH"), "no weights to merge .peft_type=NO_SUCH"),
        (llama, pickled, "pickled weights are not read"),
        (llama, broken, "adapter_config.json is not valid JSON"),
        (llama, cut, "is not a safetensors file"),
        (llama, soft, "no weights to merge"),
        (llama, train_adapter(llama, tmp_path / "bias", lora_bias=True), "does not fit .*Impossible to merge"),
        (llama, llama, "not a PEFT folder"),
        (llama, tmp_path / "nowhere", "not a PEFT folder"),
        (lora, lora, "is an adapter itself"),
        (_edited(lora, tmp_path / "gone", base_model_name_or_path="/gone/model"), None, "of /gone/model, which is not"),
    ]
    for base, adapter, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            convert(base, tmp_path / "out", adapter=adapter, attention="prefix")
        assert "\n" not in str(error.value)
        assert not list(tmp_path.glob("*out*"))


def test_a_tied_head_that_merging_would_change_is_refused(base_folder, tmp_path) -> None:
    base = base_folder("qwen3")
    adapter = train_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="does not compute what it does beside the model"):
        convert(base, tmp_path / "out", adapter=adapter)
