"""`adapt plan`: what the shapes of a step say, held against the architecture and against arithmetic."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, LlamaConfig

from adapt import cli
from adapt.planning import activations as footprint
from adapt.planning import planner, table
from adapt.planning.measured_rate import benchmark_rate
from adapt.planning.zero import Weights, Zero, peak, zero_of
from adapt.training.model_section import LoraConfig
from adapt.training.recipe import DataConfig, ModelConfig, ObjectiveConfig, Recipe, TrainingConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def recipe(*, objective: dict | None = None, training: dict | None = None, **model) -> Recipe:
    of_run = {
        "output_dir": "runs/x",
        "num_steps": 10,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "precision": "bf16",
        **(training or {}),
    }
    model = {"base": "owner/name", "attention": "bidirectional", **model}
    return Recipe(
        ModelConfig(**model),
        DataConfig(train="x.jsonl", seq_len=64),
        TrainingConfig(**of_run),
        objective=ObjectiveConfig(**(objective or {})),
    )


def traced(made: Recipe, device: str = "cpu", **sizes) -> np.ndarray:
    made_planner = planner.Planner(made, CONFIG, gpus=1, device=device)
    return made_planner.timeline(None, sizes.get("micro_batch", 4)).held


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"lora": LoraConfig(r=4)}], ids=str)
def test_three_layers_repeated_are_the_whole_model(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    short = traced(recipe(**settings))
    monkeypatch.setattr(footprint, "_equal_layers", lambda base: (None, 6))
    whole = traced(recipe(**settings))
    assert len(short) < len(whole)
    for kinds in ((0, 1, 2), (0, 1, 3)):
        np.testing.assert_allclose(short[:, kinds].sum(1).max(), whole[:, kinds].sum(1).max(), rtol=1e-6)
    np.testing.assert_allclose(short[-1], whole[-1], atol=4096)


def test_all_gradients_are_there_at_the_end_and_activations_are_gone() -> None:
    held = traced(recipe(training={"precision": "fp32"}))
    made_planner = planner.Planner(recipe(), CONFIG, gpus=1)
    assert held[-1, 2] == made_planner.weights(False).trained_bytes
    assert held[-1, :2].sum() < 16_384  # the loss, and the nats of its rows
    assert held[:, :2].max(0).min() > 0


def test_checkpointing_frees_activations_and_logits_never_stand_whole() -> None:
    kept, recomputed = (traced(recipe(gradient_checkpointing=on)) for on in (False, True))
    assert recomputed[:, 0].max() < 0.7 * kept[:, 0].max()
    many = traced(recipe(objective={"name": "ar"}), micro_batch=4)
    positions = 4 * 64
    assert many[:, 1].max() < 3 * positions * CONFIG.vocab_size * 4


def test_block_diffusion_costs_what_its_two_copies_do() -> None:
    # The same clean text in a row: alone, and beside its noisy copy.
    alone = planner.Planner(recipe(), CONFIG, gpus=1).timeline(2, 4)
    doubled = planner.Planner(
        recipe(attention="block", block_size=8, objective={"ar_weight": 1.0}), CONFIG, gpus=1
    ).timeline(2, 8)
    assert doubled.text_tokens == alone.text_tokens
    assert doubled.held[:, 0].max() > 1.7 * alone.held[:, 0].max()


def test_a_teacher_costs_a_copy_unless_the_weights_are_shared() -> None:
    taught = {"attention": "prefix", "objective": {"distill_weight": 0.5}}
    alone = planner.own_peak(recipe(attention="prefix"), CONFIG, 1).parameters
    copy = planner.own_peak(recipe(**taught), CONFIG, 1).parameters
    parameters = planner.Planner(recipe(), CONFIG, gpus=1).weights(False).count
    assert copy == alone + 2 * parameters
    shared = planner.own_peak(recipe(**taught, lora=LoraConfig(r=4)), CONFIG, 1).parameters
    assert shared == planner.own_peak(recipe(attention="prefix", lora=LoraConfig(r=4)), CONFIG, 1).parameters


def test_nf4_takes_4_and_an_eighth_bits_a_weight_and_8_bit_adam_2_bytes() -> None:
    lora = {"lora": LoraConfig(r=4)}
    plain, nf4 = (
        planner.Planner(recipe(**lora, **more), CONFIG, gpus=1).weights(False) for more in ({}, {"quantization": "nf4"})
    )
    per_layer = 64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 128
    saved = 6 * per_layer * (4 - 4.127 / 8)
    assert plain.bytes - nf4.bytes == pytest.approx(saved, rel=0.01)
    assert nf4.count == plain.count
    full, in_8_bit = (
        planner.Planner(recipe(training={"optimizer": name}), CONFIG, gpus=1).weights(False)
        for name in ("adamw_torch_fused", "adamw_8bit")
    )
    assert full.optimizer_bytes == 8 * full.trained
    small = 6 * 2 * 32 * 64 + 13 * 64  # keys, values and norms: tensors of less than 4,096 stay in 32 bits
    assert in_8_bit.optimizer_bytes == 8 * small + (2 + 8 / 256) * (full.trained - small)


# ZeRO, arXiv:1910.02054, figure 1: K = 12 for Adam with float32 master weights; 7.5B parameters on 64 ranks.
@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_stages_are_those_of_the_paper(stage: int, gigabytes: float) -> None:
    psi = 7.5e9
    weights = Weights(int(psi), int(psi), int(2 * psi), int(2 * psi), 8 * psi, 0, 1, 1)
    nothing = np.zeros((1, 4))
    found = peak(Zero(stage, bucket=0, live=0), weights, nothing, 64, accumulates=False)
    states = found.parameters + found.gradients + found.optimizer
    assert states / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_states_are_what_deepspeeds_own_estimate_says_and_two_bytes_of_a_part_more() -> None:
    """DeepSpeed counts 18 bytes for each number of a rank's part; at an optimizer step there are 20."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as of_3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as of_2

    psi, ranks = int(7.5e9), 64
    weights = Weights(psi, psi, 2 * psi, 2 * psi, 8.0 * psi, 0, 1, 1)
    shape, nothing = {"num_gpus_per_node": 8, "num_nodes": 8}, np.zeros((1, 4))
    for stage, (_, gpu) in (
        (2, of_2(psi, cpu_offload=False, **shape)),
        (3, of_3(psi, 1, cpu_offload=False, additional_buffer_factor=1, **shape)[:2]),
    ):
        found = peak(Zero(stage, bucket=0, live=0), weights, nothing, ranks, accumulates=False)
        assert found.total - gpu == pytest.approx(2 * psi / ranks, rel=0.01)
    one = {"additional_buffer_factor": 1}
    host_2, gpu_2 = of_2(psi, **one)
    offloaded = peak(Zero(2, "cpu", bucket=0), weights, nothing, 1, accumulates=False)
    assert (offloaded.total, offloaded.host) == pytest.approx((gpu_2, host_2), rel=1e-6)
    host_3, _, _ = of_3(psi, 1, **one)
    offloaded = peak(Zero(3, "cpu", "cpu", bucket=0, live=0), weights, nothing, 1, accumulates=False)
    assert offloaded.host == pytest.approx(host_3, rel=1e-6)


