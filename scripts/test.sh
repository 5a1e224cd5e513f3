#!/usr/bin/env bash
# Sets up .venv if need be and runs the tests; arguments go to pytest (for example: -m slow, or -k sampling).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
# Tiny networks: one thread a process is fastest, and the two workers then have a core each.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -q -n 2 "$@"
