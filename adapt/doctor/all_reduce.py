"""Do the ranks of a job reach each other: an all-reduce whose sum is known, timed; `adapt doctor` runs it.

The first thing that fails in a job of several machines is that one cannot reach another, and what the libraries then do is
to wait for half an hour and name nobody. Here each rank has `timeout_s` to answer, and who did not is named.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

from ..training.engine.ports import check_master_port, free_port

_SIZES_MB = (1, 64)
_REPEATS = 5


def all_reduce_line(timeout_s: int) -> str | None:
    """One line on the all-reduce, from rank 0 of the ranks that a launcher started; None on the others.

    Raises ValueError, naming the rank, if one does not answer in `timeout_s` seconds or a sum is wrong.
    """
    import torch
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = _own_gpu(int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    check_master_port()
    hosts, store = _meet(rank, world_size, timeout_s)
    try:
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        timings = [_timed(megabytes, rank, world_size, device) for megabytes in _SIZES_MB]
        _barrier(device)
        dist.destroy_process_group()
    except (RuntimeError, dist.DistError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"all-reduce: the {world_size} ranks met, but {backend} failed between them ({reason}); with several network cards "
            f"name the one to use: export {backend.upper()}_SOCKET_IFNAME=eth0"
        ) from error
    if rank != 0:
        return None
    figures = ", ".join(f"{size} MB in {1e3 * s:.1f} ms ({gb:.2f} GB/s)" for size, (s, gb) in zip(_SIZES_MB, timings))
    return f"ok       all-reduce       {world_size} ranks on {', '.join(sorted(set(hosts)))} over {backend}: sums right, {figures}"


def _own_gpu(local_rank: int):
    """The rank's GPU, made the current one; ValueError where it has none to itself, which NCCL refuses."""
    import torch

    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"all-reduce: local rank {local_rank} has no GPU, torch sees {torch.cuda.device_count()} here and NCCL wants one for each "
            "rank; start fewer ranks, or hide the GPUs to test the network alone: CUDA_VISIBLE_DEVICES= adapt doctor ..."
        )
    # Else a rank that does not answer is NCCL's watchdog's, which aborts the process instead of raising an error.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _meet(rank: int, world_size: int, timeout_s: int):
    """(host name of every rank, the store) once all ranks have written theirs; ValueError naming who has not."""
    import torch.distributed as dist
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun holds the store in its own process, deepspeed leaves it to rank 0.
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=timeout_s)
    try:
        store = TCPStore(address, port, world_size, is_host, timeout, wait_for_workers=False, multi_tenant=True)
        store = PrefixStore("doctor", store)
        store.set(f"host{rank}", socket.gethostname())
    except (RuntimeError, dist.DistError) as error:
        raise ValueError(
            f"all-reduce: rank {rank} on {socket.gethostname()} cannot reach rank 0 at {address}:{port} within {timeout_s} s; "
            f"check that the name resolves here, that no firewall closes the port, and that rank 0 has started"
        ) from error
    deadline = time.monotonic() + timeout_s
    hosts, absent = [], []
    for other in range(world_size):
        try:
            store.wait([f"host{other}"], timedelta(seconds=max(0.2, deadline - time.monotonic())))
            hosts.append(store.get(f"host{other}").decode())
        except (RuntimeError, dist.DistError):
            absent.append(str(other))
    if absent:
        raise ValueError(
            f"all-reduce: rank {', '.join(absent)} of {world_size} did not reach {address}:{port} within {timeout_s} s; check that "
            "its process started, and that its machine reaches this address and port"
        )
    return hosts, store


def _barrier(device) -> None:
    import torch.distributed as dist

    dist.barrier(
        device_ids=[device.index] if device.type == "cuda" else None
    )  # NCCL guesses the GPU, and warns that it does


def _timed(megabytes: int, rank: int, world_size: int, device) -> tuple[float, float]:
    """(seconds of one all-reduce, GB/s through each rank's link) of float32 tensors; ValueError for a wrong sum."""
    import torch
    import torch.distributed as dist

    numel = megabytes * 250_000
    expected = world_size * (world_size + 1) / 2
    seconds = []
    for _ in range(_REPEATS):
        tensor = torch.full((numel,), float(rank + 1), device=device)
        _barrier(device)
        start = time.perf_counter()
        dist.all_reduce(tensor)
        wrong = int((tensor != expected).sum())  # waits for the device
        seconds.append(time.perf_counter() - start)
        if wrong:
            raise ValueError(f"all-reduce: rank {rank} got {wrong} wrong sums of {numel}; a link or a card is broken")
    best = min(seconds)
    # Each rank sends and receives 2 (n - 1) / n of the tensor, in a ring.
    return best, 2 * (world_size - 1) / world_size * megabytes / 1e3 / best


def launch_ranks(num_ranks: int, timeout_s: int) -> int:
    """Starts `num_ranks` processes here for the all-reduce; the exit code."""
    port = free_port()
    ranks = []
    for rank in range(num_ranks):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": num_ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        env = os.environ | {name: str(value) for name, value in place.items()}
        command = [sys.executable, "-m", "adapt.cli", "doctor", "--all_reduce_only", "--timeout", str(timeout_s)]
        ranks.append(subprocess.Popen(command, env=env))
    while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
        time.sleep(0.05)
    for rank in ranks:  # the first that failed has said why
        rank.kill()
        rank.wait()
    return int(any(rank.returncode for rank in ranks))
