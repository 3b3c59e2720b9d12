"""What only CUDA runs: compiled masks, FlexAttention's kernels, autocast, copies behind the device's back, NCCL, bitsandbytes there.

Skipped without a GPU; `benchmarks/gpu.py` runs them first. Known answers come from the CPU, or from eager attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import GOLDEN
from tiny_models import build_model, build_tokenizer, config_of, save_base
from training_fixtures import losses, metrics, recipe_argv, write_base, write_pairs
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments

import adapt
from adapt.attention.layout import Layout
from adapt.attention.mask import attention_mask
from adapt.doctor.all_reduce import all_reduce_line
from adapt.model.forward import hidden_states
from adapt.training import train
from adapt.training.bad_steps import StepGuard
from adapt.training.interruption import Requests
from adapt.training.recipe import TrainingConfig, parse_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # torch's compiler warns of itself
DEVICE = "cuda"
WIDE = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}  # of FlexAttention's kernels


def layout(kind: str, length: int) -> Layout:
    """Two rows: documents of several lengths, padding, and in `block` canvases that hang off the middle of their clean copy."""
    rows = []
    for first in (length // 3, length // 2):
        sizes = [first, length - first - length // 8, length // 8]
        document = torch.cat([torch.full((size,), i) for i, size in zip((1, 2, 0), sizes, strict=True)])
        position = torch.cat([torch.arange(size) for size in sizes])
        view = torch.ones_like(document) if kind == "bidirectional" else (position >= 5).long()
        sees = position + 1
        if kind == "block":  # the first half of a document is its clean copy, the other its blocks of 4
            half = torch.cat([torch.full((size,), size // 2) for size in sizes])
            noisy = position >= half
            position = torch.where(noisy, position - half, position)
            view = torch.where(noisy, 1 + position // 4, 0)
            sees = torch.where(noisy, position // 4 * 4, position + 1)
        view[document == 0] = 0
        rows.append((document, view, position, sees))
    stacked = [torch.stack(parts).to(DEVICE) for parts in zip(*rows, strict=True)]
    return Layout(stacked[0], stacked[1], stacked[2], stacked[3] if kind == "block" else None)


def wide_model(kind: str = "llama", **changes):
    torch.manual_seed(0)
    model: Any = build_model(config_of(kind, **{**WIDE, **changes}))
    return model.to(DEVICE)


@pytest.mark.parametrize("right_window", [None, 3])
@pytest.mark.parametrize("kind", ["prefix", "block", "bidirectional"])
def test_compiled_block_masks_are_those_of_the_rule(kind: str, right_window: int | None) -> None:
    config = config_of("gemma3")
    for length in (40, 300):  # less than a block of 128, and no multiple of one
        row = layout(kind, length)
        config._attn_implementation = "flex_attention"
        masks = attention_mask(config, row, right_window=right_window)
        config._attn_implementation = "sdpa"
        dense = attention_mask(config, row, right_window=right_window)
        index = [
            torch.arange(n, device=DEVICE).view(shape)
            for n, shape in ((2, (2, 1, 1)), (length, (1, -1, 1)), (length, (1, 1, -1)))
        ]
        for layer_type, mask in masks.items():
            b, q, k = torch.broadcast_tensors(*index)
            assert torch.equal(mask.mask_mod(b, b, q, k), dense[layer_type][:, 0])
            blocks = torch.nn.functional.pad(dense[layer_type], (0, -length % 128, 0, -length % 128)).float()
            seen = torch.nn.functional.max_pool2d(blocks, 128) > 0
            assert torch.equal(mask.to_dense().bool(), seen)


@pytest.mark.parametrize("kernel", ["flex_attention", "sdpa_pieces", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_every_kernel_gives_eagers_hidden_states_and_gradients(kind: str, kernel: str) -> None:
    model = wide_model(kind, **({"query_pre_attn_scalar": 16} if kind == "gemma3" else {}))
    for pattern in ("prefix", "block", "bidirectional"):
        for length in (40, 300):
            row = layout(pattern, length)
            tokens = torch.randint(5, 290, (2, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)
            found = {}
            for name in ("eager", kernel):
                model.set_attn_implementation(name)
                model.zero_grad()
                hidden = hidden_states(model, tokens, row)[row.document_ids != 0]
                hidden.square().sum().backward()
                found[name] = hidden.detach(), model.get_input_embeddings().weight.grad.clone()
            torch.testing.assert_close(found[kernel], found["eager"], rtol=1e-3, atol=1e-3)


def test_flex_attention_trains_under_bf16_autocast_where_queries_are_float32_and_values_are_not() -> None:
    model, row = wide_model(), layout("prefix", 300)
    tokens = torch.randint(5, 290, (2, 300), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = {}
    for kernel in ("sdpa", "flex_attention"):
        model.set_attn_implementation(kernel)
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            hidden = hidden_states(model, tokens, row)[row.document_ids != 0]
        hidden.float().square().mean().backward()
        found[kernel] = model.get_input_embeddings().weight.grad.clone()
    difference = (found["flex_attention"] - found["sdpa"]).norm() / found["sdpa"].norm()
    assert difference < 0.05


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gpu")
    base = save_base("llama", folder / "base", build_tokenizer(), **WIDE)
    block = {"block_size": 4}
    kinds: dict[str, dict[str, Any]] = {"prefix": {}, "bidirectional": {}, "block": block}
    return {kind: adapt.convert(base, folder / kind, attention=kind, **more) for kind, more in kinds.items()}


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "sdpa_pieces", "flex_attention"])
def test_the_probe_holds_with_every_kernel(checkpoints: dict[str, Path], kernel: str) -> None:
    for folder in checkpoints.values():
        adapt.load(
            folder, device=DEVICE, attn_implementation=kernel
        )  # raises where a layer does not see what it should


@pytest.mark.parametrize("kernel", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("attention", ["prefix", "block", "bidirectional"])
def test_decoding_writes_what_the_cpu_writes(checkpoints: dict[str, Path], attention: str, kernel: str) -> None:
    prompts = torch.tensor([[0, 0, 40, 41, 42], [50, 51, 52, 53, 54]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    sampler = adapt.SamplerConfig(tokens_per_step=2)
    written = [
        adapt.load(checkpoints[attention], device=device, dtype="float32", attn_implementation=kernel_there)
        .generate(prompts, attention_mask=mask, max_new_tokens=12, sampler=sampler)
        .sequences.cpu()
        for device, kernel_there in (("cpu", "sdpa"), (DEVICE, kernel))
    ]
    assert torch.equal(*written)


def run(folder: Path, name: str, base: Path, **settings) -> Path:
    argv = recipe_argv(base, folder / "pairs.jsonl", folder / name, **settings)
    return train.train(parse_recipe(argv)).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_base(folder / "base")
    write_base(folder / "wide", hidden_size=64, intermediate_size=128)
    write_pairs(folder / "pairs.jsonl")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_that_nobody_waits_for_give_the_golden_curve(folder: Path, workers: int) -> None:
    out = run(folder, f"golden-{workers}", folder / "base", data__num_workers=workers)
    assert list(losses(out).values()) == pytest.approx(GOLDEN, rel=1e-3)
    allocated = torch.cuda.max_memory_allocated() / 1e9
    assert 0 < metrics(out)[-1]["peak_memory_gb"] <= allocated


def test_a_sample_under_flex_attention_leaves_no_trace_in_the_run(folder: Path) -> None:
    curves = [
        losses(run(folder, name, folder / "wide", training__sample_steps=every, training__precision="bf16"))
        for name, every in (("sampled", 2), ("not-sampled", 0))
    ]
    assert list(curves[0].values()) == pytest.approx(list(curves[1].values()), rel=1e-3)
    assert (folder / "sampled" / "samples.jsonl").read_text().count("\n") == 3


def test_the_fused_optimizer_leaves_a_bad_step_out_and_nobody_waits_for_the_device() -> None:
    weight = torch.nn.Parameter(torch.ones(8, device=DEVICE))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = StepGuard(TrainingConfig(output_dir="x", num_steps=1), torch.device(DEVICE))
    seen = [weight.detach().clone()]
    norms = [torch.full((), value, device=DEVICE) for value in (1.0, float("nan"), 1.0)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for norm in norms:
            weight.grad = norm.expand(8).clone()
            guard.drop_bad_update(norm, optimizer)
            optimizer.step()
            seen.append(weight.detach().clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], seen[3])
    assert float(optimizer.state[weight]["step"]) == 2


def test_a_request_of_another_rank_is_heard_through_the_copy_behind_the_devices_back(tmp_path: Path) -> None:
    for asked in (False, True):
        args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
        requests, control = Requests(args, save_minutes=None), TrainerControl()
        requests.world_size = 2
        requests.share(requests.of_this_rank() + torch.tensor([int(asked), 0], device=DEVICE))
        requests.on_step_end(args, TrainerState(), control)
        assert (control.should_training_stop, control.should_save) == (asked, asked)


def test_nf4_and_8_bit_adamw_train_and_the_merged_folder_loads(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = {"model__quantization": "nf4", "model__lora": {"r": 4}, "training__num_steps": 30}
    out = run(
        folder, "nf4", folder / "wide", training__learning_rate=0.02, training__optimizer="adamw_8bit", **settings
    )
    curve = list(losses(out).values())
    assert sum(curve[-3:]) < 0.8 * sum(curve[:3])
    assert len(AutoModelForCausalLM.from_pretrained(out / "model").state_dict()) > 10


def test_nccl_adds_up(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    line = all_reduce_line(60)
    assert line is not None
    assert "1 ranks on" in line
    assert "over nccl: sums right" in line
