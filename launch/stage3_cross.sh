#!/usr/bin/env bash
# Stage 3, a function tag across domains: launch/stage3_cross.sh [CONFIG.yaml] [key=value ...]
# CONFIG is the quickstart's unless given; launchers and their variables stand in launch/run.sh.
set -euo pipefail
here=$(dirname -- "${BASH_SOURCE[0]}")
if [[ ${1:-} != *.y*ml ]]; then set -- "$here/../configs/quickstart/3_cross_affinity.yaml" "$@"; fi
exec bash "$here/run.sh" "$@"
