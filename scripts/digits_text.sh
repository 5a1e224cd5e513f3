#!/usr/bin/env bash
# Text on a CPU: trains one Skip-LatteT2V on captions of digits, for clips ("a small seven moving right") and pictures ("a
# large two at the top"), samples both by their prompts, scores what is seen in them, and leaves contact sheets with the
# prompts underneath. Run again, it resumes.
#
#   bash scripts/digits_text.sh [OUTPUT_FOLDER]
#
# DIGITS_STEPS and DIGITS_SAMPLES make it shorter; DIGITS_PYTHON uses another environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cpu_common.sh"
begin "${BASH_SOURCE[0]}" digits_text_out "${DIGITS_PYTHON:-}" "DIGITS_STEPS DIGITS_SAMPLES" "$@"

dataset=(--dataset captioned-digits --joint-images 4 --global-batch-size 32 --lr 2e-3 --ema-decay 0.998)
small=(--hidden-size 64 --process flow --prediction x_start --caption-dropout-prob 0.1 --ckpt-every 500 --keep-last 2)
echo "== Training a Skip-LatteT2V on captioned digits"
trained "$out/runs" Skip-LatteT2V-digits/4 "${DIGITS_STEPS:-6000}" "${small[@]}"
echo "== Sampling and scoring"
PYTHONPATH=. "$python" scripts/text_report.py --ckpt "$checkpoint" --output-dir "$out" \
    --num-samples "${DIGITS_SAMPLES:-160}"
echo "Clips with their prompts: $out/clips.png and clips.gif; pictures: $out/pictures.png"
