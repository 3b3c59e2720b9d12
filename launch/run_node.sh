#!/usr/bin/env bash
# Train on several nodes without ssh and without Slurm: type the same line on every node, in the project's folder, with
# NODE_RANK=0 on the first node of the hostfile, 1 on the second, and so on:
#
#   NODE_RANK=0 HOSTFILE=hostfile launch/run_node.sh recipes/MY_RECIPE.yaml --training.num_steps 1000
#   NODE_RANK=0 HOSTFILE=hostfile SCRIPT=recipes/doctor.py launch/run_node.sh     do the ranks reach each other?
#
# The hostfile is like launch/hostfile.example. What must hold: every node sees the project, its .venv, the data and the
# output folder under the same path, and reaches MASTER_PORT of the first one, which waits for all. Several network cards:
# export NCCL_SOCKET_IFNAME=eth0 (on CPUs GLOO_SOCKET_IFNAME).
set -euo pipefail

hostfile=${HOSTFILE:-hostfile}
script=${SCRIPT:-recipes/train.py}
usage="usage: NODE_RANK=N HOSTFILE=FILE launch/run_node.sh RECIPE.yaml [--dotted.key value ...]"
if [ $# -eq 0 ] && [ "$script" = recipes/train.py ] || [ -z "${NODE_RANK:-}" ]; then
    echo "$usage" >&2
    exit 2
elif [ ! -f "$hostfile" ]; then
    echo "HOSTFILE=$hostfile: no such file; copy launch/hostfile.example. $usage" >&2
    exit 2
elif [ ! -f "$script" ]; then
    echo "$script: not here ($PWD); start this script in the project's folder" >&2
    exit 2
fi
export PATH="$PWD/.venv/bin:$PATH"

first=$(grep -v -E '^[[:space:]]*(#|$)' "$hostfile" | head -n 1 | cut -d ' ' -f 1)
[ "$script" != recipes/train.py ] || [[ $1 == -* ]] || set -- --config "$@"
exec deepspeed -q --hostfile "$hostfile" --no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:-$first}" \
    --master_port "${MASTER_PORT:-29500}" "$script" "$@"
