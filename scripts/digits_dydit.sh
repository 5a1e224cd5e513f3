#!/usr/bin/env bash
# DyDiT on a laptop: fine-tune the quick start's DiT to 70 % and 50 % of its blocks' MACs, sample 1,000 digits with each,
# and print the executed share and the scores, with those of the DiT, plain and cached. Six minutes on two cores.
#
#   bash scripts/digits_dydit.sh [OUTPUT_FOLDER]
#
# DIGITS_DIT=CHECKPOINT starts from another DiT-digits/2; without one, and without a quickstart_out/, the quick start
# runs first. DIGITS_STEPS, DIGITS_SAMPLES and DIGITS_TARGETS ("0.7 0.5") change the rest; DIGITS_PYTHON uses another
# environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/digits_common.sh"
begin "${BASH_SOURCE[0]}" digits_dydit_out "${DIGITS_PYTHON:-}" "DIGITS_STEPS DIGITS_SAMPLES" "$@"
start="${DIGITS_DIT:-}"
if [ -z "$start" ]; then
    newest() { find quickstart_out/runs -path '*DiT-digits-2/checkpoints/*.safetensors' 2>/dev/null | sort | tail -n 1; }
    [ -n "$(newest)" ] || QUICKSTART_PYTHON="${DIGITS_PYTHON:-}" bash scripts/quickstart.sh
    start=$(realpath "$(newest)")
fi
samples="${DIGITS_SAMPLES:-1000}" steps="${DIGITS_STEPS:-1800}"
read -r -a targets <<<"${DIGITS_TARGETS:-0.7 0.5}"

for target in "${targets[@]}"; do
    echo "== Fine-tuning $start to $target of the blocks' MACs, $steps steps"
    # Token routers start at the bias of width routers, because so few steps cannot bring them down from the official 35.
    # The last third has no noise in the gates, like sampling, so that sampling executes the trained share.
    "$python" train.py --dataset digits --model DyDiT-digits/2 --results-dir "$out/runs" --init-from "$start" \
        --noise-schedule squaredcos_cap_v2 --no-learn-sigma --class-dropout-prob 0.1 \
        --max-steps "$steps" --global-batch-size 64 --num-workers 0 --log-every "$((steps < 100 ? steps : 100))" \
        --lr 3e-3 --lr-schedule cosine --lr-warmup-steps 50 --lr-final-ratio 0.05 --adam-betas 0.9 0.99 \
        --ema-decay 0.99 --ema-ramp \
        --flops-target "$target" --flops-warmup-steps "$((steps / 3))" --stratified-t --token-router-bias 15 \
        --gate-noise-steps "$((steps * 2 / 3))"
done
echo "== Sampling $samples digits with each, and with the DiT"
PYTHONPATH=. "$python" scripts/compare_families.py --ckpt "$start" "$out" --steps 50 --num-samples "$samples" \
    --output-dir "$out"
