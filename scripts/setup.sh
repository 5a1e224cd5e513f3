#!/usr/bin/env bash
# Make ./.venv from lock files, once; a later call returns at once unless they or pyproject.toml changed.
# Every package must have a hash of its lock file. Uses uv where it is installed, otherwise Python's own venv and pip.
# PYTHON=... chooses the interpreter (>= 3.11).
#
#   bash scripts/setup.sh               all that the tests need, every extra too; or what an earlier call chose
#   bash scripts/setup.sh all           the same, whatever was chosen before
#   bash scripts/setup.sh base [EXTRA ...]   the base alone, and these extras, the names in locks/
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
    "") chosen=$(cat .venv/.chosen 2>/dev/null || echo all) ;;
    all | base) chosen="$*" ;;
    *)
        sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p;}' "scripts/setup.sh"
        [[ $1 == -h || $1 == --help ]] && exit 0 || exit 2
        ;;
esac
locks=()
for name in $chosen; do
    [[ $name == all ]] && lock=requirements.lock || lock=locks/$name.lock
    if [ ! -f "$lock" ]; then
        echo "setup: $name: no such extra; there are $(cd locks && echo *.lock | sed 's/\.lock//g; s/base *//')" >&2
        exit 2
    fi
    locks+=(-r "$lock")
done

stamp=$(cat requirements.lock pyproject.toml locks/*.lock | cksum)
if [ -x .venv/bin/python ] && [ "$(cat .venv/.stamp 2>/dev/null)" = "$stamp" ] &&
    [ "$(cat .venv/.chosen 2>/dev/null)" = "$chosen" ]; then
    exit 0
fi

# A link to the .venv of another checkout: its project and versions would be replaced by those of this one
if [ -L .venv ] && [ -f .venv/../pyproject.toml ]; then
    echo "setup: .venv is that of $(cd -P .venv/.. && pwd), set up for other lock files or another pyproject.toml;" \
        "run scripts/setup.sh there, or remove the link" >&2
    exit 2
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

echo "setup: installing exact pins ($chosen) into .venv (several GB for PyTorch's CUDA build, once)"
if command -v uv >/dev/null 2>&1; then
    # With pip, which `pip install ...` in this environment needs; no lock file has it, and nothing here is installed by it
    uv venv --quiet --seed --allow-existing --python "${PYTHON:->=3.11}" .venv
    # As pip does: else every process would compile the modules anew
    install=(uv pip install --quiet --compile-bytecode --python .venv/bin/python)
else
    python=$(find_python)
    "$python" -m venv .venv
    install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
fi
"${install[@]}" --require-hashes "${locks[@]}"
"${install[@]}" --no-deps --no-build-isolation -e . # built by the setuptools of the lock file
echo "$chosen" > .venv/.chosen
echo "$stamp" > .venv/.stamp
