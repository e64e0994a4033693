#!/usr/bin/env bash
# One experiment from raw data to tables, at SmolLM2's size:  launch/experiment.sh NAME [FOLDER OF RAW DATA]
# NAME: qed  descriptor  isoelectric_point  molecular_weight  binding_affinity  drug_combination  synergy_loewe  translate
# Without a folder, rows are those that were prepared before (or the proteins of Debian's mmseqs2-examples).
# Runs go to runs/offline/, the tables to OUT, runs/offline/reports/NAME/ (report.md, report.json, report.html). What is finished
# is not done again. In the environment, to change what runs:
#   SEEDS=3 JOBS=1 OUT=FOLDER
#   TUNE="optim.tag_lr=3e-3,1e-2,3e-2"   all seeds at the rate that is best on validation
#   ABLATE=1                             the first seed without each tag, with its rows reordered, swapped
#   VARIANTS=1                           all seeds of its ablations too (configs/variants/): no tag, digits, domain as text
#   BACKBONE=FOLDER                      another LLM; its runs and tables go to runs/offline-NAME OF THE FOLDER/
#   CONFIGS=paper                        the configs for LLaMA-7B, on the paper's data
#   BASELINES="prompt_tuning lora"       methods that are trained on the same rows; lora_text has the domain as text, too
# A method of BASELINES trains for BUDGET_S seconds for each seed, and half of them for each of three to five rates; passes over the
# rows come on top. Unless given it is as long as a run, where that is asked for qed or the paper's configs, else 600; its heads are
# fitted on FIT_ROWS rows: for these all, else 2000. Pairs of drugs: one seed, 1000 rows (an experiment is to fit in two hours of two
# cores); with whole proteins (binding_affinity): prompt tuning alone, one seed, 512 rows.
set -euo pipefail
unset CDPATH
data=${2:+$(realpath -m -- "$2")}
if [[ -d ${BACKBONE:-} ]]; then BACKBONE=$(realpath -- "$BACKBONE"); fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

name=${1:?"name an experiment: qed, descriptor, isoelectric_point, molecular_weight, binding_affinity, drug_combination, synergy_loewe, translate"}
set=${CONFIGS:-offline} seeds=${SEEDS:-3} jobs=${JOBS:-1} tune=${TUNE:-} ablate=${ABLATE:-} variants=
root=runs/$set${BACKBONE:+-$(basename -- "$BACKBONE")}
if [[ ! $root =~ ^[A-Za-z0-9._/-]+$ ]]; then
    echo "experiment: $root would be the folder of its runs; give BACKBONE a link whose name has letters, digits, . _ and - alone" >&2
    exit 2
fi
out=${OUT:-$root/reports/$name}
# Whole proteins make a step and a pass of what has no prefix to remember slow: one method there, one seed, few rows to fit.
compared=${BASELINES-prompt_tuning lora} fit_rows=${FIT_ROWS:-2000} compared_seeds=$seeds budget_s=${BUDGET_S:-600}
case $set/$name in
*/translate) compared='' ;; # has no head
paper/* | */qed) budget_s=${BUDGET_S:-} fit_rows=${FIT_ROWS:-} ;;
*/drug_combination | */synergy_loewe) fit_rows=${FIT_ROWS:-1000} compared_seeds=1 ;;
*/binding_affinity) compared=${BASELINES-prompt_tuning} fit_rows=${FIT_ROWS:-512} compared_seeds=1 ;;
esac
read -r -a methods <<<"$compared"
if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; else python=python3; fi
tagllm() { "$python" -m tagllm "$@"; }

# prepare NAME FOLDER; without a folder, what was prepared before.
prepare() { tagllm prepare "$1" ${2:+--from "$2"}; }

# config NAME: its path; for another backbone that of a copy whose runs go elsewhere.
config() {
    local file=configs/$set/$1.yaml
    if [[ $root != "runs/$set" ]]; then
        mkdir -p "$root/configs"
        sed "s#runs/$set/#$root/#g" "$file" >"$root/configs/$1.yaml"
        file=$root/configs/$1.yaml
    fi
    printf '%s' "$file"
}

