"""A run: the same curve however it is split, killed or resumed, and a folder at its end that others load."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import kill_resume
import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_fixtures import DIES, at_step, losses, metrics, recipe_argv, stored, write_base, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapt
from adapt import cli
from adapt.attention.layout import Layout
from adapt.files import marks
from adapt.training import train, trainer
from adapt.training.checkpoints.run_folder import run_of
from adapt.training.recipe import parse_recipe

# float32, 6 steps of 8 rows on a random Llama of 19 k parameters: changes only with what a run computes.
GOLDEN = [5.12463, 3.962331, 3.643181, 3.592923, 4.428326, 4.361698]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_base(tmp_path_factory.mktemp("trainer") / "base")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 3], "do_sample": false, "temperature": 0.3}')
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("trainer") / "pairs.jsonl")


@pytest.fixture
def run(base: Path, pairs: Path, tmp_path: Path):
    """Trains into tmp_path/NAME and returns that folder. Warnings are errors in here."""

    def run(name: str = "out", **overrides) -> Path:
        train.train(parse_recipe(recipe_argv(base, pairs, tmp_path / name, **overrides)))
        return tmp_path / name

    return run


def curve(out: Path) -> list[float]:
    return list(losses(out).values())


@pytest.mark.parametrize("scheduler, said", [("cosine", 1), ("constant", 0)])
def test_a_warmup_that_outlasts_the_run_is_said_once_and_the_run_goes_on(
    run, capsys, scheduler: str, said: int
) -> None:
    short = {"training__num_steps": 2, "training__warmup_steps": 2, "training__lr_scheduler": scheduler}
    assert max(line["learning_rate"] for line in metrics(run(**short))) == pytest.approx(5e-4 if said else 1e-3)
    line = (
        "training.warmup_steps=2: the run has 2 steps, so it never trains at training.learning_rate=0.001; lower it\n"
    )
    assert capsys.readouterr().err.count(line) == said


def test_golden_curve_of_the_smoke_recipe(run) -> None:
    assert curve(run()) == pytest.approx(GOLDEN, rel=1e-4)


@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"objective__weight": "uniform"},
        {"objective__anneal_steps": 4},
        {"objective__ar_weight": 0.5, "data__canvas_start": "anywhere", "data__canvas_length": 4},
    ],
    ids=str,
)
def test_the_same_global_batch_gives_the_same_curve_for_any_accumulation(run, objective) -> None:
    whole = curve(run("whole", **objective))
    assert len(set(whole)) == 6
    for micro in (1, 2, 4):
        assert curve(run(str(micro), training__micro_batch_size=micro, **objective)) == pytest.approx(whole, rel=1e-6)


def test_loader_processes_draw_the_same_noise(run) -> None:
    assert curve(run(data__num_workers=2)) == curve(run("alone"))


def test_gradient_checkpointing_changes_no_loss(run) -> None:
    assert curve(run(model__gradient_checkpointing=True)) == pytest.approx(curve(run("without")), rel=1e-6)


def test_metrics_name_what_a_reader_needs_and_agree_with_each_other(run) -> None:
    lines = metrics(run(training__num_epochs=3, training__num_steps=None))
    fields = (
        "step epoch loss nelbo noised_nll mask_ratio grad_norm learning_rate tokens_per_s useful_tokens_per_s clean_tokens_per_s "
        "tokens_seen clean_tokens_seen elapsed_s peak_memory_gb"
    )
    assert all(set(line) == set(fields.split()) for line in lines)
    assert all(line["nelbo"] == pytest.approx(line["loss"], rel=1e-6) for line in lines)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["tokens_seen"] == len(lines) * 8 * 32
    assert sum(line["mask_ratio"] for line in lines) / len(lines) == pytest.approx(0.5, abs=0.05)
    assert lines[0]["epoch"] == pytest.approx(8 / 27, abs=0.1)
    assert lines[-1]["epoch"] == pytest.approx(3, abs=0.3)


def test_losses_between_logs_are_averaged(run) -> None:
    every, third = losses(run()), losses(run("third", training__logging_steps=3))
    assert list(third) == [1, 3, 6]
    assert third[6] == pytest.approx((every[4] + every[5] + every[6]) / 3, rel=1e-5)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_final_folder_is_a_diffusion_checkpoint_that_transformers_loads(run, base, precision, dtype) -> None:
    folder = run(training__precision=precision) / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == dtype
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert model.config.use_cache
    assert not (folder / "training_args.bin").exists()
    lm = adapt.load(folder, device="cpu")
    base_says = json.loads((base / "generation_config.json").read_text())
    ours_says = json.loads((folder / "generation_config.json").read_text())
    assert ours_says == base_says | {"mask_token_id": lm.spec.mask_token_id}
    assert (lm.spec.attention, lm.spec.mask_token_id) == ("prefix", lm.tokenizer.mask_token_id)
    assert lm.spec.base_model == base.name
    if precision == "fp32":
        assert stored(folder) == stored(folder.parent / "converted")
    moved = (
        lm.model.get_input_embeddings().weight
        - adapt.load(folder.parent / "converted", device="cpu").model.get_input_embeddings().weight
    )
    assert float(moved.abs().max().detach()) > 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lora_leaves_an_adapter_and_a_merged_model_with_the_same_logits(run, precision: str) -> None:
    from peft import PeftModel

    out = run(model__lora={"r": 4}, training__learning_rate=0.05, training__precision=precision)
    converted = AutoModelForCausalLM.from_pretrained(out / "converted", dtype=torch.float32)
    before = {name: weight.clone() for name, weight in converted.state_dict().items()}
    adapted = PeftModel.from_pretrained(converted, str(out / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(out / "model")
    assert merged.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    mask = AutoTokenizer.from_pretrained(out / "model").mask_token_id
    tokens = torch.tensor([[5, mask, 7, mask, 9]])
    tolerance = 1e-5 if precision == "fp32" else 0.05
    with torch.no_grad():
        want, found = adapted(input_ids=tokens).logits, merged(input_ids=tokens).logits.float()
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    moved = {
        name for name, weight in merged.state_dict().items() if not torch.equal(weight, before[name].to(merged.dtype))
    }
    rows = merged.get_input_embeddings().weight != before["model.embed_tokens.weight"].to(merged.dtype)
    assert rows.any(1).nonzero().flatten().tolist() == [mask]
    assert {name.split(".")[-2] for name in moved} >= {"q_proj", "v_proj", "down_proj", "embed_tokens"}
    assert "model.norm.weight" not in moved
    assert stored(out / "model").keys() == stored(out / "converted").keys()


def test_control_arm_stays_a_plain_causal_lm(run, base: Path, pairs: Path) -> None:
    for lora in (None, {"r": 4}):
        out = run("lora" if lora else "full", objective__name="ar", model__lora=lora, training__num_steps=3)
        assert "diffusion" not in json.loads((out / "model" / "config.json").read_text())
        assert AutoTokenizer.from_pretrained(out / "model").mask_token is None
        assert len(AutoTokenizer.from_pretrained(out / "model")) == 63
        assert (out / "adapter").exists() == bool(lora)
        assert metrics(out)[0]["nelbo"] == pytest.approx(losses(out)[1])
        AutoModelForCausalLM.from_pretrained(out / "model")


def test_annealing_starts_causal_opens_and_ends_bidirectional(run, monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[int | None] = []
    right_window = trainer.DiffusionTrainer._right_window
    monkeypatch.setattr(
        trainer.DiffusionTrainer, "_right_window", lambda self: windows.append(right_window(self)) or windows[-1]
    )
    annealed = curve(run("annealed", objective__anneal_steps=4, model__attn_implementation="sdpa"))
    assert windows[:6] == [0, 2, 5, 7, None, None]  # the longest canvas has 10 tokens
    assert curve(run("pieces", objective__anneal_steps=4)) == pytest.approx(annealed, rel=1e-5)
    plain = curve(run("plain"))
    assert annealed[0] != pytest.approx(plain[0], rel=1e-3)
    monkeypatch.setattr(
        trainer, "Layout", lambda documents, views, positions, _: Layout(documents, views * 0, positions)
    )
    causal = run("causal", training__num_steps=1, model__attn_implementation="sdpa")
    assert curve(causal)[0] == pytest.approx(annealed[0], rel=1e-6)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # torch's own, as it traces and compiles
def test_compiled_layers_give_the_same_curve(run) -> None:
    compiled = curve(run(model__torch_compile=True, training__num_steps=2))
    assert compiled == pytest.approx(GOLDEN[:2], rel=1e-4)


def test_tensorboard_events_hold_the_losses(run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run(training__report_to=["tensorboard"])
    (events,) = (out / "runs").glob("*/events*")
    accumulator = EventAccumulator(str(events)).Reload()
    assert [event.value for event in accumulator.Scalars("train/loss")] == pytest.approx(curve(out))


def test_console_is_a_summary_a_bar_with_eta_and_the_result(base, pairs, tmp_path, capsys) -> None:
    assert cli.main(["train", *recipe_argv(base, pairs, tmp_path / "out")]) == 0
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    ours = [line for line in lines if line.strip() and not line.startswith(("tokenise", "Generating"))]
    assert ours[0].startswith("64 examples in 27 rows of 32 tokens (9")
    assert all(line.startswith("train:") for line in ours[1:-1])
    assert "nelbo=4.362" in ours[-2]
    assert ours[-1] == str(tmp_path / "out" / "model")


# --- resume


def test_half_written_checkpoints_are_ignored_and_removed(run, base: Path) -> None:
    whole, out = run("whole", training__save_steps=2), run("cut", training__save_steps=2)
    shutil.rmtree(out / "model")
    (out / "checkpoints" / "checkpoint-6" / "COMPLETE").unlink()
    (out / "checkpoints" / "checkpoint-6" / "optimizer.pt").write_bytes(b"cut short")
    marks.begin(out / ".model.incomplete", run_of(out) or "")
    (out / ".model.incomplete" / "model-00009-of-00009.safetensors").touch()
    lines = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(lines[: len(lines) - 40])
    assert run("cut", training__save_steps=2) == out
    assert losses(out) == losses(whole)
    assert (out / "checkpoints" / "checkpoint-6" / "COMPLETE").exists()
    assert not (out / "model" / "model-00009-of-00009.safetensors").exists()
    assert [line["tokens_seen"] for line in metrics(out)] == [line["tokens_seen"] for line in metrics(whole)]
    found, want = (load_file(folder / "model" / "model.safetensors") for folder in (out, whole))
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_a_run_killed_between_its_last_step_and_its_end_only_writes_the_model(run) -> None:
    out = run(training__save_steps=3)
    before = (out / "metrics.jsonl").read_text()
    shutil.rmtree(out / "model")
    run(training__save_steps=3)
    assert (out / "metrics.jsonl").read_text() == before
    assert (out / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("lora", [None, {"r": 4, "dropout": 0.3}])
def test_resuming_where_logs_and_checkpoints_fall_apart_gives_the_same_curve(run, lora) -> None:
    settings = {"training__save_steps": 4, "training__logging_steps": 3, "model__lora": lora}
    out, whole = run("cut", **settings), run("whole", **settings)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    run("cut", **settings)
    assert losses(out) == losses(whole)
    assert list(losses(out)) == [1, 3, 4, 6]


HOLDING = """
import pathlib, time
from adapt.training.checkpoints import run_folder
with run_folder.run_lock(pathlib.Path(argv[0])):
    print("held", flush=True)
    time.sleep(3600)
