#!/usr/bin/env bash
# The common part of the scripts that train small networks on a CPU, which source it.
set -euo pipefail

# Networks this small gain a third from a second thread, and lose two thirds when another program takes its core. With one,
# results do not depend on the number of cores either.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# begin SCRIPT DEFAULT_FOLDER PYTHON "NAMES OF NUMBERS" [OUTPUT_FOLDER | --help]
#
# Prints the script's header if help is asked for, checks the numbers, changes to the repository's root, and sets $out
# (made if need be) and $python: PYTHON, or if that is empty the one of .venv, which is set up.
begin() {
    local script=$1 folder=$2 own=$3 names=$4 name value
    shift 4
    case "${1:-}" in
        -*)
            sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p;}' "$script"
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
    out=${1:-}
    case "$out" in "" | /*) ;; *) out=$PWD/$out ;; esac
    cd "$(dirname "$script")/.."
    out=${out:-$PWD/$folder}
    python=$own
    if [ -z "$python" ]; then
        bash scripts/setup.sh
        python=.venv/bin/python
    fi
    mkdir -p "$out"
}

# Flags of networks that are trained under Gaussian diffusion.
gaussian=(--noise-schedule squaredcos_cap_v2 --no-learn-sigma --class-dropout-prob 0.1)
# Flags that depend on the data, and the number of images to score; scripts for other data replace them.
dataset=(--dataset digits --global-batch-size 64 --lr 3e-3 --ema-decay 0.99)
samples="${DIGITS_SAMPLES:-1000}"

# train MODEL STEPS [flags of train.py]
train() {
    "$python" train.py "${dataset[@]}" --model "$1" --max-steps "$2" --num-workers 0 \
        --log-every "$(($2 < 100 ? $2 : 100))" --lr-schedule cosine --lr-warmup-steps 100 \
        --lr-final-ratio 0.05 --adam-betas 0.9 0.99 --ema-ramp "${@:3}"
}

# trained FOLDER MODEL STEPS [flags of train.py]: trains in a folder of runs, or resumes; $checkpoint is the last one
trained() {
    train "$2" "$3" --resume auto --results-dir "$1" "${@:4}"
    checkpoint=$(find "$1" -name '*.safetensors' | sort | tail -n 1)
}

# compare [flags of compare_families.py]
compare() {
    PYTHONPATH=. "$python" scripts/compare_families.py --num-images "$samples" "$@"
}
