#!/usr/bin/env bash
# Trains a small network on 2 ranks with the learning rate that GeN chooses; arguments go to examples/train.py.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ranks=2
prepare_environment examples
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

say "checking what is to be trained (a few seconds)"
WORLD_SIZE=$ranks "$venv/bin/python" examples/train.py --check "$@"

say "training on $ranks ranks (under a minute): torchrun --standalone --nproc_per_node=$ranks examples/train.py${*:+ $*}"
"$venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node=$ranks examples/train.py "$@"
