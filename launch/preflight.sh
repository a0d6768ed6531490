#!/usr/bin/env bash
# Set up this machine and look at it before a run, alone or with others: run it once on each. See usage below.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/preflight.sh [options]

Makes .venv as launch/local.sh does, then calls `ringattn preflight`, which has the options: versions, clocks, folders,
limits, memory, products and links of this machine, or of all that are started with the same --nodes and --endpoint.

Exit code 0 if a run can start, 1 if something is wrong. PYTHON, EXTRAS: see launch/setup.sh.
TEXT
}

for argument in "$@"; do
    case $argument in
        -h | --help) usage && exit 0 ;;
    esac
done

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up train
exec "$python" -m ringattn preflight "$@"
