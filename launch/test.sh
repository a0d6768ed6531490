#!/usr/bin/env bash
# Set up this machine and run the tests: bash launch/test.sh [pytest arguments]. Environment: see launch/setup.sh.
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up "train dev hf memory" deepspeed
# Two files at a time: most tests take one core. Those of GPUs would share one.
workers=2
[[ " $* " != *gpu* ]] || workers=0
# The same drawn examples each time, and fewer than pytest alone would draw: see tests/conftest.py.
export CI="${CI:-1}"
exec "$python" -m pytest -n "$workers" --dist loadfile "$@"
