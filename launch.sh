#!/usr/bin/env bash
# The one command of this repository: trains a recipe, compares ZeRO stages, or runs the tests. It prints the
# deepspeed command of a run.
set -euo pipefail
export PYTHONUTF8=1 # where the locale is not UTF-8, files still are, those of the libraries too

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # so that `python -m lib...` works from any folder

fail() {
  echo "error: $*" >&2
  exit 2
}

usage() {
  cat <<EOF
./launch.sh <recipe> [options] [recipe settings]   train
./launch.sh <recipe> --help                        the recipe's settings
./launch.sh compare <recipe> [--help]              run it at several ZeRO stages, and report its costs and losses
./launch.sh test [--quick|--all] [pytest arguments]   linter, type checker, tests (--quick: no ranks; --all: every case)
./launch.sh search <run> "words" [--top N]         search the documents that a run of semantic_search has indexed
./launch.sh chat <run|model> [--help]              talk to a model; --prompt "..." for one answer
./launch.sh generate <run|model> --input FILE --output FILE   answer every row of a file [--help]
./launch.sh merge <run> [--help]                   put the LoRA adapter of a run into its model
./launch.sh export <run|model> --gguf FILE         write a model for llama.cpp [--help]
./launch.sh export <run> [--checkpoint STEP]       make the model of a checkpoint, also of a run that has died
./launch.sh results [--help]                       run every recipe, and make the README's table of scores
./launch.sh check --hostfile FILE                  look at the machines of a hostfile, before a run on several
./launch.sh torture <recipe> [--help]              kill it, stop it, fill its disk, resume it (an hour)
./launch.sh gpu_check [--minutes 8] [--help]       all that only a GPU can tell: MFU, the contract in bf16, memory
./launch.sh --help                                 this text

options:
  --stage 0|1|2|3    ZeRO stage: takes ds_configs/<recipe>/zero<stage>.json (default: 2,
                     or 1 where the recipe has no 2)
  --ds_config FILE   any DeepSpeed JSON instead; also a name from ds_configs/<recipe>, such as zero3_offload
  --ranks N          processes, one a GPU (default: all GPUs, or 2 on a CPU)
  --restarts N       after a fault (a killed rank, say), start again from the newest checkpoint, up to N times
  --nodes M --node_rank N --master HOST:PORT   on each of M machines, which train together (docs/machines.md): N is
                     its number, from 0 up; HOST the machine with number 0, PORT a free port there
  --min_nodes N      with --restarts: start again also without machines that have gone, if N are left
  --hostfile FILE    start it on every machine of the file, by ssh; --include or --exclude HOSTS, --env NAME=VALUE
  --dry_run          print the deepspeed command and stop
  --quick            a run of a few seconds, with the settings of the YAML's 'quick:' section

recipe settings win over recipes/<recipe>.yaml, for example: --learning_rate 1e-4 --max_steps 100 --run_dir runs/try
--run_dir runs/try --resume goes on with that run. Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and stop it;
a second one ends it at once.

exit codes: 0 finished; 75 stopped as asked, and saved; 2 a mistake, said in one line; 128 + signal: stopped before
            training; else a fault, after which --resume goes on from the newest checkpoint

recipes: $(recipes)
EOF
}

