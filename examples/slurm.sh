#!/bin/bash
# Trains or captions on several machines of a Slurm cluster, and goes on after a failure: see docs/many_machines.md.
#   sbatch --nodes 2 --gpus-per-node 8 examples/slurm.sh examples/pretrain.py --resume_from_checkpoint true …
#SBATCH --job-name=evlgen
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
GPUS=${SLURM_GPUS_ON_NODE:-1} # processes of each machine
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
PORT=$((20000 + SLURM_JOB_ID % 10000)) # another one for each job
export GPUS MAIN PORT

# One launcher on each machine. If one machine fails, all are stopped, and all start again together.
for attempt in 1 2 3 4 5; do
    if srun --kill-on-bad-exit=1 bash -c 'accelerate launch --multi_gpu --num_machines "$SLURM_NNODES" \
        --num_processes $((SLURM_NNODES * GPUS)) --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MAIN" --main_process_port "$PORT" "$@"' launch "$@"; then
        exit 0
    fi
    echo "Attempt $attempt failed." >&2
    sleep 30
done
exit 1
