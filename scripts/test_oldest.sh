#!/usr/bin/env bash
# Runs the tests of models, diffusion, training, sampling and runtime with the oldest torch, torchvision and timm that
# pyproject.toml allows, in ./.venv-oldest, which is made once (several GB); arguments go to pytest instead of those
# folders. PYTHON=... chooses the interpreter (3.11 to 3.13).
set -euo pipefail
case "${1:-}" in
    -h | --help)
        sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p;}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
    echo "test_oldest: $python is not a Python 3.11 to 3.13; name one: PYTHON=/path/to/python3 bash $0" >&2
    exit 2
fi
oldest=$("$python" - <<'END'
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
needed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
exact = ("torch", "torchvision", "timm")
print(*(re.sub(">=", "==", each) if re.match(r"[\w-]+", each)[0] in exact else each for each in needed))
END
)
stamp=$(echo "$oldest" | cksum)
if [ "$(cat .venv-oldest/.stamp 2>/dev/null)" != "$stamp" ]; then
    echo "test_oldest: installing $oldest into .venv-oldest (once)"
    rm -rf .venv-oldest
    "$python" -m venv .venv-oldest
    if command -v uv >/dev/null 2>&1; then
        install=(uv pip install --quiet --python .venv-oldest/bin/python)
    else
        install=(.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check)
    fi
    # shellcheck disable=SC2086  # a list without spaces inside
    "${install[@]}" $oldest
    echo "$stamp" > .venv-oldest/.stamp
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
[ $# -gt 0 ] || set -- tests/models tests/diffusion tests/training tests/sampling tests/runtime
exec .venv-oldest/bin/python -m pytest -q -n 2 "$@"
