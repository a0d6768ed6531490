#!/usr/bin/env bash
# Set up this machine and run the tests: bash launch/test.sh [pytest arguments]. Environment: see launch/setup.sh.
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up "train dev hf memory" deepspeed
exec "$python" -m pytest "$@"
