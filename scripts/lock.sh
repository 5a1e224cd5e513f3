#!/usr/bin/env bash
# Rewrites requirements.lock (all that tests need), requirements-tensorflow.lock and locks/*.lock (the base, and for each
# extra what the base lacks), with the SHA-256 of every wheel of every system, from the dependencies in pyproject.toml.
# All have the same version of a package, so extras can be combined. Pins stay as they are where they fit; `--upgrade`
# takes the newest of all, and `--upgrade-package NAME` that of one. Needs uv (https://docs.astral.sh/uv/).
#
#   bash scripts/lock.sh [--upgrade | --upgrade-package NAME]
set -euo pipefail
case "${1:-}" in
    -h | --help)
        sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p;}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! command -v uv >/dev/null 2>&1; then
    echo "lock: uv was not found; install it (https://docs.astral.sh/uv/)" >&2
    exit 2
fi

# compile OUTPUT "EXTRAS" [flags of uv]: one set of pins for all systems and versions of Python, without addresses.
compile() {
    local extra extras=()
    for extra in $2; do
        extras+=(--extra "$extra")
    done
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
        --no-emit-index-url --no-emit-find-links pyproject.toml --output-file "$1" "${extras[@]}" "${@:3}" >/dev/null
}

# without LOCK: a flag for each package in a lock file, that leaves it out of another.
without() {
    sed -n 's/^\([a-z0-9._-]*\)==.*/--no-emit-package \1/p' "$1" | sort -u
}

extras="demo finetune stores tensorboard text track video"
compile requirements.lock "dev $extras" "$@"
pins=(--constraint requirements.lock)
# shellcheck disable=SC2046 # names have no spaces
{
    # TensorFlow's environment is a layer on the one for tests: only what that lacks.
    compile requirements-tensorflow.lock tensorflow "${pins[@]}" $(without requirements.lock) "$@"
    mkdir -p locks
    compile locks/base.lock "" "${pins[@]}" "$@"
    for extra in $extras; do
        compile "locks/$extra.lock" "$extra" "${pins[@]}" $(without locks/base.lock) "$@"
    done
}
