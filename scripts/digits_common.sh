#!/usr/bin/env bash
# Common start of the scripts for the digits; they source it.
set -euo pipefail

# Networks this small gain a third from a second thread, and lose two thirds when another program takes its core. With one
# thread, results do not depend on the number of cores either.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# begin SCRIPT DEFAULT_FOLDER PYTHON "NAMES OF NUMBERS" [OUTPUT_FOLDER | --help]
#
# Print the script's header for --help, check that the named variables are numbers, change to the repository's root, and
# set $out (created if missing) and $python: PYTHON, or if that is empty the one of .venv, which is set up.
begin() {
    local script=$1 folder=$2 own=$3 names=$4 name value
    shift 4
    case "${1:-}" in
        -*)
            sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "$script"
            exit 0
            ;;
    esac
    for name in $names; do
        value="${!name:-1}"
        if ! [[ "$value" =~ ^[1-9][0-9]*$ ]]; then
            echo "$(basename "$script" .sh): $name must be a positive number, not '$value'" >&2
            exit 2
        fi
    done
    out=$(realpath -m "${1:-$(dirname "$script")/../$folder}")
    cd "$(dirname "$script")/.."
    python=$own
    if [ -z "$python" ]; then
        bash scripts/setup.sh
        python=.venv/bin/python
    fi
    mkdir -p "$out"
}
