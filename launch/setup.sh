# shellcheck shell=bash
# Sourced by the other scripts, which have `set -euo pipefail`.
#
#   set_up "train dev" [deepspeed]
#
# leaves in $python an interpreter that can run this checkout with the extras of the first argument: the active one
# (python3 on PATH) if it already has them, else the one of .venv, which is made and filled as needed. The second
# argument is tried and may fail. What is already installed is stamped, so that a second call is quick.
#
# Environment: PYTHON  the interpreter to use or to make .venv with   (default: python3, or the first of python3.1x)
#              EXTRAS  more extras of pyproject.toml, e.g. "fa4"      (default: none)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
cd "$root" || exit

say() { echo "ringattn: $*" >&2; }

# quietly WHAT COMMAND...: one line with the time it took; the command's output is shown only when it fails.
quietly() {
    local what=$1 log code=0 began=$SECONDS
    shift
    log=$(mktemp)
    say "$what ..."
    "$@" >"$log" 2>&1 </dev/null || code=$?
    if [ "$code" -eq 0 ]; then
        say "$what: done in $((SECONDS - began)) s"
    else
        cat "$log" >&2
        say "$what: failed with exit code $code"
    fi
    rm -f "$log"
    return "$code"
}

# find_python: sets $python to the first interpreter that is new enough.
find_python() {
    local name names=(python3 python3.13 python3.12 python3.11 python)
    [ -z "${PYTHON:-}" ] || names=("$PYTHON")
    for name in "${names[@]}"; do
        python=$(command -v "$name") || continue
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            return 0
        fi
    done
    say "Python 3.11 or newer is needed, found ${PYTHON:-python3}: $("${PYTHON:-python3}" --version 2>&1 || true)"
    say "install one (for example: apt install python3.11-venv, conda create -n ringattn python=3.12), or set PYTHON to it"
    return 1
}

# stamp_of: what the packages of .venv depend on; the folder is part of it, since an editable install names it.
stamp_of() { (cat pyproject.toml launch/constraints.txt && echo "$root") | cksum; }

# missing EXTRA...: those that are not stamped as installed from the present files, separated by commas.
missing() {
    local extra list="" stamp
    stamp=$(stamp_of)
    for extra in "$@"; do
        [ "$(cat "$venv/.ready/$extra" 2>/dev/null)" = "$stamp" ] || list="$list,$extra"
    done
    echo "${list#,}"
}

stamp_as_done() {
    local extra
    mkdir -p "$venv/.ready"
    for extra in ${1//,/ }; do
        stamp_of >"$venv/.ready/$extra"
    done
}

pip_install() { "$python" -m pip install --no-input --disable-pip-version-check -c launch/constraints.txt "$@"; }

# deepspeed comes as source only: its set-up imports the torch that is already there, so without build isolation;
# DS_BUILD_OPS=0 leaves its operators to be compiled at their first use.
install_deepspeed() {
    DS_BUILD_OPS=0 quietly "installing ringattn[deepspeed]" pip_install --no-build-isolation -e ".[deepspeed]"
}

make_venv() {
    local base=$python
    python="$venv/bin/python"
    if ! "$python" -c 'import pip' 2>/dev/null; then
        quietly "making .venv with $("$base" --version)" "$base" -m venv --clear "$venv" || return
    fi
}

# shellcheck disable=SC2086  # lists of extras are split on purpose, here and in set_up
fill_venv() {
    local extra plain=""
    for extra in $1; do
        [ "$extra" = deepspeed ] || plain="$plain $extra"
    done
    plain=$(missing $plain)
    if [ -n "$plain" ]; then
        # torch alone and first: pip would else weigh its builds against everything at once.
        quietly "installing torch" pip_install torch "setuptools>=77" wheel || return
        quietly "installing ringattn[$plain]" pip_install -e ".[$plain]" || return
        stamp_as_done "$plain"
    fi
    [[ " $1 $2 " == *" deepspeed "* && -n $(missing deepspeed) ]] || return 0
    # A failure is stamped too, or every run of the tests would try again for minutes; who asks for it gets a new try.
    [[ " $1 " == *" deepspeed "* || -n $(missing no-deepspeed) ]] || return 0
    if install_deepspeed; then
        stamp_as_done deepspeed
    elif [[ " $1 " == *" deepspeed "* ]]; then
        return 1
    else
        say "going on without deepspeed: its tests are skipped (rm -r .venv/.ready to try again)"
        stamp_as_done no-deepspeed
    fi
}

# extras_for OVERRIDE...: what the recipe needs with these overrides.
extras_for() {
    local argument extras=train
    for argument in "$@"; do
        [ "$argument" != engine=deepspeed ] || extras="train deepspeed"
    done
    echo "$extras"
}

# shellcheck disable=SC2086
set_up() {
    local required="$1 ${EXTRAS:-}" lacks status=0
    find_python || return
    if lacks=$("$python" launch/satisfied.py $required 2>&1); then
        # Nothing is written into an environment that is not ours: this checkout is found by its path.
        export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
        return
    elif [ $? -eq 2 ]; then
        say "$lacks"
        return 2
    fi
    [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || say "the active environment lacks ${lacks##*$'\n'}: using .venv"
    # Two scripts started together (two nodes on a shared file system) must not fill .venv at once.
    mkdir -p "$venv"
    exec 9<"$venv"
    ! command -v flock >/dev/null || flock 9 || true
    { make_venv && fill_venv "$required" "${2:-}"; } || status=$?
    exec 9<&-
    return "$status"
}
