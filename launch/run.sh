#!/usr/bin/env bash
# Trains one config with any launcher; the stage scripts, quickstart.sh and slurm/stage.sbatch all end here.
#   launch/run.sh CONFIG [key=value ...]
#   TAGLLM_COMMAND  train (default); eval RUN and predict RUN INPUT OUTPUT are started over ranks in the same way
#   LAUNCHER   torchrun (default), deepspeed, or none: this process is one rank, or under srun one of several
#   RANKS      processes on this machine (default: one per GPU, one without); not for none
#   torchrun   NNODES (2, or 1:2 to go on with fewer), RDZV_ENDPOINT=HOST:PORT, RDZV_ID and RDZV_CONF for several
#              machines, LOCAL_ADDR where a machine's name does not lead to it; MAX_RESTARTS (default 0): after a
#              failure all ranks start again from the newest checkpoint
#   deepspeed  HOSTFILE for several machines (lines of HOST slots=RANKS; default: this one only), MASTER_PORT
#   LAUNCHER_ARGS  more arguments for torchrun or deepspeed, split at spaces
# OMP_NUM_THREADS is set to this machine's cores over RANKS, under srun to --cpus-per-task, unless it is given.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if (($# == 0)); then
    echo "error: launch/run.sh: no config given; it must be the first argument, as in configs/quickstart/2_function_qed.yaml" >&2
    exit 2
fi
if [[ -x $here/.venv/bin/python ]]; then PATH=$here/.venv/bin:$PATH; fi # ninja lies there too
export PATH TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
launcher=${LAUNCHER:-torchrun} command=${TAGLLM_COMMAND:-train}

there='from tagllm.gpus import main; main()'
if [[ ${DS_ACCELERATOR:-} == cpu ]]; then
    export CUDA_VISIBLE_DEVICES=
    there='import os; print(0, len(os.sched_getaffinity(0)))' # torch takes seconds to import
fi
read -r gpus cores < <(python -c "$there") || exit 2 # it said why
if ((gpus == 0)) && [[ -z ${HOSTFILE:-} ]]; then export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}; fi
slots=
if [[ -n ${HOSTFILE:-} ]]; then slots=$(grep -os 'slots=[0-9]*' "$HOSTFILE" | cut -d = -f 2 | sort -n | tail -n 1) || true; fi
ranks=${RANKS:-${slots:-$((gpus > 0 ? gpus : 1))}}
tasks=${SLURM_TASKS_PER_NODE:-1} # as in 2(x3),1
if [[ $launcher == none ]]; then
    ranks=1 # but for tasks of srun's
    if [[ -n ${SLURM_STEP_NUM_TASKS:-} ]]; then ranks=${tasks%%[(,]*}; fi
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-}} # the cores may be those of this task alone
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

read -r -a more <<<"${LAUNCHER_ARGS:-}"

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Of what is set here hosts are told nothing but what DeepSpeed finds in DS_ENV_FILE, by default in two files of the
# user's. Ours is gone from its folder before it is read, so that nothing is left to tidy up.
share_environment() {
    local file name to
    file=$(mktemp)
    exec {to}<>"$file"
    rm "$file"
    for name in OMP_NUM_THREADS TAGLLM_CACHE HF_HOME HF_HUB_OFFLINE DS_ACCELERATOR GLOO_SOCKET_IFNAME; do
        if [[ -n ${!name:-} ]]; then echo "$name=${!name}" >&"$to"; fi
    done
    grep -hs = ~/.deepspeed_env .deepspeed_env >&"$to" || true
    export DS_ENV_FILE=/dev/fd/$to
}

case $launcher in
torchrun)
    nodes=${NNODES:-1}
    where=(--standalone)
    if [[ $nodes != 1 || -n ${RDZV_ENDPOINT:-} ]]; then
        where=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-id "${RDZV_ID:-tagllm}"
            --rdzv-endpoint "${RDZV_ENDPOINT:?several machines need RDZV_ENDPOINT=HOST:PORT, the same on each}"
            --rdzv-conf "${RDZV_CONF:-}" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"})
    fi
    exec torchrun "${where[@]}" --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-0}" \
        "${more[@]}" -m tagllm "$command" "$@"
    ;;
deepspeed)
    # A hostfile that does not exist keeps the launcher on this machine, even on a cluster that has /job/hostfile.
    # One that is given says how many ranks each machine has (slots=N), unless RANKS does.
    where=(--hostfile "${HOSTFILE:-/dev/null}")
    if [[ -z ${HOSTFILE:-} || -n ${RANKS:-} ]]; then where+=(--num_accelerators "$ranks"); fi
    visible=${CUDA_VISIBLE_DEVICES:-}
    if [[ -n ${HOSTFILE:-} ]]; then
        if [[ -z ${DS_ENV_FILE:-} ]]; then share_environment; fi
    elif ((gpus > 0)) && [[ -n $visible ]]; then # given a number of GPUs it begins at 0, whichever are visible
        if [[ ! $visible =~ ^[0-9]+(,[0-9]+)*$ ]]; then
            echo "error: launch/run.sh: CUDA_VISIBLE_DEVICES is '$visible'; for the deepspeed launcher it must be" \
                "numbers, as in 2,3. Give these, or set LAUNCHER=torchrun" >&2
            exit 2
        fi
        if ((ranks > gpus)); then
            echo "error: launch/run.sh: RANKS is $ranks; it must be at most the number of GPUs, and with" \
                "CUDA_VISIBLE_DEVICES=$visible there are $gpus. Name more of them, or set RANKS=$gpus" >&2
            exit 2
        fi
        where=(--hostfile /dev/null --include "localhost:$(cut -d , -f "-$ranks" <<<"$visible")")
    fi
    # Not its script, which does not start in a folder whose path has a space.
    exec python -m deepspeed.launcher.runner --quiet "${where[@]}" --master_port "${MASTER_PORT:-$(free_port)}" \
        --no_local_rank "${more[@]}" --module tagllm "$command" "$@"
    ;;
none)
    if [[ -n ${SLURM_STEP_NUM_TASKS:-} && -z ${RANK:-} ]]; then # a task of srun's; a batch script is one process
        export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_WORLD_SIZE=$ranks
        export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
        if [[ -z ${MASTER_ADDR:-} ]] && command -v scontrol >/dev/null; then
            MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
        fi
        # In a container there is none; srun in a batch script starts on the first node, where rank 0 is.
        export MASTER_ADDR=${MASTER_ADDR:-$SLURM_LAUNCH_NODE_IPADDR}
    fi
    exec python -m tagllm "$command" "$@"
    ;;
*)
    echo "error: LAUNCHER is '$launcher'; it must be torchrun, deepspeed or none" >&2
    exit 2
    ;;
esac
