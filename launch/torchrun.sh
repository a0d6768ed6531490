#!/usr/bin/env bash
# Set up this machine and train on several: run it once on each. See usage below.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/torchrun.sh --nodes N --node-rank R --endpoint HOST:PORT [options] [hydra overrides]

Makes .venv as launch/local.sh does, then calls `ringattn train`, which starts torchrun with its c10d rendezvous: run it
on every node, with the same number of nodes and endpoint, in any order.

  --nodes N            machines that take part                               or NNODES
  --node-rank R        0 ... N-1; 0 holds the rendezvous, so HOST names it   or NODE_RANK
  --endpoint HOST:PORT of node 0, reachable from all, PORT free there        or ENDPOINT
  --nproc-per-node P   ranks on this node (one per GPU, else 2)              or NPROC
  --id NAME            tells jobs with the same endpoint apart (ringattn)    or JOB_ID

  --max-restarts N     start all ranks again, N times, when one fails; --nodes MIN:MAX run.elastic=true goes on with fewer

What follows goes to the recipe. An argument wins over the environment. PYTHON, EXTRAS: see launch/setup.sh.
Exit code: 0 done, 75 stopped by a signal with a checkpoint, 1 failed, 2 something has to be changed first.
TEXT
}

for argument in "$@"; do
    case $argument in
        -h | --help) usage && exit 0 ;;
    esac
done
if [[ -z ${NNODES:-} && " $* " != *" --nodes"[\ =]* ]]; then
    echo "torchrun.sh: missing: --nodes (or NNODES)" >&2 # without it this machine would train alone
    usage >&2
    exit 2
fi

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up "$(extras_for "$@")"
exec "$python" -m ringattn train "$@"
