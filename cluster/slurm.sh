#!/usr/bin/env bash
# A run over the nodes of a Slurm job, from an environment in which onelabel[cluster] is installed:
#   sbatch --nodes=4 --cpus-per-task=16 --gpus-per-node=1 cluster/slurm.sh singlestrip name=study storage=/shared/runs ...
#SBATCH --job-name=onelabel
#SBATCH --ntasks-per-node=1
set -euo pipefail

# Who holds the token may use the cluster: it lives in the environment of this job alone.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
port=$((20000 + SLURM_JOB_ID % 10000))

start() { # NODE OPTION...
    local cpus=${SLURM_CPUS_PER_TASK:-1} # which srun does not take over by itself
    srun --nodes=1 --ntasks=1 --cpus-per-task="$cpus" --nodelist="$1" ray start --block --num-cpus="$cpus" "${@:2}" &
}
listens() { (: < "/dev/tcp/$head/$port") 2> /dev/null; }

trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
start "$head" --head --port="$port" --include-dashboard=false
until listens; do
    kill -0 $! || { echo "Ray did not start on $head" >&2; exit 1; }
    sleep 1
done
for node in "${nodes[@]:1}"; do
    start "$node" --address="$head:$port"
done
onelabel run compute.wait_s=300 "$@" compute.address="$head:$port"
