#!/usr/bin/env bash
# One experiment from raw data to tables, at SmolLM2's size:  launch/experiment.sh NAME [FOLDER OF RAW DATA]
# NAME: qed  descriptor  isoelectric_point  molecular_weight  binding_affinity  drug_combination  synergy_loewe  translate
# Without a folder, rows are those that were prepared before (or the proteins of Debian's mmseqs2-examples).
# The tables go to results/NAME/ (report.md, report.json, report.html). What is finished is not done again.
# SEEDS=3 JOBS=1 TUNE="optim.tag_lr=3e-3,1e-2,3e-2" BASELINES="prompt_tuning lora" ABLATE=1 BACKBONE=FOLDER in the environment
# change what runs. A method of BASELINES trains for BUDGET_S seconds for each seed, and half of them for each of three to five
# rates; passes over the rows come on top. Unless given it is as long as a run for qed, where that is asked, else 600; its heads are
# fitted on FIT_ROWS rows: for qed all, else 2000. With whole proteins (binding_affinity): prompt tuning, one seed, 512 rows.
set -euo pipefail
unset CDPATH
data=${2:+$(realpath -m -- "$2")}
if [[ -d ${BACKBONE:-} ]]; then BACKBONE=$(realpath -- "$BACKBONE"); fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

name=${1:?"name an experiment: qed, descriptor, isoelectric_point, molecular_weight, binding_affinity, drug_combination, synergy_loewe, translate"}
seeds=${SEEDS:-3} jobs=${JOBS:-1} tune=${TUNE:-} ablate=${ABLATE:-} out=${OUT:-results/$name}
backbone=(${BACKBONE:+"backbone.model=$BACKBONE"})
# Whole proteins make a step and a pass of what has no prefix to remember slow: one method there, one seed, few rows to fit.
compared=${BASELINES-prompt_tuning lora} fit_rows=${FIT_ROWS:-2000} compared_seeds=$seeds budget_s=${BUDGET_S:-600}
case $name in
qed) budget_s=${BUDGET_S:-} fit_rows=${FIT_ROWS:-} ;;
binding_affinity) compared=${BASELINES-prompt_tuning} fit_rows=${FIT_ROWS:-512} compared_seeds=1 ;;
translate) compared= ;; # has no head
esac
read -r -a methods <<<"$compared"
if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; else python=python3; fi
tagllm() { "$python" -m tagllm "$@"; }

# prepare NAME FOLDER; without a folder, what was prepared before.
prepare() { tagllm prepare "$1" ${2:+--from "$2"}; }

# Stage 1: the domain tags that the experiment loads, and its rows.
proteins=/usr/share/doc/mmseqs2/example-data
[[ -e $proteins ]] || proteins=
domains=()
case $name in
qed) config=2_qed domains=(1_smiles) ;;
descriptor | isoelectric_point) config=2_$name domains=(1_protein) && proteins=${data:-$proteins} ;;
molecular_weight)
    config=2_$name domains=(1_protein 1_smiles) && proteins=${data:-$proteins}
    prepare peptides "$proteins"
    ;;
binding_affinity) config=3_$name domains=(1_protein 1_smiles) && prepare davis "$data" ;;
drug_combination | synergy_loewe) config=3_$name domains=(1_smiles) && prepare oneil "$data" ;;
translate) config=3_translate domains=(1_languages) && prepare libreoffice-help "$data" ;;
*) echo "experiment: $name is none of them; the first lines of $0 name all" >&2 && exit 2 ;;
esac
if [[ " ${domains[*]} " == *" 1_protein "* ]]; then prepare mmseqs-proteins "$proteins"; fi
for domain in "${domains[@]}"; do tagllm train "configs/offline/$domain.yaml" "${backbone[@]}"; done

# Stages 2 and 3: every seed; what is trained on the same rows, in the first one's folder; prompts without training.
runs=("runs/offline/$config")
tagllm sweep "configs/offline/$config.yaml" "${backbone[@]}" --seeds "$seeds" --jobs "$jobs" ${tune:+--tune "$tune"}
key=${tune%%=*} # what the sweep varies is in the name of what it writes
folders=$("$python" -c 'import json, sys; print(*json.load(open(sys.argv[1]))["combinations"][0]["folders"], sep="\n")' \
    "${runs[0]}/sweep${key:+_$key}.json")
mapfile -t of_seeds <<<"$folders"
if [[ -n $ablate ]]; then tagllm eval "${runs[0]}/${of_seeds[0]}" --ablate; fi # tags taken out, reordered, swapped
if ((${#methods[@]})); then
    tagllm baseline "${runs[0]}/${of_seeds[0]}" "${methods[@]/#/--method=}" --seeds "$compared_seeds" --jobs "$jobs" \
        ${fit_rows:+--fit-rows "$fit_rows"} ${budget_s:+--budget-s "$budget_s"}
fi
composed=configs/offline/4_$name.yaml prompts=runs/offline/4_$name${key:+_$key}
if [[ -f $composed ]]; then
    libraries=$(printf 'runs/offline/%s/library, ' "${domains[@]}")
    for run in "${of_seeds[@]}"; do
        tagllm compose "$composed" "${backbone[@]}" "libraries=[$libraries${runs[0]}/$run/library]" "output=$prompts/seed=${run##*seed=}"
    done
    runs+=("$prompts")
fi
exec "$python" -m tagllm report "${runs[@]}" --out "$out"