def test_offload_moves_states_out_of_the_gpu() -> None:
    on_gpu, offloaded, on_disk = (
        planner.own_peak(recipe(training={"deepspeed": name}), CONFIG, 1)
        for name in ("zero3", "zero3_offload", "zero3_nvme")
    )
    assert on_gpu.host == on_gpu.disk == 0 < on_gpu.optimizer
    assert offloaded.optimizer == offloaded.parameters == 0 < offloaded.host
    assert on_disk.disk == offloaded.host


def test_the_largest_micro_batch_fits_and_the_next_one_does_not() -> None:
    made = recipe(training={"global_batch_size": 32, "micro_batch_size": 1})
    made_planner = planner.Planner(made, CONFIG, gpus=1)
    zero = zero_of(made)
    room = made_planner.peak(zero, 8).total
    assert made_planner.largest_micro_batch(zero, room) == 8
    assert made_planner.largest_micro_batch(zero, room - 1) == 4
    assert made_planner.largest_micro_batch(zero, 1) == 0


def write(folder: Path) -> Path:
    CONFIG.save_pretrained(folder)
    (folder / "t5.json").write_text('{"model_type": "t5"}')
    LlamaConfig(**CONFIG.to_diff_dict() | {"attention_dropout": 0.1}).save_pretrained(folder / "dropout")
    (folder / "recipe.yaml").write_text(
        "model: {base: owner/name, attention: block, block_size: 8}\ndata: {train: x.jsonl, seq_len: 64}\n"
        "training: {output_dir: runs/x, num_steps: 10, global_batch_size: 8, micro_batch_size: 4, deepspeed: zero2}\n"
    )
    return folder


