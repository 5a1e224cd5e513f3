#!/usr/bin/env bash
# Train a DDT from scratch on the embedded digits in the quick start's time, and the quick start's DiT as a flow for
# comparison; a table shows the savings and the quality of encoder sharing and of caching. About five minutes on one core.
#
#   bash scripts/digits_ddt.sh [OUTPUT_FOLDER]
#
# DIGITS_STEPS and DIGITS_SAMPLES make it shorter; DIGITS_PYTHON uses another environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/digits_common.sh"
begin "${BASH_SOURCE[0]}" digits_ddt_out "${DIGITS_PYTHON:-}" "DIGITS_STEPS DIGITS_SAMPLES" "$@"
samples="${DIGITS_SAMPLES:-1000}"

train() {
    local steps="${DIGITS_STEPS:-$2}"
    "$python" train.py --dataset digits --model "$1" --process flow --results-dir "$out/runs" \
        --max-steps "$steps" --global-batch-size 64 --num-workers 0 --log-every "$((steps < 100 ? steps : 100))" \
        --lr 3e-3 --lr-schedule cosine --lr-warmup-steps 100 --lr-final-ratio 0.05 --adam-betas 0.9 0.99 \
        --ema-decay 0.99 --ema-ramp
}

# A step of the DDT takes as long as 1.8 steps of the DiT.
echo "== 1/3  Training a DDT on 1,297 digits"
train DDT-digits/2 1700
echo "== 2/3  Training a DiT as a flow, for as long"
train DiT-digits/2 3000
echo "== 3/3  Sampling $samples digits with all encoder calls, and with a half, a quarter and a tenth of them"
PYTHONPATH=. "$python" scripts/compare_families.py --ckpt "$out" --steps 50 --intervals 2 4 10 --num-samples "$samples" \
    --output-dir "$out"
