#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster, one process a GPU. Options of sbatch
# come first, then those of `dsv3 train`:
#
#   sbatch --nodes=4 --time=1-0 launch/slurm.sh --config=FILE --workdir=DIR
#
# RESTARTS   maximum times that the job is queued again, to resume from its last
#            step after a timeout, a kill, a crash or a hang (9)
# DSV3       the command (dsv3)
# DRY_RUN=1  prints the command instead: DRY_RUN=1 launch/slurm.sh ...
#
# DIR is on a file system that all nodes share.
#SBATCH --job-name=dsv3
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

RESTARTS=${RESTARTS:-9}
read -r -a dsv3 <<< "${DSV3:-dsv3}"
command=(srun "${dsv3[@]}" train --cluster "$@")
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  exit
fi
code=0
"${command[@]}" || code=$?
case $code in
  0 | 2 | 76 | 77) exit "$code" ;; # see README: a restart does not help
esac
if ((${SLURM_RESTART_COUNT:-0} < RESTARTS)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