recipes() {
  local found=()
  for yaml in "$root"/recipes/*.yaml; do
    found+=("$(basename "$yaml" .yaml)")
  done
  echo "${found[*]}"
}

# `; did you mean 'x'?` for the nearest recipe or command, if one is near.
did_you_mean() {
  local commands="compare test search chat generate merge export results torture gpu_check check"
  # shellcheck disable=SC2046,SC2086 # names without spaces
  python3 - "$1" $(recipes) $commands <<'EOF' 2>/dev/null || true
import difflib, sys
for near in difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1, 0.6):
    print(f"; did you mean '{near}'?", end="")
EOF
}

# True where the Python $1 has all that the requirements name. Other versions than those pinned are used as they are
# and named, for the driver decides which torch a machine can have; DeepSpeed alone must be the pinned one, whose
# behaviour was measured.
satisfied() {
  cat "$root"/requirements*.txt | "$1" -c '
import importlib.metadata, re, sys
differs = []
for line in sys.stdin:
    pinned = re.match(r"([\w.-]+)==([\w.]+)", line)
    if pinned:
        name, wanted = pinned.groups()
        found = importlib.metadata.version(name).split("+")[0]  # raises where it is missing
        if found != wanted:
            differs.append(f"{name} {found} ({wanted})")
            if name == "deepspeed":
                sys.exit(1)
if sys.version_info < (3, 11):
    sys.exit(1)
if differs:
    print("note: other versions than the tested ones: " + ", ".join(differs))
' 2>/dev/null
}

install() {
  "$python" -m pip install --disable-pip-version-check "$@" | sed -un 's/^Collecting \([^ ]*\).*/  \1/p'
}

# Sets $bin to the folder of an environment that has what is needed: the active one, or .venv, made at the first call.
environment() {
  local active
  active=$(command -v python3 || true)
  [ -n "$active" ] || fail "there is no python3; install Python 3.11 or newer"
  if satisfied "$active"; then
    bin=$("$active" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
    python=$active
    return
  fi
  bin=$root/.venv/bin
  python=$bin/python
  if [ -x "$python" ] && satisfied "$python"; then
    return
  fi
  make_environment "$active" 9>"$root/.venv.lock"
}

# Makes .venv by the Python $1, once, although every node of a cluster may be started in a shared checkout. The lock is
# file 9; where there is no flock command (macOS), or the disk has no locks, it goes without.
make_environment() {
  local active=$1 answer=0
  flock -n 9 2>/dev/null || answer=$?
  if [ "$answer" = 1 ]; then
    echo "Waiting until another launch.sh has installed the requirements into .venv ..."
    flock 9
  fi
  if [ -x "$python" ] && satisfied "$python"; then
    return
  fi
  "$active" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "python3 is $("$active" -V), but 3.11 or newer is needed"
  echo "Installing the requirements into .venv (once; a few minutes and a few GB) ..."
  "$active" -m venv "$root/.venv" || fail "cannot make .venv; on Debian and Ubuntu: apt install python3-venv"
  install -r "$root/requirements.txt"
  install --no-deps -r "$root/requirements-no-deps.txt"
  satisfied "$python" || fail "the installation did not succeed; see: $python -m pip install -r requirements.txt"
}

run_tests() {
  cd "$root"
  case "${1:-}" in
    --quick) shift; set -- -m "not slow" "$@" ;;
    --all) shift; export TEST_ALL=yes ;;
  esac
  "$bin/ruff" check .
  "$bin/ruff" format --check .
  "$bin/mypy"
  "$bin/shellcheck" launch.sh .ci/run docs/story.sh docs/cluster/slurm.sbatch
  "$python" -m pytest "$@"
}

