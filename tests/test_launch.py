"""The shipped DeepSpeed JSONs, the check before launch, and the multi-node scripts (ssh and Slurm stood in for)."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from adapt.training.engine.ds_config import check_agrees, leave_to_the_recipe, read_ds_config
from adapt.training.recipe import parse_recipe
from adapt.training.sections import TrainingConfig

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
JSONS = sorted((LAUNCH / "ds").glob("*.json"))
OURS = TrainingConfig(
    "out",
    num_steps=1,
    global_batch_size=64,
    learning_rate=2e-4,
    adam_beta2=0.95,
    precision="bf16",
    deepspeed="mine.json",
)


def agreed(config: dict) -> dict:
    """The config as DeepSpeed gets it for OURS; ValueError where it disagrees."""
    leave_to_the_recipe(config)
    check_agrees(config, OURS, world_size=1)
    filled = HfTrainerDeepSpeedConfig(config)
    sizes = {"per_device_train_batch_size": OURS.micro_batch_size, "gradient_accumulation_steps": 8}
    filled.trainer_config_process(TrainingArguments("unused", **sizes, learning_rate=2e-4, bf16=True, use_cpu=True))
    assert not filled.mismatches
    return filled.config


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_shipped_json_says_auto_where_the_recipe_owns_the_value(path: Path) -> None:
    raw = json.loads(path.read_text())
    config = read_ds_config(path.stem)
    leave_to_the_recipe(config)
    assert config == raw  # nothing owned was absent, nothing else was put in
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert raw[key] == "auto"
    assert raw["gradient_clipping"] == "auto"
    assert raw["bf16"] == {"enabled": "auto"}
    assert raw["fp16"] == {"enabled": False}
    assert not {"optimizer", "scheduler"} & set(raw)
    zero = raw["zero_optimization"]
    assert zero["stage"] == int(path.stem[4])
    assert ("offload_optimizer" in zero) == path.stem.endswith(("offload", "nvme"))
    assert all(value == "auto" for key, value in zero.items() if key.endswith(("bucket_size", "threshold")))
    assert zero.get("stage3_gather_16bit_weights_on_model_save") is (True if zero["stage"] == 3 else None)


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_deepspeed_accepts_the_json_once_the_trainer_has_filled_it(path: Path) -> None:
    import torch
    from deepspeed.runtime.config import DeepSpeedConfig

    filled = HfTrainerDeepSpeedConfig(agreed(read_ds_config(path.stem)))
    model = torch.nn.Module()
    model.config = LlamaConfig(hidden_size=576)  # pyright: ignore
    filled.trainer_config_finalize(TrainingArguments("unused", use_cpu=True), model, 100)
    assert "auto" not in json.dumps(filled.config)
    assert DeepSpeedConfig(filled.config).zero_optimization_stage == int(path.stem[4])


def _write(tmp_path: Path, content: object) -> str:
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            {"train_micro_batch_size_per_gpu": 4},
            "deepspeed.train_micro_batch_size_per_gpu=4 conflicts with training.micro_batch_size=8; "
            'set it to "auto" in mine.json',
        ),
        ({"gradient_clipping": 0.5}, "deepspeed.gradient_clipping=0.5 conflicts with training.max_grad_norm=1.0"),
        ({"bf16": {"enabled": False}}, "deepspeed.bf16.enabled=false conflicts with training.precision=bf16"),
        ({"fp16": {"enabled": True}}, "deepspeed.fp16.enabled=true conflicts with training.precision=bf16"),
        ({"bf16": True}, "deepspeed.bf16=true in mine.json: must be an object"),
        ({"train_batch_size": "64"}, 'deepspeed.train_batch_size="64" conflicts with training.global_batch_size=64'),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            "deepspeed.optimizer.params.lr=0.001 conflicts with training.learning_rate=0.0002",
        ),
        (
            {"zero_optimization": {"stage": 4}},
            "deepspeed.zero_optimization.stage=4 in mine.json: allowed are 0, 1, 2, 3",
        ),
        ({"zero_optimization": {"stage": "2"}}, 'deepspeed.zero_optimization.stage="2" in mine.json: allowed are'),
        ({"zero_optimization": {"stage": True}}, "deepspeed.zero_optimization.stage=true in mine.json: allowed are"),
        ({"zero_optimization": 2}, "deepspeed.zero_optimization=2 in mine.json: must be an object"),
        ('{"train_batch_size": 1, "train_batch_size": "auto"}', "'train_batch_size' is there twice; keep one"),
        ("{", "mine.json: not valid JSON (line 1: "),
        ("[1]", "mine.json: must hold one JSON object, holds a list"),
    ],
)
def test_conflict_or_bad_json_is_refused_by_name(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        agreed(read_ds_config(_write(tmp_path, content)))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_missing_file_and_unknown_name_say_what_is_shipped(tmp_path: Path) -> None:
    shipped = "shipped are zero0, zero1, zero2, zero2_offload, zero3, zero3_nvme, zero3_offload"
    with pytest.raises(FileNotFoundError, match=shipped):
        read_ds_config(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=f"deepspeed=zero4: {shipped}"):
        read_ds_config("zero4")


def test_equal_values_and_auto_pass_and_absent_ones_are_the_recipes(tmp_path: Path) -> None:
    mine = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": "auto"}},
        "zero_optimization": {"stage": 2, "allgather_bucket_size": 5e8},
    }
    found = agreed(read_ds_config(_write(tmp_path, mine)))
    assert found["optimizer"]["params"] == {"lr": 2e-4, "eps": 1e-8, "weight_decay": 0.0}
    assert (found["train_batch_size"], found["gradient_accumulation_steps"], found["bf16"]) == (
        64,
        8,
        {"enabled": True},
    )
    assert found["zero_optimization"] == mine["zero_optimization"]
    # An optimizer section is not invented: DeepSpeed would want its type.
    assert "optimizer" not in agreed({})


ALL_REDUCE = """
import os, sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")  # from the environment that the launcher sets
total = torch.tensor([float(os.environ["RANK"]) + 1])
dist.all_reduce(total)
with open(f"rank{os.environ['RANK']}.txt", "w") as out:
    print(int(total), os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], *sys.argv[1:], file=out)
