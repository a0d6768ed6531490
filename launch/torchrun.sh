#!/usr/bin/env bash
# Train on several machines: run it once on each. See usage below.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/torchrun.sh --nodes N --node-rank R --endpoint HOST:PORT [options] [hydra overrides]

Runs recipes/train.py with torchrun and its c10d rendezvous: start it on every node, with the same number of nodes and
endpoint, in any order.

  --nodes N            machines that take part                               or NNODES
  --node-rank R        0 ... N-1; 0 holds the rendezvous, so HOST names it   or NODE_RANK
  --endpoint HOST:PORT of node 0, reachable from all, PORT free there        or ENDPOINT
  --nproc-per-node P   ranks on this node (one per GPU, else 2)              or NPROC
  --id NAME            tells jobs with the same endpoint apart (ringattn)    or JOB_ID

What follows goes to the recipe. An argument wins over the environment. PYTHON, EXTRAS: see launch/setup.sh.
TEXT
}

fail() {
    echo "torchrun.sh: $1" >&2
    usage >&2
    exit 2
}

nodes=${NNODES:-} node_rank=${NODE_RANK:-} endpoint=${ENDPOINT:-} processes=${NPROC:-} id=${JOB_ID:-ringattn}
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --nodes | --node-rank | --endpoint | --nproc-per-node | --id)
            [ $# -ge 2 ] || fail "$1 needs a value"
            case $1 in
                --nodes) nodes=$2 ;;
                --node-rank) node_rank=$2 ;;
                --endpoint) endpoint=$2 ;;
                --nproc-per-node) processes=$2 ;;
                --id) id=$2 ;;
            esac
            shift 2
            ;;
        --) shift && break ;;
        --*) fail "unknown option $1" ;;
        *) break ;;
    esac
done

is_count() { [[ $1 =~ ^[0-9]+$ ]]; }

absent=""
[ -n "$nodes" ] || absent="$absent --nodes (or NNODES)"
[ -n "$node_rank" ] || absent="$absent --node-rank (or NODE_RANK)"
[ -n "$endpoint" ] || absent="$absent --endpoint (or ENDPOINT)"
[ -z "$absent" ] || fail "missing:$absent"
{ is_count "$nodes" && [ "$nodes" -ge 1 ]; } || fail "--nodes must be an integer >= 1, got '$nodes'"
{ is_count "$node_rank" && [ "$node_rank" -lt "$nodes" ]; } ||
    fail "--node-rank must be an integer from 0 to $((nodes - 1)) for --nodes $nodes, got '$node_rank'"
[[ $endpoint =~ ^.+:[0-9]+$ ]] || fail "--endpoint must be HOST:PORT, got '$endpoint'"

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up "$(extras_for "$@")"
choose_ranks "$processes"

# is_host is said, not guessed: torchrun compares host names, which fails in containers and for two nodes on one machine.
is_host=$([ "$node_rank" -eq 0 ] && echo true || echo false)
exec "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$id" --rdzv-conf "is_host=$is_host" \
    recipes/train.py "$@"
