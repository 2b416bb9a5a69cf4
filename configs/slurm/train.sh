#!/bin/bash
# Train on several hosts with torchrun; what follows is what `geodiff4d train` is given:
#   sbatch configs/slurm/train.sh image --preset paper --sd sd15 --data /shared/mine --out /shared/runs/p
# Five minutes before its time is over a checkpoint is written and the job put back in the queue, to go on from there.
#SBATCH --job-name=geodiff4d-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
asked=0

# SLURM tells this script alone (B:); srun passes the signal on, and torchrun gives its processes time to save.
trap 'asked=1; kill -TERM "$step" 2>/dev/null' TERM

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:$port" \
    --shutdown-timeout 270 \
    -m -- geodiff4d train "$@" &
step=$!

# A signal ends the first wait before the step has ended.
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    code=$?
done
if ((asked && code != 0)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
