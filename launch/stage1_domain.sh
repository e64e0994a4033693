#!/usr/bin/env bash
# Stage 1, a domain tag: launch/stage1_domain.sh [CONFIG.yaml] [key=value ...]
# CONFIG is the quickstart's unless given; launchers and their variables stand in launch/run.sh.
set -euo pipefail
here=$(dirname -- "${BASH_SOURCE[0]}")
if [[ ${1:-} != *.y*ml ]]; then set -- "$here/../configs/quickstart/1_domain_smiles.yaml" "$@"; fi
exec bash "$here/run.sh" "$@"
