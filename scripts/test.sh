#!/usr/bin/env bash
# Sets up .venv if need be and runs the tests; arguments go to pytest (for example: -m slow, or -k sampling). Without any,
# the tests marked tf follow in a separate process, in an environment with TensorFlow (scripts/setup_tensorflow.sh), on
# Linux x86_64, for which it is made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh all
# Tiny networks: one thread a process is fastest, and the two workers then have a core each.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
.venv/bin/python -m pytest -q -n 2 "$@"
if [ $# -eq 0 ] && [ "$(uname -sm)" = "Linux x86_64" ]; then
    bash scripts/setup_tensorflow.sh
    exec .venv-tensorflow/bin/python -m pytest -q -m "tf and not slow" tests/evaluator/tensorflow
fi
