#!/usr/bin/env bash
# Checks the ranks, then trains, on several machines. The same line on each of them:
#
#   NNODES=2 MASTER_ADDR=node0 bash launch/multinode.sh train.py --epochs 3
#
# Under slurm.sbatch and in a Kubeflow TrainJob nothing needs to be set. Otherwise, what can be:
#   NNODES           machines; else PET_NNODES, SLURM_NNODES, 1
#   MASTER_ADDR      one of them, by a name or address that all reach; else PET_MASTER_ADDR. Not needed for one machine
#   MASTER_PORT      a free port there; else PET_MASTER_PORT, 29500
#   NODE_RANK        0 on MASTER_ADDR, something else elsewhere; else PET_NODE_RANK, SLURM_NODEID, or told by host name
#   RUN_ID           one for each run at a time; else SLURM_JOB_ID, gen_dist
#   NPROC_PER_NODE   ranks on this machine; else PET_NPROC_PER_NODE, SLURM_GPUS_ON_NODE, its GPUs, 2 if it has none
#   LOCAL_ADDR       this machine's address, where its host name means nothing to the others
#   STARTUP_TIMEOUT  seconds to wait for the other machines (600)
#   OMP_NUM_THREADS  threads of each rank (1)
#   PYTHON           the interpreter (python)
# The network card, where there are several: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME.
set -euo pipefail

if (($# == 0)); then
    echo "usage: bash ${BASH_SOURCE[0]} train.py [its arguments]" >&2
    exit 2
fi
python=${PYTHON:-python}
nodes=${NNODES:-${PET_NNODES:-${SLURM_NNODES:-1}}}
address=${MASTER_ADDR:-${PET_MASTER_ADDR:-}}
port=${MASTER_PORT:-${PET_MASTER_PORT:-29500}}
node=${NODE_RANK:-${PET_NODE_RANK:-${SLURM_NODEID:-}}}
id=${RUN_ID:-${SLURM_JOB_ID:-gen_dist}}
ranks=${NPROC_PER_NODE:-${PET_NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}}
ranks=${ranks:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# torchrun NAME PROGRAM ARGUMENTS...: on all machines, which meet under NAME
torchrun() {
    local options=(--nproc_per_node "$ranks") name=$1
    shift
    if [[ $nodes == 1 ]]; then
        options+=(--nnodes 1 --standalone)
    else
        local settings=join_timeout=$timeout,read_timeout=$timeout
        [[ -z $node ]] || settings+=,is_host=$((node == 0))
        options+=(--nnodes "$nodes" --rdzv_backend c10d --rdzv_endpoint "$address:$port" --rdzv_id "$name"
            --rdzv_conf "$settings")
        [[ -z ${LOCAL_ADDR:-} ]] || options+=(--local_addr "$LOCAL_ADDR")
    fi
    "$python" -m torch.distributed.run "${options[@]}" "$@"
}

if [[ $nodes != 1 && -z $address ]]; then
    echo "error: set MASTER_ADDR to the name or address of one of the $nodes machines, the same on all" >&2
    exit 2
fi
"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("gen_dist") is None)' || {
    echo "error: $python has no gen_dist: type $python -m pip install gen_dist" >&2
    exit 1
}
timeout=${STARTUP_TIMEOUT:-600}
torchrun "$id-preflight" -m gen_dist.preflight --settings "$*"
torchrun "$id" "$@"