"""


def test_a_folder_that_another_run_writes_to_is_refused_until_that_has_ended(run, tmp_path) -> None:
    out = run("alone", training__num_steps=1, training__save_steps=0)
    shutil.rmtree(out / "model")
    log = tmp_path / "other.log"
    (other,) = kill_resume.start([str(out)], 1, log, HOLDING)
    while other.is_alive() and not (log.exists() and "held" in log.read_text()):
        time.sleep(0.01)
    try:
        with pytest.raises(ValueError, match=rf"another run writes to it \(process {other.pid} on "):
            run("alone", training__num_steps=1, training__save_steps=0)
        assert not (out / "model").exists()
    finally:
        kill_resume.kill([other])
    assert (run("alone", training__num_steps=1, training__save_steps=0) / "model").is_dir()


def test_only_the_newest_checkpoints_are_kept(run) -> None:
    out = run(training__save_steps=1, training__keep_checkpoints=2)
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"checkpoint-5", "checkpoint-6"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"training__seed": 1}, "training.seed=1: the run in .* was started with 0; set that"),
        ({"data__seq_len": 64}, "data.seq_len=64: the run in .* was started with 32"),
        ({"objective__views": 2}, "objective.views=2: the run in .* was started with 1"),
        ({"training__resume": False}, "training.resume=false: .* holds checkpoints of an earlier run; remove them"),
        (
            {"model__attention": "bidirectional"},
            "model.attention=bidirectional: the run in .* was started with no such setting",
        ),
    ],
)
def test_another_run_does_not_go_on_from_a_checkpoint(run, change, message) -> None:
    out = run(training__save_steps=3)
    shutil.rmtree(out / "model")
    with pytest.raises(ValueError, match=message):
        run(**change)
    assert len(list((out / "checkpoints").iterdir())) == 2
    assert len(losses(out)) == 6


def test_a_finished_run_that_is_started_again_says_so_and_ends_well(base, pairs, tmp_path, run, capsys) -> None:
    out = run(training__precision="auto")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    argv = recipe_argv(base, pairs, out, training__precision="auto")
    assert cli.main(["train", *argv]) == 0
    line = f"adapt train: {out}: is finished (model/, 6 steps); choose another training.output_dir to train anew\n"
    assert line in capsys.readouterr().err
    for change, message in {
        "--training.num_steps=7": "training.num_steps=7: the run in .* is finished .model/. and had num_steps=6; choose another",
        "--training.seed=1": "training.seed=1: the run in .* was started with 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            train.train(parse_recipe([*argv, change]))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_run_that_goes_on_to_another_length_says_so_and_not_to_one_that_it_is_past(run, capsys) -> None:
    out = run(training__save_steps=2, training__num_steps=4)
    shutil.rmtree(out / "model")
    capsys.readouterr()
    with pytest.raises(
        ValueError, match=r"training.num_steps=3: the run is at step 4 already .*give at least that many"
    ):
        run(training__save_steps=2, training__num_steps=3)
    assert not (out / "model").exists()
    run(training__save_steps=2, training__num_steps=5)
    assert "adapt train: num_steps 4 -> 5: the schedule changes from here\n" in capsys.readouterr().err
    shutil.rmtree(out / "model")
    run(training__save_steps=2, training__num_steps=None, training__num_epochs=2.5, training__logging_steps=2)
    assert "adapt train: num_steps 5 -> num_epochs 2.5: the schedule" in capsys.readouterr().err
    shutil.rmtree(out / "model")
    run(training__save_steps=2, training__num_steps=None, training__num_epochs=2.5)
    assert "num_" not in capsys.readouterr().err


def test_a_conversion_for_another_recipe_is_not_trained(run) -> None:
    out = run()
    shutil.rmtree(out / "model")
    with pytest.raises(ValueError, match=r"model.shift_logits=True: .*converted was converted earlier with False"):
        run(model__shift_logits=True)


# A child that dies by SIGKILL while checkpoint 6 is half-written: the weights are there, the optimizer is not.
DIES_IN_SAVE = """
import os, signal
from adapt.training import trainer
save = trainer.DiffusionTrainer._save_optimizer_and_scheduler
def cut(self, folder):
    if folder.endswith("checkpoint-6"):
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)
trainer.DiffusionTrainer._save_optimizer_and_scheduler = cut
"""


def test_a_killed_run_started_again_gives_the_curve_of_one_never_killed(run, base, pairs, tmp_path) -> None:
    settings = {"training__num_steps": 15, "training__save_steps": 3}
    whole, out, log = run("whole", **settings), tmp_path / "killed", tmp_path / "killed.log"
    argv = recipe_argv(base, pairs, out, **settings)
    # 1. Killed while it saves.
    assert kill_resume.finish(kill_resume.start(argv, 1, log, DIES_IN_SAVE), log) == [-signal.SIGKILL], log.read_text()
    assert not (out / "checkpoints" / "checkpoint-6" / "COMPLETE").exists()
    # 2. Killed between two saves.
    assert kill_resume.finish(kill_resume.start(argv, 1, log, at_step(10, (0,), DIES)), log) == [-signal.SIGKILL]
    assert max(losses(out)) == 10
    # 3. To the end.
    assert run("killed", **settings) == out
    assert losses(out) == losses(whole)
    assert [line["epoch"] for line in metrics(out)] == [line["epoch"] for line in metrics(whole)]
    found, want = (load_file(folder / "model" / "model.safetensors") for folder in (out, whole))
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_examples_that_do_not_fit_with_their_copies_are_dropped_where_the_recipe_says_so(run, capsys) -> None:
    settings = {"model__attention": "block", "model__block_size": 4, "data__seq_len": 24}
    with pytest.raises(ValueError, match=r"examples take more with all their copies, .* data.too_long=drop"):
        run("error", **settings)
    out = run("drop", data__too_long="drop", **settings)
    assert "take more with all their copies" in capsys.readouterr().err
    assert len(curve(out)) == 6


def test_what_the_ar_objective_ignores_is_said_once(run, capsys) -> None:
    run(objective__name="ar", objective__views=2, noise__t_min=0.3, objective__weight="uniform", training__num_steps=1)
    said = capsys.readouterr().err
    assert (
        said.count("objective.name=ar: draws no noise, so it ignores objective.weight, objective.views, noise.t_min")
        == 1
    )


def test_a_run_of_before_a_setting_existed_goes_on_with_its_default(run) -> None:
    out = run(training__save_steps=2, training__num_steps=4)
    shutil.rmtree(out / "model")
    saved = yaml.safe_load((out / "config.yaml").read_text())
    del saved["noise"]["t_max"], saved["objective"]["block_sizes"], saved["model"]["clean_context"]
    marks.write(out, "config.yaml", yaml.safe_dump(saved))
    assert run(training__save_steps=2, training__num_steps=4) == out
    marks.write(out, "config.yaml", yaml.safe_dump(saved))
    shutil.rmtree(out / "model")
    with pytest.raises(ValueError, match=r"noise.t_max=0.8: .* was started with no such setting"):
        run(training__save_steps=2, training__num_steps=4, noise__t_max=0.8, objective__weight="uniform")