# Stage 1: the domain tags that the experiment loads, and its rows.
proteins=/usr/share/doc/mmseqs2/example-data
[[ -e $proteins ]] || proteins=
rows='' domains=()
case $name in
qed) stage=2_qed domains=(1_smiles) ;;
descriptor | isoelectric_point) stage=2_$name domains=(1_protein) && proteins=${data:-$proteins} ;;
molecular_weight) stage=2_$name domains=(1_protein 1_smiles) && proteins=${data:-$proteins} ;;
binding_affinity) stage=3_$name domains=(1_protein 1_smiles) rows=davis ;;
drug_combination | synergy_loewe) stage=3_$name domains=(1_smiles) rows=oneil ;;
translate) stage=3_translate domains=(1_languages) rows=libreoffice-help ;;
*) echo "experiment: $name is none of them; the first lines of $0 name all" >&2 && exit 2 ;;
esac
if [[ ! -f configs/$set/$stage.yaml ]]; then echo "experiment: configs/$set has no $stage.yaml" >&2 && exit 2; fi
if [[ -n ${VARIANTS:-} ]]; then
    variants=configs/variants/$name.yaml
    if [[ $set == paper ]]; then variants=configs/variants/paper_$name.yaml; fi
    if [[ ! -f $variants ]]; then echo "experiment: there is no $variants; run it without VARIANTS" >&2 && exit 2; fi
fi
case $set/$name in # the hub has the others
paper/binding_affinity) rows=bindingdb-patent ;;
paper/drug_combination) rows=drugcomb-css ;;
paper/translate) rows='' ;;
esac
if [[ -n $rows ]]; then
    prepare "$rows" "$data"
elif [[ $set == paper && -n $data ]]; then
    echo "experiment: rows of $name come from the hub; a copy of it is for: tagllm prepare NAME --from FOLDER" >&2 && exit 2
fi
if [[ $name == molecular_weight ]]; then prepare peptides "$proteins"; fi
if [[ $set == offline && " ${domains[*]} " == *" 1_protein "* ]]; then prepare mmseqs-proteins "$proteins"; fi
backbone=(${BACKBONE:+"backbone.model=$BACKBONE"})
for domain in "${domains[@]}"; do
    tagllm train "$(config "$domain")" "${backbone[@]}"
    if [[ ! -f $root/$domain/results.json ]]; then tagllm eval "$root/$domain"; fi
done

# Stages 2 and 3: every seed; what is trained on the same rows, in the first one's folder; prompts without training.
runs=("$root/$stage")
tagllm sweep "$(config "$stage")" "${backbone[@]}" ${variants:+--variants "$variants"} --seeds "$seeds" --jobs "$jobs" \
    ${tune:+--tune "$tune"}
key=${tune%%=*} # what the sweep varies is in the name of what it writes
folders=$("$python" -c 'import json, sys; print(*json.load(open(sys.argv[1]))["combinations"][0]["folders"], sep="\n")' \
    "${runs[0]}/sweep${variants:+_variant}${key:+_$key}.json")
mapfile -t of_seeds <<<"$folders"
if [[ -n $ablate ]]; then tagllm eval "${runs[0]}/${of_seeds[0]}" --ablate; fi # tags taken out, reordered, swapped
if ((${#methods[@]})); then
    tagllm baseline "${runs[0]}/${of_seeds[0]}" "${methods[@]/#/--method=}" --seeds "$compared_seeds" --jobs "$jobs" \
        ${fit_rows:+--fit-rows "$fit_rows"} ${budget_s:+--budget-s "$budget_s"}
fi
prompts=4_$name
if [[ -f configs/$set/$prompts.yaml ]]; then
    libraries=$(printf "$root/%s/library, " "${domains[@]}") composed=$root/$prompts${key:+_$key}
    for run in "${of_seeds[@]}"; do
        tagllm compose "$(config "$prompts")" "${backbone[@]}" "libraries=[$libraries${runs[0]}/$run/library]" "output=$composed/seed=${run##*seed=}"
    done
    runs+=("$composed")
fi
exec "$python" -m tagllm report "${runs[@]}" "${domains[@]/#/$root/}" --out "$out"
