#!/usr/bin/env bash
# What a container runs: it looks at all nodes, then trains. The arguments go to the recipe.
#
# Environment: NNODES, NODE_RANK, ENDPOINT   as launch/torchrun.sh reads them, else what Kubeflow sets for torchrun (PET_...)
#              SHARED                        folder that all nodes share                           (default: /runs)
#              PREFLIGHT=off                 train without looking at the nodes
set -euo pipefail

export NNODES=${NNODES:-${PET_NNODES:?set NNODES}} NODE_RANK=${NODE_RANK:-${PET_NODE_RANK:?set NODE_RANK}}
export ENDPOINT=${ENDPOINT:-${PET_MASTER_ADDR:?set ENDPOINT}:$PET_MASTER_PORT}
# torchrun would take each of them for an option.
for name in "${!PET_@}"; do unset "$name"; done

touch /tmp/started # the startup probe waits for something that the run writes after this
if [ "${PREFLIGHT:-on}" != off ]; then
    # Pods of one job may start minutes apart, where nodes are made for them and pull the image.
    python -m ringattn preflight --output "${SHARED:-/runs}" --timeout 900
fi
exec python -m ringattn train "$@"