def test_the_command_prints_every_stage_tokens_and_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path)
    argv = ["plan", "--config", f"{folder}/recipe.yaml", "--model_config", f"{folder}/config.json", "--gpus", "2"]
    argv += ["--gpu_memory", "1", "--tokens_per_s", "1000", "--train_tokens", "7200000"]
    assert cli.main([*argv, "--training.micro_batch_size", "2"]) == 0
    out = capsys.readouterr().out
    assert all(f"{mark} ZeRO-{stage} " in out for mark, stage in ((" ", 0), (" ", 1), ("*", 2), (" ", 3)))
    # 8 rows of 32 clean and 32 noisy tokens; 256 clean tokens at 2 x 1,000 a second; 7.2M are an hour.
    assert "2 micro-batches on each rank, 512 positions, 256 clean tokens" in out
    assert "0.13 s a step; 1.0 hours" in out
    assert "adds" not in out  # nothing is left to ask for
    assert cli.main([*argv[:5], "--training.global_batch_size", "4"]) == 0
    out = capsys.readouterr().out
    assert "1 GPU, 4 rows of 64 tokens in a micro-batch" in out
    assert "a step: 4 rows, 1 micro-batch on each rank" in out
    assert "--gpu_memory GB adds the largest micro-batch that fits; --tokens_per_s or --benchmark adds the time" in out


def test_a_recipe_that_does_not_fit_is_told_what_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path)
    argv = ["plan", "--config", f"{folder}/recipe.yaml", "--model_config", f"{folder}/config.json", "--json", "true"]
    sizes = []
    for size in ("1", "2"):
        assert cli.main([*argv, "--training.micro_batch_size", size]) == 0
        sizes.append(json.loads(capsys.readouterr().out)["bytes_per_rank"][0])
    one, two = (sum(row[name] for name in table.COLUMNS[:-1]) / 1e9 for row in sizes)
    room = ["--gpu_memory", str((one + two) / 2), "--reserve", "0"]
    assert cli.main([*argv[:-2], *room]) == 0
    assert "the recipe does not fit as it is: try --training.micro_batch_size 1\n" in capsys.readouterr().out
    assert cli.main([*argv[:-2], "--gpu_memory", str(one / 2)]) == 0
    assert "try --model.gradient_checkpointing true, or" in capsys.readouterr().out


def test_what_each_way_keeps_is_said_for_the_recipes_precision() -> None:
    made = recipe()
    row = planner.Row(zero_of(made), True, planner.own_peak(made, CONFIG, 1))
    bf16 = "\n".join(table.legend(made, row))
    assert "no DeepSpeed: " in bf16
    assert "float32 copy" in bf16
    in_float32 = table.legend(
        recipe(training={"precision": "fp32", "deepspeed": "zero2"}), dataclasses.replace(row, zero=Zero(2))
    )
    assert "no DeepSpeed" not in " ".join(in_float32)
    assert "bf16" not in " ".join(in_float32)


