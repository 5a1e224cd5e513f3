#!/usr/bin/env bash
# DyDiT on a laptop: fine-tunes the quick start's DiT to 70 % and 50 % of its blocks' work, samples 1,000 digits with
# each, and prints the share that sampling executed and how good the digits are, next to the DiT's, whole and cached.
# Six minutes on two cores.
#
#   bash scripts/digits_dydit.sh [OUTPUT_FOLDER]
#
# DIGITS_DIT=CHECKPOINT starts from another DiT-digits/2; without one, and without a quickstart_out/, the quick start
# runs first. DIGITS_STEPS, DIGITS_SAMPLES and DIGITS_TARGETS ("0.7 0.5") change the rest; DIGITS_PYTHON uses another
# environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cpu_common.sh"
begin "${BASH_SOURCE[0]}" digits_dydit_out "${DIGITS_PYTHON:-}" "DIGITS_STEPS DIGITS_SAMPLES" "$@"
start="${DIGITS_DIT:-}"
if [ -z "$start" ]; then
    newest() { find quickstart_out/runs -path '*DiT-digits-2/checkpoints/*.safetensors' 2>/dev/null | sort | tail -n 1; }
    [ -n "$(newest)" ] || QUICKSTART_PYTHON="${DIGITS_PYTHON:-}" bash scripts/quickstart.sh
    start=$PWD/$(newest)
fi
steps="${DIGITS_STEPS:-1800}"
read -r -a targets <<<"${DIGITS_TARGETS:-0.7 0.5}"

for target in "${targets[@]}"; do
    echo "== Fine-tuning $start to $target of the blocks' work, $steps steps"
    # Token routers start where width routers do: from the official 35, so few steps cannot bring them down. The last third
    # has no noise in the gates, like sampling, so that sampling runs what was trained for.
    train DyDiT-digits/2 "$steps" --results-dir "$out/runs" --init-from "$start" "${gaussian[@]}" --lr-warmup-steps 50 \
        --flops-target "$target" --flops-warmup-steps "$((steps / 3))" --stratified-t --token-router-bias 15 \
        --gate-noise-steps "$((steps * 2 / 3))"
done
echo "== Sampling digits with each, and with the DiT"
compare --ckpt "$start" "$out" --num-sampling-steps 50 --output-dir "$out"
