#!/usr/bin/env bash
# Train on several nodes over ssh. Type it once, on the first node, in the project's folder:
#
#   HOSTFILE=hostfile launch/run_multinode.sh recipes/MY_RECIPE.yaml --training.num_steps 1000
#   HOSTFILE=hostfile SCRIPT=recipes/doctor.py launch/run_multinode.sh     do the ranks reach each other? before a long run
#
# The hostfile is like launch/hostfile.example. What must hold:
#   - every node sees the project, its .venv, the data and the output folder under the same path (a shared disk);
#   - `ssh NODE hostname` asks for no password, from the first node to all (itself included), and `pdsh` is installed
#     on the first node (apt-get install pdsh); without pdsh but with MPI: LAUNCHER=openmpi;
#   - the nodes reach MASTER_PORT of the first one. With several network cards name the one to use:
#     export NCCL_SOCKET_IFNAME=eth0 (DeepSpeed passes NCCL_* on; other variables: NAME=value lines in ~/.deepspeed_env).
# Settings may hold any character: they go to the nodes as a file. The project's path and the variables that DeepSpeed passes on
# go through the nodes' shells, and are refused where those would change them.
# A run that was cut off is started again with the same line: it resumes from its last checkpoint.
set -euo pipefail

hostfile=${HOSTFILE:-hostfile}
script=${SCRIPT:-recipes/train.py}
usage="usage: HOSTFILE=FILE launch/run_multinode.sh RECIPE.yaml [--dotted.key value ...]"
if [ $# -eq 0 ] && [ "$script" = recipes/train.py ]; then
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

# DeepSpeed 0.19.8 joins all that it hands to pdsh without quotes: `$(...)`, `;`, `*` or a space would not arrive as they are.
check_plain() { # NAME VALUE
    [[ $2 =~ ^[A-Za-z0-9_./:,@%+=~-]*$ ]] && return
    echo "$1=$2: the nodes' shells would read some of its characters; it may hold letters, digits and _ . / : , @ % + = ~ -" >&2
    exit 2
}
check_plain PWD "$PWD"
check_plain SCRIPT "$script"
for name in $(compgen -e); do
    [[ $name =~ ^(MLFLOW|PYTHON|MV2|UCX|NCCL) ]] && check_plain "$name" "${!name}"
done

if [ "$script" = recipes/train.py ]; then
    [[ $1 == -* ]] || set -- --config "$@"
    # Read when the ranks start, so that files of earlier starts are not needed any more.
    find . -maxdepth 1 -type f -regex '\./\.launched-[0-9]+-[0-9]+\.yaml' -mmin +60 -delete
    recipe=.launched-$(date +%s)-$$.yaml
    python -m adapt.training.recipe "$recipe" "$@"
    set -- --config "$recipe"
fi
for argument in "$@"; do check_plain "an argument of $script" "$argument"; done
exec deepspeed -q --hostfile "$hostfile" --launcher "${LAUNCHER:-pdsh}" --master_port "${MASTER_PORT:-29500}" "$script" "$@"
