#!/usr/bin/env bash
# Train a Skip-DiT and a plain DiT of the same depth on the embedded digits, three seeds of each, for the quick start's
# 3,000 steps. Both are then sampled with Skip-Cache at the same place, by DDIM and by ancestral sampling; tables show
# cost and scores of every interval. About an hour on two cores; when it is run again, it continues where it stopped.
#
#   bash scripts/digits_skip_dit.sh [OUTPUT_FOLDER]
#
# DIGITS_STEPS, DIGITS_SAMPLES and DIGITS_SEEDS ("0 1 2") make it shorter; DIGITS_PYTHON uses another environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/digits_common.sh"
begin "${BASH_SOURCE[0]}" digits_skip_dit_out "${DIGITS_PYTHON:-}" "DIGITS_STEPS DIGITS_SAMPLES" "$@"
steps="${DIGITS_STEPS:-3000}" samples="${DIGITS_SAMPLES:-1000}" seeds="${DIGITS_SEEDS:-0 1 2}"

for seed in $seeds; do
    for model in Skip-DiT-digits/2 DiT-digits-deep/2; do
        echo "== Training $model, seed $seed, for $steps steps"
        "$python" train.py --dataset digits --model "$model" --global-seed "$seed" --resume auto \
            --results-dir "$out/seed-$seed/${model%/*}" \
            --noise-schedule squaredcos_cap_v2 --no-learn-sigma --class-dropout-prob 0.1 \
            --max-steps "$steps" --global-batch-size 64 --num-workers 0 --log-every "$((steps < 100 ? steps : 100))" \
            --lr 3e-3 --lr-schedule cosine --lr-warmup-steps 100 --lr-final-ratio 0.05 --adam-betas 0.9 0.99 \
            --ema-decay 0.99 --ema-ramp --ckpt-every "$steps"
    done
done

for sampler in ddim ddpm; do
    echo "== Sampling with $sampler, 50 steps, and scoring"
    PYTHONPATH=. "$python" scripts/compare_families.py --ckpt "$out" --sampler "$sampler" --steps 50 \
        --intervals 2 3 4 5 6 --num-samples "$samples" --output-dir "$out/$sampler"
done
