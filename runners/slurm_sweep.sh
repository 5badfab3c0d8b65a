#!/usr/bin/env bash
# A sweep on all tasks of a SLURM job, each with a GPU of its own, by W&B's server or without it.
#
#   sbatch --ntasks=8 --gpus-per-task=1 --cpus-per-task=8 --time=8:00:00 runners/slurm_sweep.sh ENTITY/PROJECT/SWEEP
#   sbatch ... runners/slurm_sweep.sh sweeps/lr_range.yaml --storage=postgresql://USER@HOST/DATABASE --name=lr_range
#
# The first is an agent for each task, of the sweep that `wandb sweep` made. The second is an `eva sweep` for each task:
# the storage is where they find each other, and each has a folder of its own, sweeps-out/JOB-TASK. Further words are
# those of `wandb agent`, or of `eva sweep`. Submit it in the repository, with .venv/bin on the PATH.
#SBATCH --signal=TERM@120
set -euo pipefail
question="$1"
shift
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it from the job by itself
case "$question" in
*.yaml | *.yml)
	# The task's number is known in the task only.
	# shellcheck disable=SC2016
	exec srun bash -c 'exec eva sweep "$@" --out="sweeps-out/$SLURM_JOB_ID-$SLURM_PROCID"' bash "$question" "$@"
	;;
*) exec srun wandb agent "$@" "$question" ;;
esac
