#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'EOF'
Trains on every worker of a Cloud TPU pod, from a machine with gcloud, and restarts after a
preemption.

  launch/tpu_pod.sh --name=POD --zone=ZONE [flags below] -- \
    --config=experiments/NAME.py --workdir=FOLDER --data_dir=FOLDER [flags of espalier train]

Copies the checkout to ~/espalier of every worker, sets up its .venv, starts espalier train there and
shows its output. Both FOLDERs must be on a file system that all workers mount at the same path,
such as NFS; espalier train cannot write to a gs:// address.

  --name=POD --zone=ZONE    the TPU; --project=PROJECT if it is not gcloud's default
  --repository=URL          workers fetch this repository instead of receiving the commit that is
                            checked out here; --ref=REF: its branch, tag or commit (default HEAD)
  --prepare=COMMAND         runs first on every worker: mount the file system, install Python 3.12
  --restart                 restart after a preemption or a failure, at most --retries=N times
                            (default 10), with --pause=SECONDS (default 60) between tries
  --recreate                with --restart: delete a TPU that is gone and create it again, with each
                            --create_flag=FLAG: --create_flag=--accelerator-type=v5litepod-16
                            --create_flag=--version=v2-alpha-tpuv5-lite --create_flag=--spot
  --dry-run                 print the commands, run nothing

With several workers, add the key to the agent: ssh-add ~/.ssh/google_compute_engine
Ctrl-C ends the connection. To save and stop a run: gcloud compute tpus tpu-vm ssh POD --zone=ZONE
--worker=all --command='pkill -TERM -f launch.train'

Exit status: 0 finished; 75 saved and stopped by hand, and the same command resumes it; 2 a mistake
in a command; 1 given up; without --restart, that of gcloud.
EOF
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh

name="" zone="" project="" repository="" ref=HEAD prepare=: retries=10 pause=60
restart=no recreate=no is_dry=no create_flags=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --help | -h) usage && exit 0 ;;
    --name=?*) name="${1#*=}" ;;
    --zone=?*) zone="${1#*=}" ;;
    --project=?*) project="${1#*=}" ;;
    --repository=?*) repository="${1#*=}" ;;
    --ref=?*) ref="${1#*=}" ;;
    --prepare=?*) prepare="${1#*=}" ;;
    --retries=?*) retries="${1#*=}" ;;
    --pause=?*) pause="${1#*=}" ;;
    --create_flag=--?*) create_flags+=("${1#*=}") ;;
    --restart) restart=yes ;;
    --recreate) recreate=yes ;;
    --dry-run) is_dry=yes ;;
    --config=* | --workdir=*) fail "$1 is a flag of espalier train; write it after --" ;;
    *) fail "unknown or empty flag '$1'; --help lists the flags" ;;
  esac
  shift
done
if [ -z "$name" ]; then fail "missing flag --name; set --name=POD"; fi
if [ -z "$zone" ]; then fail "missing flag --zone; set --zone=ZONE"; fi
case "$retries,$pause" in
  *[!0-9,]*) fail "--retries=$retries --pause=$pause: give whole numbers" ;;