dist.destroy_process_group()
"""
# What a shell would expand, split or end at.
PROMPT = """It costs $(id) $5 `id` "x" {a,b} * ; \\ #"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with the real scripts, recipes/train.py that only adds up ranks, and a recipe."""
    shutil.copytree(LAUNCH, tmp_path / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "train.py").write_text(ALL_REDUCE)
    (tmp_path / "recipes" / "doctor.py").touch()
    (tmp_path / "my recipe.yaml").write_text(
        "model: {base: b}\ndata: {train: t.jsonl}\ntraining: {output_dir: o, num_steps: 2}\n"
    )
    (tmp_path / "hosts").write_text((LAUNCH / "hostfile.example").read_text().replace("slots=8", "slots=1"))
    environment = {
        "PATH": f"{tmp_path}{os.pathsep}{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}",
        **{"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "HOSTFILE": "hosts", "NODE_RANK": "1"},
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_NTASKS": "2"},
        **{"SLURM_GPUS_PER_NODE": "h100:1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_SUBMIT_DIR": str(tmp_path)},
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # scontrol names two nodes that are both this machine; srun starts every task here.
    _stand_in(tmp_path, "scontrol", "echo scontrol \"$@\" >> said; printf '127.0.0.1\\nlocalhost\\n'")
    _stand_in(
        tmp_path,
        "srun",
        """while [[ $1 == --* ]]; do shift; done
pids=()
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=0 "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid"; done""",
    )
    return tmp_path


def _stand_in(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{body}\n")
    (folder / name).chmod(0o755)


def _script(project: Path, name: str, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | environment
    command = ["bash", f"launch/{name}", *argv]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("form", [[], ["--config"]], ids=["recipe", "--config"])
@pytest.mark.parametrize("script", ["run_multinode.sh", "run_node.sh", "slurm.sbatch"])
def test_every_script_takes_a_recipe_with_and_without_config_before_it(project: Path, script: str, form) -> None:
    records = """for argument in "$@"; do printf '%s\\n' "$argument"; done > "$(basename "$0")${RANK:-}.txt\""""
    for command in ("deepspeed", "python"):
        _stand_in(project, command, records)
    done = _script(project, script, *form, "my recipe.yaml", "--training.sample_prompt", PROMPT)
    assert (done.returncode, done.stderr) == (0, "")
    asked = ["--config", "my recipe.yaml", "--training.sample_prompt", PROMPT]
    files = {"run_multinode.sh": ["python.txt"], "run_node.sh": ["deepspeed.txt"]}
    for file in files.get(script, ["python0.txt", "python1.txt"]):
        found = (project / file).read_text().splitlines()
        assert found[found.index("--config") :][:4] == asked
        assert found.count("--config") == 1
    if script == "run_multinode.sh":  # what goes to the nodes' shells
        *_, train, config, file = (project / "deepspeed.txt").read_text().splitlines()
        assert (train, config) == ("recipes/train.py", "--config")
        assert re.fullmatch(r"\.launched-\d+-\d+\.yaml", file)


@pytest.mark.parametrize("script", ["run_multinode.sh", "run_node.sh", "slurm.sbatch"])
def test_every_script_starts_the_doctor(project: Path, script: str) -> None:
    for command in ("deepspeed", "python"):
        _stand_in(project, command, 'echo "$@" >> ran')
    done = _script(project, script, SCRIPT="recipes/doctor.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(line.endswith("recipes/doctor.py") for line in (project / "ran").read_text().splitlines())


def test_a_saved_recipe_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    """What run_multinode.sh hands to the nodes."""
    asked = [
        "--model.base",
        "b",
        "--data.train",
        "['a','b']",
        "--training.output_dir",
        "o",
        "--training.num_steps",
        "2",
    ]
    asked += ["--training.sample_prompt", PROMPT, "--model.lora", "{r: 4}", "--training.nvme_path", "5"]
    recipe = parse_recipe(asked)
    recipe.save(tmp_path / "recipe.yaml")
    assert parse_recipe(["--local_rank=1", "--config", str(tmp_path / "recipe.yaml")]) == recipe


@pytest.mark.distributed
def test_slurm_script_makes_one_world_of_its_tasks(project: Path, free_port: int) -> None:
    done = _script(project, "slurm.sbatch", "my recipe.yaml", "--training.max_steps", "3", MASTER_PORT=str(free_port))
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        assert (project / f"rank{rank}.txt").read_text() == "3 2 0 --config my recipe.yaml --training.max_steps 3\n"
    assert (project / "said").read_text() == "scontrol show hostnames node-[0-1]\n"


@pytest.mark.parametrize("near_limit", [True, False])
def test_slurm_job_that_nears_its_limit_saves_and_is_queued_again(project: Path, near_limit: bool) -> None:
    _stand_in(project, "srun", "trap 'exit 143' TERM; echo $$ > started; while true; do sleep 0.02; done")
    _stand_in(project, "scancel", 'echo scancel "$@" >> said; kill -TERM "$(cat started)"')
    job = subprocess.Popen(["bash", "launch/slurm.sbatch", "my recipe.yaml"], cwd=project, stdout=subprocess.PIPE)
    while not (project / "started").exists() or not (project / "started").read_text().strip():
        time.sleep(0.01)
    if near_limit:
        job.send_signal(signal.SIGUSR1)
    else:
        os.kill(int((project / "started").read_text()), signal.SIGTERM)
    said, _ = job.communicate(timeout=600)
    assert job.returncode == (0 if near_limit else 143)
    requeued = ["scancel --signal=TERM 7", "scontrol requeue 7"] if near_limit else []
    assert (project / "said").read_text().splitlines() == ["scontrol show hostnames node-[0-1]", *requeued]
    assert (b"the time limit is near" in said) == near_limit


def test_slurm_script_wants_a_task_for_each_gpu(project: Path) -> None:
    done = _script(project, "slurm.sbatch", "my recipe.yaml", SLURM_GPUS_PER_NODE="4")
    assert done.returncode == 2
    assert done.stderr == "--ntasks-per-node=1: one task drives one GPU; make it --gpus-per-node=4\n"


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_multinode_script_starts_every_node_over_pdsh_with_values_as_they_are(project: Path, free_port: int) -> None:
    # ssh answers; pdsh runs its command here once per host, with %n replaced by the node's rank as the real one does.
    _stand_in(project, "ssh", 'if [[ $* == *"hostname -I"* ]]; then echo 127.0.0.1; else echo ok; fi')
    _stand_in(
        project,
        "pdsh",
        """while [[ $1 == -* ]]; do
    case $1 in -w) IFS=, read -ra hosts <<< "$2"; shift 2 ;; -f | -R) shift 2 ;; *) shift ;; esac
done
command=$*
pids=()
for i in "${!hosts[@]}"; do bash -c "${command//%n/$i}" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid"; done""",
    )
    argv = ["my recipe.yaml", "--training.sample_prompt", PROMPT]
    done = _script(project, "run_multinode.sh", *argv, MASTER_PORT=str(free_port))
    assert done.returncode == 0, done.stdout + done.stderr
    (recipe,) = project.glob(".launched-*.yaml")
    assert yaml.safe_load(recipe.read_text())["training"]["sample_prompt"] == PROMPT
    for rank in (0, 1):
        assert (project / f"rank{rank}.txt").read_text() == f"3 2 0 --local_rank=0 --config {recipe.name}\n"


@pytest.mark.parametrize(
    "hostfile, argv, message",
    [
        ("hosts", [], "usage: HOSTFILE=FILE launch/run_multinode.sh RECIPE.yaml"),
        ("none", ["recipe.yaml"], "HOSTFILE=none: no such file; copy launch/hostfile.example."),
    ],
)
def test_multinode_script_refuses_in_one_line(project: Path, hostfile: str, argv: list[str], message: str) -> None:
    done = _script(project, "run_multinode.sh", *argv, HOSTFILE=hostfile)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


SHELL_WOULD_READ = [
    "$(touch ran)",
    "`touch ran`",
    "a b",
    "a;b",
    "*",
    "{a,b}",
    "$HOME",
    "a|b",
    "a&b",
    "a>b",
    "'a'",
    '"a"',
    "a\\b",
    "a#b",
    "a\nb",
    "(a)",
    "!a",
]


@pytest.mark.parametrize("value", SHELL_WOULD_READ)
@pytest.mark.parametrize("where", ["NCCL_SOCKET_IFNAME", "PYTHONSTARTUP", "argument", "PWD"])
def test_multinode_script_refuses_what_the_nodes_shells_would_read(project: Path, where: str, value: str) -> None:
    _stand_in(project, "deepspeed", "touch started")
    arguments, environment = [], {"SCRIPT": "recipes/doctor.py"}
    if where == "argument":
        arguments = ["--timeout", value]
    elif where == "PWD":
        project = shutil.copytree(project, project.parent / f"{project.name}-{value.replace('/', '')}")
    else:
        environment[where] = value
    done = _script(project, "run_multinode.sh", *arguments, **environment)
    assert done.returncode == 2
    named = "an argument of recipes/doctor.py" if where == "argument" else where
    assert done.stderr.startswith(f"{named}=")
    assert "the nodes' shells would read some of its characters" in done.stderr
    assert not list(project.rglob("started"))
    assert not list(project.rglob("ran"))


def test_multinode_script_removes_old_files_of_its_own_only(project: Path) -> None:
    for command in ("deepspeed", "python"):
        _stand_in(project, command, ":")
    own, users, folder = (project / f".launched-{name}.yaml" for name in ("1-2", "notes", "3-4"))
    own.touch()
    users.touch()
    folder.mkdir()
    for path in (own, users, folder):
        os.utime(path, (0, 0))
    assert _script(project, "run_multinode.sh", "my recipe.yaml").returncode == 0
    assert not own.exists()
    assert users.exists()
    assert folder.exists()


def test_scripts_are_shellcheck_clean() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [
        LAUNCH / "run_multinode.sh",
        LAUNCH / "run_node.sh",
        LAUNCH / "slurm.sbatch",
        LAUNCH.parent / ".ci" / "run",
    ]
    done = subprocess.run(["shellcheck", "--shell=bash", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
