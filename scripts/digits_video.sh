#!/usr/bin/env bash
# Clips on a CPU: trains a Skip-Latte and a plain Latte on moving digits, samples both with everything computed at every
# step and with Skip-Cache, scores the clips, and leaves a contact sheet (one clip a row) and an animation of each. On one
# free core it takes 20 to 27 minutes for each network, with OMP_NUM_THREADS=2 on two free cores 17; run again, it
# resumes.
#
#   bash scripts/digits_video.sh [OUTPUT_FOLDER]
#
# DIGITS_STEPS and DIGITS_SAMPLES make it shorter; DIGITS_PYTHON uses another environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cpu_common.sh"
begin "${BASH_SOURCE[0]}" digits_video_out "${DIGITS_PYTHON:-}" "DIGITS_STEPS DIGITS_SAMPLES" "$@"

dataset=(--dataset moving-digits --global-batch-size 32 --lr 2e-3 --ema-decay 0.998)
# The network predicts clean clips: velocities, tried with ten classes, were learned more slowly.
small=(--hidden-size 64 --process flow --prediction x_start --ckpt-every 1000 --keep-last 2)
for model in Skip-Latte Latte; do
    echo "== Training a $model on moving digits"
    trained "$out/$model" "$model-digits/4" "${DIGITS_STEPS:-6000}" "${small[@]}"
done
echo "== Sampling and scoring"
PYTHONPATH=. "$python" scripts/clips_report.py --ckpt "$out/Skip-Latte" "$out/Latte" --output-dir "$out" \
    --cfg-scale 2 --num-clips "${DIGITS_SAMPLES:-200}"
