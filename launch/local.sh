#!/usr/bin/env bash
# Checks the ranks, then trains, on this machine:
#
#   bash launch/local.sh train.py --epochs 3
#
# What can be set: NPROC_PER_NODE, OMP_NUM_THREADS, PYTHON, as in multinode.sh.
set -euo pipefail
NNODES=1 exec bash "$(dirname "${BASH_SOURCE[0]}")/multinode.sh" "$@"
