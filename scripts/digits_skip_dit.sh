#!/usr/bin/env bash
# Skip-DiT and a plain DiT of the same depth on the embedded digits, three seeds of each, trained for the quick start's
# 3,000 steps. Both are then sampled with Skip-Cache at the same place, by DDIM and by ancestral sampling, and tables show
# the cost of every interval and how good the digits are. About an hour on two cores; run again, it resumes training.
#
#   bash scripts/digits_skip_dit.sh [OUTPUT_FOLDER]
#
# DIGITS_STEPS, DIGITS_SAMPLES and DIGITS_SEEDS ("0 1 2") make it shorter; DIGITS_PYTHON uses another environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cpu_common.sh"
begin "${BASH_SOURCE[0]}" digits_skip_dit_out "${DIGITS_PYTHON:-}" "DIGITS_STEPS DIGITS_SAMPLES" "$@"
steps="${DIGITS_STEPS:-3000}"

for seed in ${DIGITS_SEEDS:-0 1 2}; do
    for model in Skip-DiT-digits/2 DiT-digits-deep/2; do
        echo "== Training $model, seed $seed, for $steps steps"
        train "$model" "$steps" --global-seed "$seed" --resume auto --results-dir "$out/seed-$seed/${model%/*}" \
            "${gaussian[@]}" --ckpt-every "$steps"
    done
done
for sampler in ddim ddpm; do
    echo "== Sampling with $sampler, 50 steps, and scoring"
    compare --ckpt "$out" --sampler "$sampler" --num-sampling-steps 50 --intervals 2 3 4 5 6 --output-dir "$out/$sampler"
done
