#!/usr/bin/env bash
# Make ./.venv from the lock file, once; a second call returns at once unless the lock or pyproject.toml changed.
# Every package must have a hash of the lock file. Uses uv where it is installed, otherwise Python's own venv and pip.
# PYTHON=... chooses the interpreter (>= 3.11).
set -euo pipefail
if [ $# -gt 0 ]; then
    sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p;}' "${BASH_SOURCE[0]}"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=$(cat requirements.lock pyproject.toml | cksum)
if [ -x .venv/bin/python ] && [ "$(cat .venv/.stamp 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: Python >= 3.11 was not found; install it, or name it: PYTHON=/path/to/python3 bash $0" >&2
    exit 2
}

echo "setup: installing exact pins from requirements.lock into .venv (several GB for PyTorch's CUDA build, once)"
if command -v uv >/dev/null 2>&1; then
    uv venv --quiet --allow-existing --python "${PYTHON:->=3.11}" .venv
    install=(uv pip install --quiet --python .venv/bin/python)
else
    python=$(find_python)
    "$python" -m venv .venv
    install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
fi
"${install[@]}" --require-hashes -r requirements.lock
"${install[@]}" --no-deps --no-build-isolation -e . # built by the setuptools of the lock file
echo "$stamp" > .venv/.stamp
