"""Two launchers that share nothing but a hostfile and an address train one model with the curve of one process."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_fixtures import finish, losses, recipe_argv, write_base, write_pairs

from adapt.training import train
from adapt.training.recipe import parse_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]
ROOT = Path(__file__).resolve().parents[1]


def _ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0


@pytest.fixture(params=["loopback", "namespaces"])
def nodes(request: pytest.FixtureRequest) -> Iterator[list[tuple[str, list[str], str]]]:
    """(address, what to put before a command to run it there, network card) of each node."""
    if request.param == "loopback":
        yield [("127.0.0.1", [], "lo"), ("localhost", [], "lo")]
        return
    names = [f"adapt{os.getpid()}{side}" for side in "ab"]
    if shutil.which("ip") is None or not all(_ip("netns", "add", name) for name in names):
        pytest.skip("making network namespaces needs `ip` and root")
    try:
        assert _ip("link", "add", "eth9", "netns", names[0], "type", "veth", "peer", "name", "eth9", "netns", names[1])
        for number, name in enumerate(names, start=1):
            assert _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth9")
            assert _ip("-n", name, "link", "set", "eth9", "up")
            assert _ip("-n", name, "link", "set", "lo", "up")
        yield [(f"10.77.0.{number}", ["ip", "netns", "exec", name], "eth9") for number, name in enumerate(names, 1)]
    finally:
        for name in names:
            _ip("netns", "del", name)


def test_two_nodes_have_the_curve_of_one_process(nodes, tmp_path: Path, free_port: int) -> None:
    write_base(tmp_path / "base")
    write_pairs(tmp_path / "pairs.jsonl")
    train.train(parse_recipe(recipe_argv(tmp_path / "base", tmp_path / "pairs.jsonl", tmp_path / "one")))

    (tmp_path / "hosts").write_text("# two nodes\n" + "".join(f"{address} slots=1\n" for address, _, _ in nodes))
    (tmp_path / "recipe.yaml").write_text("training: {deepspeed: zero2, micro_batch_size: 4}\n")
    overrides = {"training__micro_batch_size": None}
    argv = recipe_argv(tmp_path / "base", tmp_path / "pairs.jsonl", tmp_path / "two", **overrides)
    started = []
    for rank, (_, inside, card) in enumerate(nodes):
        env = os.environ | {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": card, "MASTER_PORT": str(free_port)}
        env |= {"NODE_RANK": str(rank), "HOSTFILE": str(tmp_path / "hosts")}
        command = [*inside, "launch/run_node.sh", str(tmp_path / "recipe.yaml"), *argv]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, **pipes))
    assert "6 steps of 8 rows on 2 ranks" in finish(started[0])
    finish(started[1])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()
