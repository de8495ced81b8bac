#!/usr/bin/env bash
# Trains on all hosts of a TPU pod slice, where the project is installed;
# arguments are those of `dsv3 train`.
#
#   TPU=NAME ZONE=ZONE launch/tpu_pod.sh --config=FILE --workdir=DIR
#
# FOLDER     of the project on each host (dsv3-jax)
# DSV3       the command there (.venv/bin/dsv3)
# DRY_RUN=1  prints the command instead of running it
#
# DIR is on a file system that all hosts share. Run it again to resume.
set -euo pipefail

printf -v line ' %q' train --cluster "$@"
line="cd ${FOLDER:-dsv3-jax} && ${DSV3:-.venv/bin/dsv3}$line"
command=(
  gcloud compute tpus tpu-vm ssh "${TPU:?is the name of the slice}"
  "--zone=${ZONE:?is where the slice is}" --worker=all "--command=$line"
)
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  exit
fi
exec "${command[@]}"
