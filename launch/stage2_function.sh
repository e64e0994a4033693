#!/usr/bin/env bash
# Stage 2, a function tag on one domain: launch/stage2_function.sh [CONFIG.yaml] [key=value ...]
# CONFIG is the quickstart's unless given; launchers and their variables stand in launch/run.sh.
set -euo pipefail
here=$(dirname -- "${BASH_SOURCE[0]}")
if [[ ${1:-} != *.y*ml ]]; then set -- "$here/../configs/quickstart/2_function_qed.yaml" "$@"; fi
exec bash "$here/run.sh" "$@"
