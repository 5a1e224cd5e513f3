#!/usr/bin/env bash
# Makes ./.venv-tensorflow from requirements-tensorflow.lock, once: TensorFlow on top of .venv.
# It is a separate environment because TensorFlow must not be installed together with TensorBoard or Triton; only
# `--backend tensorflow` of the evaluator and the tests marked tf use it:
#
#   .venv-tensorflow/bin/python evaluator/evaluator.py REF.npz SAMPLES.npz --backend tensorflow
set -euo pipefail
if [ $# -gt 0 ]; then
    sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p;}' "${BASH_SOURCE[0]}"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh all

stamp=$(cat requirements.lock requirements-tensorflow.lock | cksum)
if [ -x .venv-tensorflow/bin/python ] && [ "$(cat .venv-tensorflow/.stamp 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi

echo "setup: installing TensorFlow into .venv-tensorflow (1.3 GB, once)"
where='import sysconfig; print(sysconfig.get_path("purelib"))'
if command -v uv >/dev/null 2>&1; then
    uv venv --quiet --allow-existing --python .venv/bin/python .venv-tensorflow
    install=(uv pip install --quiet --compile-bytecode --python .venv-tensorflow/bin/python)
else
    .venv/bin/python -m venv .venv-tensorflow
    install=(.venv-tensorflow/bin/python -m pip install --quiet --disable-pip-version-check)
fi
"${install[@]}" --no-deps --require-hashes -r requirements-tensorflow.lock
.venv/bin/python -c "$where" > "$(.venv-tensorflow/bin/python -c "$where")/layer.pth"
echo "$stamp" > .venv-tensorflow/.stamp
