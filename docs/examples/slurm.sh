#!/bin/bash
# Train on two nodes with eight GPUs each, under Slurm:
#
#     sbatch docs/examples/slurm.sh configs/h200.yaml run_dir=/shared/runs/h200
#
# The repository and run_dir are on a file system that all nodes share. torchrun starts one process
# for each GPU, and restarts all of them from the newest checkpoint if one dies. Five minutes before
# the time limit, and when the job is cancelled or preempted, the run saves a checkpoint and ends;
# submit it again to continue.
#SBATCH --job-name=pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${nodes%%$'\n'*}  # not by head, which may end scontrol and thus, with pipefail, the job
export OMP_NUM_THREADS=8
# torchrun's rendezvous store outlives a restart: the ranks need a new one.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds to save a checkpoint after SIGTERM. Before torch 2.12, they are always 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --max-restarts 3 \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$head_node:29500" \
    -m pretrain train "$@"
