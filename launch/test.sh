#!/usr/bin/env bash
# Checks style and types and runs the tests; arguments go to pytest.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment tests
export OMP_NUM_THREADS=1
run=("$venv/bin/python" -m)

say "ruff and mypy (under a minute)"
"${run[@]}" ruff check .
"${run[@]}" ruff format --check .
"${run[@]}" mypy gen_dist examples

say "pytest on 2 processes (five to eight minutes)"
"${run[@]}" pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
