#!/usr/bin/env bash
# Measures a GPU in under eight minutes: the tests marked gpu, then XL/2 at full size. Writes
# benchmarks/results/<device>-<date>.json and .md. Needs PyTorch (>= 2.11), numpy, pillow, safetensors and tqdm, but no
# network, .venv or diffusers; pytest if it is installed.
#
#   bash scripts/gpu_report.sh [--smoke] [--output-dir FOLDER] [--seconds 400]
#
# Without a GPU it exits with status 2; --smoke runs all of it tiny, on any machine.
# PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=.
if ! "${PYTHON:-python3}" -c 'import sys, importlib.util as u; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then
    echo "gpu_report: ${PYTHON:-python3} has no PyTorch; name one that has: PYTHON=.venv/bin/python bash scripts/gpu_report.sh" >&2
    exit 2
fi
exec "${PYTHON:-python3}" scripts/gpu_report.py "$@"
