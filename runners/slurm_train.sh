#!/usr/bin/env bash
# One training on all GPUs of a SLURM job: a torchrun on each node, a process for each GPU, and one run.
#
#   sbatch --nodes=2 --gpus-per-node=4 --cpus-per-task=32 --time=2:00:00 runners/slurm_train.sh \
#       --recipe=resnet18-onecycle --batch_size=1024 --out=runs/large
#   sbatch ... runners/slurm_train.sh --resume=runs/large     # on as many GPUs, or on others
#
# Submit it in the repository, with .venv/bin on the PATH. Two minutes before the time is over SLURM sends SIGTERM: the
# batch is finished and the state saved. Without GPUs there are PROCESSES processes on each node (1).
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
set -euo pipefail
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
export PROCESSES="${SLURM_GPUS_ON_NODE:-${PROCESSES:-1}}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it from the job by itself
# The node's number is known on the node only.
# shellcheck disable=SC2016
exec srun --kill-on-bad-exit=1 bash -c 'exec torchrun --nnodes="$SLURM_NNODES" --node_rank="$SLURM_NODEID" \
	--nproc_per_node="$PROCESSES" --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" "$@"' \
	bash runners/train.py "$@"
