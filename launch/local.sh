#!/usr/bin/env bash
# Set up this machine and train on it until done. See usage below.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/local.sh [options] [hydra overrides]

Makes .venv (or uses the active environment if it has what is needed), then calls `ringattn train`: every GPU of this
machine, or 2 CPU ranks where there is none. Options are those of `ringattn train`.

  bash launch/local.sh                               the default: a small model on packed source files
  bash launch/local.sh model=llama_8b data=text      other choices, see configs/
  bash launch/local.sh engine=deepspeed              DeepSpeed is installed when asked for

Environment:
  NPROC    number of ranks                                    (default: one per GPU, else 2)
  PYTHON   interpreter to use or to make .venv with           (default: python3)
  EXTRAS   more extras of pyproject.toml, e.g. EXTRAS=fa4     (default: none)
  OMP_NUM_THREADS  threads of each rank                       (default: cores / ranks)

Exit code: 0 done, 75 stopped by a signal with a checkpoint, 1 failed, 2 something has to be changed first.
TEXT
}

for argument in "$@"; do
    case $argument in
        -h | --help) usage && exit 0 ;;
    esac
done

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up "$(extras_for "$@")"
unset NNODES # this machine alone
exec "$python" -m ringattn train "$@"