main() {
  local argument
  for argument in "$@"; do
    case "$argument" in
      --hostfile | --hostfile=*) environment; exec "$python" -P -m lib.launch.hosts "$@" ;;
    esac
  done
  case "${1:-}" in
    --help | -h | "") usage; exit 0 ;;
    test) shift; environment; run_tests "$@"; exit 0 ;;
    torture) shift; environment; exec "$python" "$root/tests/by_hand/torture.py" "$@" ;;
    check) fail "./launch.sh check needs --hostfile FILE" ;;
    gpu_check)
      shift
      environment
      export PYTHONPATH=$PYTHONPATH:$root/tests/contract
      exec "$python" "$root/tests/by_hand/gpu_check.py" "$@"
      ;;
    search) shift; environment; exec "$python" -P -m lib.scores.search "$@" ;;
    chat | generate | merge | export)
      local command=$1
      shift
      environment
      exec "$python" -P -m "lib.launch.$command" "$@"
      ;;
    results) shift; environment; exec "$python" -P -m lib.launch.scoreboard "$@" ;;
    compare)
      shift
      environment
      # -P for the ranks too, which `python -m` would let find modules in the current folder
      PYTHONSAFEPATH=1 exec "$python" -m lib.compare.compare "$@"
      ;;
    -*) fail "the recipe comes first: ./launch.sh <recipe> [options]; recipes: $(recipes)" ;;
  esac
  local recipe=${1%.py}
  recipe=${recipe#recipes/}
  shift
  [ -f "$root/recipes/$recipe.py" ] ||
    fail "there is no recipes/$recipe.py$(did_you_mean "$recipe"); recipes: $(recipes)"

  local stage="" ds_config="" ranks="" restarts=0 dry_run="" help="" settings=()
  local nodes="" node_rank="" master="" min_nodes=""
  while [ $# -gt 0 ]; do
    case "$1" in
      --stage=* | --ds_config=* | --ranks=* | --restarts=* | --nodes=* | --node_rank=* | --master=* | \
        --min_nodes=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        ;;
      --stage | --ds_config | --ranks | --restarts | --nodes | --node_rank | --master | --min_nodes)
        [ $# -ge 2 ] || fail "$1 needs a value"
        declare "${1#--}=$2"
        shift 2
        ;;
      --dry_run) dry_run=yes; shift ;;
      --help | -h) help=yes; shift ;;
      *) settings+=("$1"); shift ;;
    esac
  done

  ds_config=${ds_config/#\~\//$HOME/} # as the shell would, were it not for --ds_config=~/x.json
  local folder=$root/ds_configs/$recipe
  if [ -n "$stage" ] && [ -n "$ds_config" ]; then
    fail "--stage $stage and --ds_config $ds_config both choose a DeepSpeed config; give one of them"
  elif [ -z "$ds_config" ]; then
    case "${stage:-2}" in 0 | 1 | 2 | 3) ;; *) fail "--stage is $stage; it must be 0, 1, 2 or 3" ;; esac
    if [ -z "$stage" ] && [ ! -f "$folder/zero2.json" ] && [ -f "$folder/zero1.json" ]; then
      stage=1
    fi
    ds_config=$folder/zero${stage:-2}.json
  elif [ ! -f "$ds_config" ] && [ -f "$folder/${ds_config%.json}.json" ]; then
    ds_config=$folder/${ds_config%.json}.json
  fi
  [ -f "$ds_config" ] ||
    fail "there is no $ds_config; in ds_configs/$recipe: $(cd "$folder" 2>/dev/null && echo *.json)"

  environment
  if [ -n "$help" ]; then
    exec "$python" -P -m lib.launch.preflight "$root/recipes/$recipe.py" --help
  fi
  [[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts is $restarts; it must be a whole number"
  local machines=() found options
  [ -z "$nodes$node_rank$master$min_nodes" ] || machines=("$nodes" "$node_rank" "$master" "$min_nodes")
  found=$("$python" -P -m lib.launch.preflight "$root/recipes/$recipe.py" "$ranks" "${machines[*]+several}" \
    ${settings[@]+"${settings[@]}"})
  read -ra options <<<"$found" # the accelerator, then options for deepspeed
  [[ $found != *$'\n'* ]] || machines+=("${found#*$'\n'}") # a mistake that the other machines are told too
  # Batches are of many lengths: without it, what one length leaves free does not fit the next.
  export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}
  [ "${options[0]}" = cuda ] || export DS_ACCELERATOR=${DS_ACCELERATOR:-${options[0]}} # DeepSpeed need not look again

  exec "$python" -P -m lib.launch.supervise \
    "$recipe-$(basename "$ds_config" .json)" "$root/recipes/$recipe.yaml" "$restarts" "$dry_run" \
    ${machines[@]+"${machines[@]}"} \
    -- "$bin/deepspeed" "${options[@]:1}" "$root/recipes/$recipe.py" \
    --deepspeed_config "$ds_config" ${settings[@]+"${settings[@]}"}
}

main "$@"
