# shellcheck shell=bash
# Sourced by the scripts of launch/, from the root of the repository.
#
#   run COMMAND...   prints a command, then runs it
#   become COMMAND   prints a command, then runs it in place of the script, to receive its signals
#   setup EXTRAS     installs the project with the named extras ("" or "data,dev") in .venv, pinned
#                    by constraints.txt; does nothing if neither the pins nor the folder changed
#   check_training_flags FLAGS   checks what slurm.sh and tpu_pod.sh pass to launch.train
#   quieten_tpu      keeps an installed libtpu from looking for a TPU
#
# ESPALIER_PYTHON names the Python for a new .venv; otherwise .python-version decides.

NEEDED=3.12
export PIP_DISABLE_PIP_VERSION_CHECK=1 # the pins decide, and pip's notice would look like a fault

show() {
  printf '+' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
}

run() {
  show "$@"
  "$@"
}

become() {
  show "$@"
  exec "$@"
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Prints "3.12.1" if $1 runs, else nothing: a shim may name a version that is not installed.
version_of() {
  "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null
}

is_new_enough() {
  "$1" -c "import sys; sys.exit(sys.version_info[:2] < tuple(map(int, '$NEEDED'.split('.'))))" \
    2>/dev/null
}

# Prints the first Python that is new enough.
find_python() {
  local wanted candidate version found="" prefix
  if [ -n "${ESPALIER_PYTHON:-}" ]; then
    set -- "$ESPALIER_PYTHON"
  else
    wanted="$(head -n 1 .python-version)"
    prefix="$(pyenv prefix "$wanted" 2>/dev/null)" || prefix=""
    set -- ${prefix:+"$prefix/bin/python"} "python$wanted" python3.12 python3.13 python3 python
  fi
  for candidate in "$@"; do
    version="$(version_of "$candidate")" || continue
    if is_new_enough "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
    found="$found${found:+, }$candidate is $version"
  done
  fail "Python >= $NEEDED is needed; found: ${found:-none}; install one or set ESPALIER_PYTHON to it"
}

make_venv() {
  local python
  if [ -x .venv/bin/python ]; then
    is_new_enough .venv/bin/python ||
      fail "Python >= $NEEDED is needed; .venv is $(version_of .venv/bin/python); remove .venv"
  else
    python="$(find_python)" || exit $?
    run "$python" -m venv .venv
  fi
  if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    run .venv/bin/python -m ensurepip
  fi
}

setup() {
  local extras="$1" target stamp state
  make_venv
  target=".${extras:+[$extras]}"
  stamp=".venv/.installed-${extras:-base}"
  state="$PWD $(cat pyproject.toml constraints.txt | cksum)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
    echo "Installing; this takes a minute or two the first time."
    run .venv/bin/python -m pip install --quiet -c constraints.txt -e "$target"
    printf '%s\n' "$state" >"$stamp"
  fi
  if [ "$extras" = "" ]; then
    echo "For a GPU: .venv/bin/python -m pip install -c constraints.txt -e '.[gpu]'  (TPU: '.[tpu]')"
  fi
  if ls .venv/.installed-*aot* >/dev/null 2>&1; then
    quieten_absent_devices
  fi
}

# The aot extra installs compilers for absent devices, which JAX should not look for.
quieten_absent_devices() {
  local device
  for device in /dev/accel0 /dev/vfio/0 /dev/nvidia0 /dev/dxg; do
    if [ -e "$device" ]; then
      return
    fi
  done
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
  quieten_tpu
}

# For machines without a TPU: libtpu does not query the metadata server, and every process of a node
# may load it. Never call it on a TPU, where JAX finds the other workers of the pod by that server.
quieten_tpu() {
  export TPU_SKIP_MDS_QUERY="${TPU_SKIP_MDS_QUERY:-1}"
  export TPU_WORKER_HOSTNAMES="${TPU_WORKER_HOSTNAMES:-localhost}"
  export TPU_ACCELERATOR_TYPE="${TPU_ACCELERATOR_TYPE:-v5litepod-4}"
  export ALLOW_MULTIPLE_LIBTPU_LOAD="${ALLOW_MULTIPLE_LIBTPU_LOAD:-1}"
}

# Reports mistakes in training flags before anything is queued or copied.
check_training_flags() {
  local flag config="" workdir=""
  for flag in "$@"; do
    case "$flag" in
      --config=?*) config="${flag#*=}" ;;
      --workdir=?*) workdir="${flag#*=}" ;;
      --processes* | --coordinator* | --num_processes* | --process_id*)
        fail "$flag: the launcher sets --processes=auto; drop it"
        ;;
      -?*) ;;
      *) fail "unexpected argument '$flag'; flags are written --name=value" ;;
    esac
  done
  if [ -z "$config" ]; then fail "missing flag --config; set --config=experiments/NAME.py"; fi
  if [ -z "$workdir" ]; then fail "missing flag --workdir; set --workdir=FOLDER"; fi
  case "$workdir" in
    *://*) fail "--workdir=$workdir is an address; name a folder that all processes share" ;;
  esac
}
