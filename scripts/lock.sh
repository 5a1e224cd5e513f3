#!/usr/bin/env bash
# Rewrites requirements.lock and requirements-tensorflow.lock, with the SHA-256 of every wheel of every system, from the
# dependencies in pyproject.toml. Pins stay as they are where they fit; `--upgrade` takes the newest of all, and
# `--upgrade-package NAME` that of one. Needs uv (https://docs.astral.sh/uv/).
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

compile requirements.lock "dev finetune stores text video" "$@" # what tests need
# TensorFlow's environment is a layer on the other one: only what that lacks.
below=$(sed -n 's/^\([a-z0-9._-]*\)==.*/--no-emit-package \1/p' requirements.lock | sort -u)
# shellcheck disable=SC2086 # names have no spaces
compile requirements-tensorflow.lock tensorflow --constraint requirements.lock $below "$@"
