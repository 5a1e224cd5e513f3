#!/usr/bin/env bash
# Measure this code on a GPU, in under eight minutes: its tests, then XL/2 at full size. Writes
# benchmarks/results/<device>-<date>.json and .md. Needs PyTorch (>= 2.11) and nothing else: no network, no .venv,
# no diffusers; pytest where it is installed.
#
#   bash scripts/gpu_report.sh [--smoke] [--output-dir FOLDER] [--seconds 400]
#
# Without a GPU it prints an error and exits with status 2; --smoke runs all of it at tiny sizes, on any machine.
# PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=.
if ! "${PYTHON:-python3}" -c 'import torch' 2>/dev/null; then
    echo "gpu_report: ${PYTHON:-python3} has no PyTorch; name one that has: PYTHON=.venv/bin/python bash scripts/gpu_report.sh" >&2
    exit 2
fi
exec "${PYTHON:-python3}" scripts/gpu_report.py "$@"