def test_adapters_are_planned_without_a_warning() -> None:
    made = recipe(lora=LoraConfig(r=4), quantization="nf4", gradient_checkpointing=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # past pyproject's own exceptions
        planner.own_peak(made, CONFIG, 1)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--gpus", "3"], "training.global_batch_size=8: must be a multiple"),
        (["--gpus", "0"], "gpus=0: must be from 1 to "),
        (["--device", "tpu"], "device=tpu: choose one of cpu, cuda"),
        (["--reserve", "1"], "reserve=1.0: must be at least 0 and below 1"),
        (["--gpu_memory", "-1"], "gpu_memory=-1.0: must be above 0"),
        (["--train_tokens", "1e9"], "needs --tokens_per_s or --benchmark"),
        (["--model_config", "nowhere.json"], "model_config=nowhere.json: no such file"),
        (["--model_config", "recipe.yaml"], "model_config=recipe.yaml: is no model's config.json; give one, such as"),
        (["--model_config", "t5.json"], "base=owner/name: is an encoder-decoder"),
        (["--training.optimizer", "adafactor"], "training.optimizer=adafactor: its memory is not known here"),
        (
            ["--model_config", "dropout/config.json", "--model.attn_implementation", "flex_attention"],
            "config.json has attention_dropout=0.1",
        ),
        (["--benchmark", "recipe.yaml"], "give a report of benchmarks/train.py"),
        (["--benchmark", "nowhere.json"], "benchmark=nowhere.json: no such file"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write(tmp_path))
    assert cli.main(["plan", "--config", "recipe.yaml", "--model_config", "config.json", *argv]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert said in err


def _settings_of(arm: str, overrides: dict) -> dict | None:
    """What benchmarks/train.py writes beside an arm of that name; None: plain transformers."""
    if arm == "ar":
        return None
    kind, *traits = arm.split("_")
    block = {"model.attention": "block", "model.block_size": int("".join(filter(str.isdigit, kind)) or 0)}
    settings = block if kind.startswith("block") else {"model.attention": kind}
    settings = {"objective.name": "ar"} if kind == "control" else settings
    more = {"ar": {"objective.ar_weight": 1.0}, "checkpointed": {"model.gradient_checkpointing": True}}
    for trait in traits:
        settings |= more[trait]
    return settings | overrides


def report_of(
    file: Path, *results: tuple[int, int, int, dict[str, float]], gpu: str | None = None, **overrides
) -> Path:
    """Results as (parameters, shortest, longest document, {arm: rate})."""
    about = {"gpu": gpu, "cpu": "Xeon", "threads": 2, "date": "2026-11-23T17:25:17+00:00"}
    made = [
        {
            "sizes": {"parameters": parameters},
            "workload": {"batch": 4, "shortest": shortest, "longest": longest},
            "arms": {arm: {"settings": _settings_of(arm, overrides)} for arm in arms},
            "summary": {arm: {"clean_tokens_per_s": {"median": rate}} for arm, rate in arms.items()},
        }
        for parameters, shortest, longest, arms in results
    ]
    file.write_text(json.dumps({"provenance": about, "options": {"overrides": overrides}, "results": made}))
    return file


def test_a_config_beside_the_recipe_is_named_and_a_misspelt_recipe_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path)

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(planner, "config_of", offline)
    assert cli.main(["plan", "--config", f"{folder}/recipe.yaml"]) == 1
    assert f"give one with --model_config, such as {folder}/config.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["plan", "--config", f"{folder}/recpe.yaml"])
    assert f"no such file; did you mean {folder}/recipe.yaml?" in capsys.readouterr().err


def test_of_several_rates_the_one_of_the_recipes_work_and_size_is_taken_and_not_the_fastest(tmp_path: Path) -> None:
    made = recipe(attention="block", block_size=8)  # rows of 64: 32 clean tokens and a copy
    file = report_of(
        tmp_path / "b.json",
        (int(1e6), 64, 64, {"block8": 900.0}),
        (int(1e6), 32, 32, {"block8": 123.0, "block8_ar": 950.0, "block8_checkpointed": 960.0, "ar": 999.0}),
        (int(1e6), 4, 32, {"block8": 980.0}),
        (int(5e6), 32, 32, {"block8": 990.0}),
    )
    rate, source = benchmark_rate(file, made, int(1.02e6), "cpu")
    assert (rate, source) == (123.0, "block 8 at 1M on rows of 64, measured on Xeon, 2 threads, 2026-11-23")
    with_ar = recipe(attention="block", block_size=8, objective={"ar_weight": 1.0})
    assert benchmark_rate(file, with_ar, int(1e6), "cpu")[0] == 950
    assert (
        benchmark_rate(file, recipe(attention="block", block_size=8, gradient_checkpointing=True), int(1e6), "cpu")[0]
        == 960
    )
    longer = benchmark_rate(file, dataclasses.replace(made, data=DataConfig(train="x", seq_len=200)), int(1e6), "cpu")
    assert longer == (
        900.0,
        "block 8 at 1M on rows of 128, the recipe's are 200, measured on Xeon, 2 threads, 2026-11-23",
    )


def test_a_rate_of_other_work_is_refused_with_what_the_report_holds(tmp_path: Path) -> None:
    file = report_of(
        tmp_path / "b.json", (int(1e6), 64, 64, {"block8": 1.0, "ar": 2.0}), (int(5e6), 32, 32, {"block8": 3.0})
    )
    made = recipe(attention="block", block_size=8)
    holds = "found: block 8 at 1M, 5M on rows of 64, 128; AR by transformers.Trainer at 1M on rows of 64"
    others = (
        recipe(attention="block", block_size=8, lora=LoraConfig(r=4)),
        recipe(attention="block", block_size=8, training={"precision": "fp32"}),
        recipe(attention="block", block_size=16),
        recipe(),
        recipe(objective={"name": "ar"}),  # the plain Trainer's rate is not that of our control arm
        dataclasses.replace(made, data=DataConfig(train="x", seq_len=512)),
    )
    for other in others:
        with pytest.raises(ValueError, match=holds):
            benchmark_rate(file, other, int(1e6), "cpu")
    with pytest.raises(ValueError, match=holds):
        benchmark_rate(file, made, int(2e6), "cpu")
    with pytest.raises(
        ValueError, match="measured on Xeon, 2 threads, 2026-11-23, and the plan is for device=cuda; add --device cpu"
    ):
        benchmark_rate(file, made, int(1e6), "cuda")
    adapters = {"model.lora.r": 16}
    of_lora = report_of(tmp_path / "l.json", (int(1e6), 32, 32, {"block8": 7.0}), gpu="H100", **adapters)
    assert benchmark_rate(of_lora, others[0], int(1e6), "cuda")[0] == 7


def test_every_shipped_training_benchmark_gives_the_rate_of_its_own_arms() -> None:
    reports = [
        p for p in (ROOT / "benchmarks" / "results").glob("*.json") if "plan" not in p.name and "convert" not in p.name
    ]
    for path in reports:
        for result in json.loads(path.read_text())["results"]:
            row = result["workload"]["longest"]
            made = dataclasses.replace(recipe(), data=DataConfig(train="x", seq_len=row))
            if "bidirectional" in result["summary"]:
                wanted = result["summary"]["bidirectional"]["clean_tokens_per_s"]["median"]
                assert benchmark_rate(path, made, result["sizes"]["parameters"], "cpu")[0] == wanted
    assert len(reports) >= 5


def test_planning_takes_no_memory_for_weights() -> None:
    config = AutoConfig.from_pretrained(ROOT / "recipes" / "qwen3-30b-a3b" / "config.json")
    model = planner.Planner(recipe(), config, gpus=1)._model(True)
    assert sum(p.numel() for p in model.parameters()) > 30e9  # 122 GB if it were real
    assert all(p.fake_device.type == "cpu" and type(p.data).__name__ == "FakeTensor" for p in model.parameters())
