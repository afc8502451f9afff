#!/usr/bin/env bash
#SBATCH --job-name=espalier
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -euo pipefail

usage() {
  cat <<'EOF'
Trains on a Slurm cluster; a run that reaches its time limit is saved, requeued and resumed.

  sbatch --nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --time=04:00:00 launch/slurm.sh \
    --config=experiments/NAME.py --workdir=FOLDER [flags of espalier train]
  launch/slurm.sh --dry-run --config=... --workdir=...      prints the commands, runs nothing

Submit from the root of the checkout. The checkout, its .venv and FOLDER must be on a file system
that all nodes share. On GPUs, ask for one task per GPU; without GPUs, for one task per node.

  sbatch --signal=B:TERM@600 --export=ALL,ESPALIER_GRACE=580 ...   more seconds for a large save

Exit status: that of espalier train. After a SIGTERM the job is requeued and the status is 0, unless
training has finished (0) or ended with a mistake (2).
EOF
}

if [ -n "${SLURM_JOB_ID:-}" ]; then
  root="${SLURM_SUBMIT_DIR:-$PWD}" # Slurm runs a copy of this file
else
  root="$(dirname "${BASH_SOURCE[0]}")/.."
fi
cd "$root"
if [ ! -f launch/setup.sh ]; then
  echo "error: $PWD is not the root of a checkout; run sbatch there" >&2
  exit 2
fi
. launch/setup.sh

is_dry=no
for argument in "$@"; do
  shift
  case "$argument" in
    --help | -h) usage && exit 0 ;;
    --dry-run) is_dry=yes ;;
    *) set -- "$@" "$argument" ;;
  esac
done
check_training_flags "$@"
grace="${ESPALIER_GRACE:-100}"
case "$grace" in
  *[!0-9]*) fail "ESPALIER_GRACE=$grace is not a number of seconds" ;;
esac
grace=$((10#$grace)) # 090 is ninety, not an octal number

# One process per GPU: JAX gives a process that it finds under Slurm the GPU of its rank on the
# node, and only that one. It picks it from all GPUs of the node, so Slurm must hide none.
gpus="${SLURM_GPUS_ON_NODE:-0}"
gpus="${gpus%%[!0-9]*}" # "8(x2)" is 8 on each of two nodes
if [ -n "${SLURM_GPUS_PER_TASK:-}" ]; then
  fail "--gpus-per-task hides GPUs from processes; submit with --gpus-per-node=$gpus instead"
fi
if [ "${gpus:-0}" -gt 0 ] && [ "${SLURM_NTASKS_PER_NODE:-1}" != "$gpus" ]; then
  fail "--ntasks-per-node=${SLURM_NTASKS_PER_NODE:-1} and $gpus GPUs on a node; submit with" \
    "--ntasks-per-node=$gpus"
fi

# When a whole job is preempted, Slurm signals the processes as well as this script, and srun then
# passes on a second SIGTERM, which would end them before they have saved. With SIGTERM ignored from
# the start, only the first one counts: espalier train saves and stops.
command=(srun --kill-on-bad-exit=1)
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then # srun does not inherit it from sbatch
  command+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
fi
# shellcheck disable=SC2016 # for the inner shell
command+=(sh -c 'trap "" TERM; exec "$@"' sh)
command+=(.venv/bin/python -m launch.train --processes=auto "$@")

if [ $is_dry = yes ]; then
  show "${command[@]}" 2>&1
  echo "on SIGTERM: kill -TERM to srun, wait $grace seconds at most, scontrol requeue the job"
  exit 0
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
  fail "not in a Slurm job; submit with sbatch [options] launch/slurm.sh ..., or set --dry-run"
fi
if [ ! -x .venv/bin/python ]; then
  fail "$PWD/.venv is missing; make it once, on a node with network:" \
    "bash -c '. launch/setup.sh && setup gpu'"
fi
quieten_tpu

stopping=no
stop() {
  if [ $stopping = no ]; then
    stopping=yes
    echo "SIGTERM: saving" >&2
    kill -TERM "$srun" 2>/dev/null || true # srun passes it on to every process
  fi
}

show "${command[@]}"
"${command[@]}" &
srun=$!
trap stop TERM
status=0
wait "$srun" || status=$? # a trapped signal ends this wait, not srun
if [ $stopping = no ]; then
  exit $status
fi

for ((second = 0; second < grace; second++)); do
  kill -0 "$srun" 2>/dev/null || break
  sleep 1
done
status=0
is_late=no
if kill -0 "$srun" 2>/dev/null; then
  is_late=yes
  echo "not stopped within $grace seconds; the last checkpoint counts" >&2
else
  wait "$srun" || status=$?
fi
case $status in # anything else is requeued: 75 (UNFINISHED), or a save that took too long
  0) [ $is_late = yes ] || exit 0 ;;
  2) exit 2 ;; # a mistake, reported above; requeueing would repeat it
esac
# A cancelled job must stay cancelled, and Slurm itself requeues a preempted one.
if scontrol --oneliner show job "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
  run scontrol requeue "$SLURM_JOB_ID"
fi
