#!/usr/bin/env bash
# The common part of the recipes for GPUs, which source it.
set -euo pipefail

# begin_recipe SCRIPT NUMBER "USAGE" "$@"
#
# Prints the script's header if help is asked for, and its usage if fewer than NUMBER paths are given; makes those
# absolute, changes to the repository's root, and sets $paths and $launch: torchrun of this shell, or else of .venv, on
# all GPUs of this machine or $GPUS of them.
begin_recipe() {
    local script=$1 number=$2 usage=$3 name path
    name=$(basename "$script" .sh)
    shift 3
    case "${1:-}" in
        -*)
            sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p;}' "$script"
            exit 0
            ;;
    esac
    if [ $# -lt "$number" ]; then
        echo "$name: usage: bash scripts/$name.sh $usage [more flags]" >&2
        exit 2
    fi
    paths=()
    for path in "${@:1:number}"; do
        case "$path" in /*) ;; *) if [ -e "$path" ]; then path=$PWD/$path; fi ;; esac
        paths+=("$path")
    done
    cd "$(dirname "$script")/.."
    local torchrun
    torchrun=$(command -v torchrun || true)
    if [ -z "$torchrun" ] && [ -x .venv/bin/torchrun ]; then torchrun=.venv/bin/torchrun; fi
    if [ -z "$torchrun" ]; then
        echo "$name: no torchrun here; bash scripts/setup.sh makes an environment with one" >&2
        exit 2
    fi
    local python=${torchrun%torchrun}python
    if [ -z "${GPUS:-}" ] && [ -x "$python" ] &&
        ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
        echo "$name: PyTorch finds no GPU here; GPUS=1 starts one process on the CPU" >&2
        exit 2
    fi
    launch=("$torchrun" --standalone --nproc-per-node "${GPUS:-gpu}")
}
