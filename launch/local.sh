#!/usr/bin/env bash
# Trains with several processes on this machine; arguments are those of `dsv3
# train`.
#
#   PROCESSES=2 DEVICES=4 RESTARTS=3 launch/local.sh --config=FILE --workdir=DIR
#
# PROCESSES  how many (1)
# DEVICES    of each (1): GPUs, or on a CPU as many that share its cores
# RESTARTS   how often the job may start again, from its last step, after a
#            process was killed, crashed or hung (0)
# PORT       of the first process (a free one)
# DSV3       the command (dsv3)
# DRY_RUN=1  prints what would be run
#
# One process that fails ends all. The exit code is that of the first to fail.
set -euo pipefail
set -m # a Ctrl-C reaches this script alone, which passes it on

PROCESSES=${PROCESSES:-1} DEVICES=${DEVICES:-1} RESTARTS=${RESTARTS:-0}
read -r -a dsv3 <<< "${DSV3:-dsv3}"
GRACE_SECONDS=5 # for the others to end by themselves
pids=()

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# start INDEX PORT ARGUMENTS: becomes one process.
start() {
  local index=$1 port=$2 ids
  shift 2
  ids=$(seq -s, $((index * DEVICES)) $(((index + 1) * DEVICES - 1)))
  local environment=(
    "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port"
    "JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port"
    "JAX_NUM_PROCESSES=$PROCESSES"
    "JAX_PROCESS_ID=$index"
    "JAX_NUM_CPU_DEVICES=$DEVICES"
    "JAX_LOCAL_DEVICE_IDS=$ids"
  )
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${environment[@]}" "${dsv3[@]}" train "$@"
    echo
    return
  fi
  exec env "${environment[@]}" "${dsv3[@]}" train "$@"
}

stop() {
  kill -s "$1" -- "${pids[@]/#/-}" 2> /dev/null || true
}

# run_job ARGUMENTS: all processes, until they have ended.
run_job() {
  local port=${PORT:-$(free_port)} code=0 index pid running left
  pids=()
  for ((index = 0; index < PROCESSES; index++)); do
    start "$index" "$port" "$@" &
    pids+=($!)
    echo "local.sh: process $index has pid $!" >&2
  done
  running=("${pids[@]}")
  while ((code == 0 && ${#running[@]})); do
    sleep 0.2
    left=()
    for pid in "${running[@]}"; do
      if kill -0 "$pid" 2> /dev/null; then
        left+=("$pid")
      elif ((code == 0)); then
        wait "$pid" || code=$?
      fi
    done
    running=("${left[@]}")
  done
  for ((index = 0; code && index < 5 * GRACE_SECONDS; index++)); do
    kill -0 "${pids[@]}" 2> /dev/null || break
    sleep 0.2
  done
  stop KILL
  wait "${pids[@]}" 2> /dev/null || true
  return "$code"
}

if [[ -n ${DRY_RUN:-} ]]; then
  for ((index = 0; index < PROCESSES; index++)); do
    start "$index" "${PORT:-PORT}" "$@"
  done
  exit
fi

stopping= # a job that gets a signal does not start again
trap 'stopping=1; stop TERM' TERM
trap 'stopping=1; stop INT' INT
trap 'stop KILL' EXIT

for ((attempt = 1; ; attempt++)); do
  code=0
  run_job "$@" || code=$?
  case $code in
    0 | 2 | 75 | 76 | 77) exit "$code" ;; # see docs/training.md, exit codes
  esac
  [[ -z $stopping ]] && ((attempt <= RESTARTS)) || exit "$code"
  echo "local.sh: a process ended with $code; restart $attempt of $RESTARTS" >&2
done
