# Sourced by quickstart.sh and test.sh: enters the repository and prepares its virtual environment.
# shellcheck shell=bash

root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${GEN_DIST_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
cd "$root" || exit

# matplotlib keeps a list of fonts; a machine without a home folder has no place for it.
export MPLCONFIGDIR=${MPLCONFIGDIR:-$venv/matplotlib}

say() {
    printf '\n== %s\n' "$*"
}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# find_python: the interpreter to build on, in $python
find_python() {
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null ||
        fail "no $python here: install Python 3.10 or newer, or set PYTHON to its path"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$python" --version) is too old: set PYTHON to the path of Python 3.10 or newer"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv or ensurepip: install them (on Debian and Ubuntu, the package python3-venv)"
}

# prepare_environment EXTRA: $venv with this project and what EXTRA needs; nothing to do if that is done already
prepare_environment() {
    local extra=$1
    local stamp=$venv/gen_dist-$extra.stamp
    if [[ -f $stamp && $(<"$stamp") == "$root" && $stamp -nt pyproject.toml &&
        $stamp -nt launch/constraints.txt ]]; then
        say "using the virtual environment $venv"
        return
    fi
    find_python
    say "making the virtual environment $venv (a few seconds)"
    "$python" -m venv "$venv"
    say "installing gen_dist[$extra] and PyTorch (one to five minutes, only the first time)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint launch/constraints.txt --editable ".[$extra]"
    printf '%s\n' "$root" >"$stamp"
}
