#!/bin/bash
# Start a Ray cluster on all hosts of the job and carry out a fleet on it; what follows is what `geodiff4d fleet` is
# given, without --ray:
#   sbatch configs/slurm/fleet.sh jobs.jsonl --out /shared/fleet
# Five minutes before its time is over the job is put back in the queue. Jobs of the fleet that are done stay done.
#SBATCH --job-name=geodiff4d-fleet
#SBATCH --nodes=4
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
per_host=(--num-cpus "${SLURM_CPUS_PER_TASK:-1}" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats)
asked=0
fleet=

trap 'asked=1; [[ -n $fleet ]] && kill -TERM "$fleet" 2>/dev/null' TERM

# A node that ends begins again, the head too.
again='while true; do "$@"; sleep 5; done'
# The script runs on the first host, so that the fleet finds a node of the cluster there.
srun --nodes=1 --ntasks=1 --overlap --nodelist "$first" bash -c "$again" node \
    ray start --head --block --port "$port" --include-dashboard=false "${per_host[@]}" &
if ((SLURM_NNODES > 1)); then
    srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --overlap --exclude "$first" \
        bash -c "$again" node ray start --block --address "$first:$port" "${per_host[@]}" &
fi

geodiff4d fleet "$@" --ray "$first:$port" &
fleet=$!
wait "$fleet"
code=$?
while kill -0 "$fleet" 2>/dev/null; do
    wait "$fleet"
    code=$?
done
if ((asked && code != 0)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
# Nodes of the cluster end with the fleet.
kill $(jobs -p) 2>/dev/null
exit "$code"