esac
if [ $recreate = yes ] && [ $restart = no ]; then fail "--recreate needs --restart; set both"; fi
if [ $recreate = yes ] && [ ${#create_flags[@]} = 0 ]; then
  fail "--recreate needs what to create; set --create_flag=--accelerator-type=..."
fi
if [ $recreate = no ] && [ ${#create_flags[@]} != 0 ]; then
  fail "--create_flag=${create_flags[0]} without --recreate does nothing; set both"
fi
if [ -z "$repository" ] && [ "$ref" != HEAD ]; then
  fail "--ref=$ref needs --repository; set it, or check $ref out here"
fi
if [ $# = 0 ]; then fail "missing flags of espalier train; write them after --"; fi
shift
check_training_flags "$@"
data_dir="" config=""
for flag in "$@"; do
  case "$flag" in
    --config=*) config="${flag#*=}" ;;
    --workdir=/*) ;;
    --data_dir=/*) data_dir="$flag" ;;
    --workdir=* | --data_dir=*)
      fail "$flag is a different folder on each worker; give the path of one that all mount, /..."
      ;;
  esac
done
if [ -z "$data_dir" ]; then
  fail "missing flag --data_dir; set --data_dir=FOLDER on the file system that holds --workdir"
fi
if [ -z "$repository" ] && [ -n "$(git status --porcelain)" ]; then
  fail "$PWD has uncommitted changes, which workers would not get; commit them"
fi
if [ -z "$repository" ] && ! git ls-files --error-unmatch -- "${config%%:*}" >/dev/null 2>&1; then
  fail "--config=$config is not committed, so workers would not get it; add and commit it"
fi

tpu=(gcloud compute tpus tpu-vm)
place=("--zone=$zone")
if [ -n "$project" ]; then place+=("--project=$project"); fi
work="$(mktemp -d)"
trap 'rm -r "$work"' EXIT

act() {
  if [ $is_dry = yes ]; then show "$@" 2>&1; else run "$@"; fi
}

# Runs a bash script on all workers at once; the status is the first that is not 0. If a worker no
# longer answers, the connection ends instead of waiting forever.
on_workers() {
  act "${tpu[@]}" ssh "$name" "${place[@]}" --worker=all --ssh-flag=-oServerAliveInterval=30 \
    --command="set -euo pipefail; $1"
}

# Sends the checkout, sets it up and trains. libtpu is not quietened on a TPU, since JAX finds the
# other workers through the metadata server. Set-up is a separate command, since workers that start
# to train wait only minutes for each other.
start() {
  local source="$repository"
  if [ -z "$repository" ]; then
    source=../espalier.bundle
    act git bundle create "$work/espalier.bundle" HEAD || return
    act "${tpu[@]}" scp "$work/espalier.bundle" "$name:espalier.bundle" "${place[@]}" \
      --worker=all || return
  fi
  on_workers "$prepare; mkdir -p espalier; cd espalier; git init -q; \
git fetch -q $(printf '%q %q' "$source" "$ref"); git checkout -q --force --detach FETCH_HEAD; \
. launch/setup.sh; setup tpu" || return
  on_workers "cd espalier; . launch/setup.sh; \
become .venv/bin/python -m launch.train --processes=auto$(printf ' %q' "$@")" 2>&1 |
    tee "$work/output"
}

# Waits before the next try, or gives up after --retries.
wait_once() {
  tries=$((tries + 1))
  if [ $tries -gt "$retries" ]; then
    echo "error: given up after --retries=$retries: $1" >&2
    exit 1
  fi
  echo "$1; try $tries of $retries in $pause seconds" >&2
  sleep "$pause"
}

state() {
  "${tpu[@]}" describe "$name" "${place[@]}" --format='value(state)' || true # "": no such TPU
}

wait_until_ready() {
  local found
  while true; do
    found="$(state)"
    case "$found" in
      READY) return ;;
      PREEMPTED | TERMINATED | STOPPED | "")
        if [ $recreate = no ] && [ -n "$found" ]; then
          echo "error: $name is $found; create it again and run the same command, or set" \
            "--recreate" >&2
          exit 1
        fi
        if [ $recreate = yes ]; then
          if [ -n "$found" ]; then
            run "${tpu[@]}" delete "$name" "${place[@]}" --quiet || true
          fi
          if run "${tpu[@]}" create "$name" "${place[@]}" "${create_flags[@]}"; then return; fi
        fi
        ;;
    esac
    wait_once "$name is ${found:-not found}"
  done
}

tries=0
while true; do
  : >"$work/output"
  status=0
  start "$@" || status=$?
  if [ $is_dry = yes ] || [ $restart = no ] || [ $status = 0 ] || [ $status = 2 ]; then
    exit $status
  fi
  # espalier train ends with 75 if a process was lost, or if a signal stopped it, which a preemption
  # or a person sent.
  stopped="$(grep -o 'stopped at step [0-9]*, saved' "$work/output" | head -n 1)" || true
  wait_once "${stopped:-ended with status $status}"
  if [ $status = 75 ] && [ -n "$stopped" ] && [ "$(state)" = READY ]; then
    exit 75
  fi
  wait_until_ready
done
