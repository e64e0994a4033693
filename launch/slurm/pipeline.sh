#!/usr/bin/env bash
# Submits the three stages, each after the one before has ended well, and prints the job numbers:
#   launch/slurm/pipeline.sh [sbatch options] -- "STAGE1.yaml [ANOTHER.yaml]" STAGE2.yaml STAGE3.yaml [key=value ...]
# A stage of several configs, in quotes, is as many jobs side by side. The overrides go to all of them.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
options=()
while (($#)) && [[ $1 != -- ]]; do
    options+=("$1")
    shift
done
if (($# < 4)); then
    sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
shift
stages=("$1" "$2" "$3")
shift 3
scripts=(stage1_domain stage2_function stage3_cross)
after=
for at in 0 1 2; do
    read -r -a configs <<<"${stages[at]}"
    jobs=
    for config in "${configs[@]}"; do
        # a stage that cannot come any more would wait in the queue for ever
        job=$(sbatch --parsable --kill-on-invalid-dep=yes "${options[@]}" ${after:+"--dependency=afterok$after"} --job-name="tagllm-${scripts[at]}" \
            "$here/stage.sbatch" "$here/../${scripts[at]}.sh" "$config" "$@")
        echo "${scripts[at]} $config: job ${job%%;*}"
        jobs+=:${job%%;*}
    done
    after=$jobs
done
