#!/usr/bin/env bash
# The family on Fashion-MNIST, 70,000 real pictures of clothes: trains DiT, DyDiT, DDT and Skip-DiT of 1 to 2 million
# parameters, at most 90 minutes each on two slow cores. Run again, it resumes.
#
#   bash scripts/fashion_families.sh [OUTPUT_FOLDER]
#
# FASHION_DATA is the folder of train-images-idx3-ubyte.gz and the three other files; without it, the one of Debian's
# package dataset-fashion-mnist. FASHION_STEPS makes it shorter; FASHION_PYTHON uses another environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cpu_common.sh"
data="${FASHION_DATA:-/usr/share/datasets/fashion-mnist}"
case "$data" in /*) ;; *) data=$PWD/$data ;; esac
files=("$data"/{train,t10k}-{images-idx3,labels-idx1}-ubyte*)
case "${1:-}" in
    -*) ;;
    *)
        for file in "${files[@]}"; do
            [ -f "$file" ] && continue
            echo "fashion_families: FASHION_DATA: no ${file#"$data"/} in $data; install dataset-fashion-mnist" >&2
            exit 2
        done
        ;;
esac
begin "${BASH_SOURCE[0]}" fashion_families_out "${FASHION_PYTHON:-}" "FASHION_STEPS" "$@"

dataset=(--dataset idx --data-path "$data" --global-batch-size 128 --lr 1e-3 --ema-decay 0.999)
gaussian+=(--prediction v)  # with epsilon-prediction, few samples are recognised (docs/results.md)
small=(--num-classes 10 --depth 6 --hidden-size 128 --num-heads 4 --ckpt-every 250 --keep-last 2)

echo "== Training a DiT on 60,000 pictures"
trained "$out/runs/DiT" DiT-S/4 "${FASHION_STEPS:-2500}" "${small[@]}" "${gaussian[@]}"
steps="${FASHION_STEPS:-1500}"
echo "== Fine-tuning it to 0.7 of the blocks' work"
trained "$out/runs/DyDiT" DyDiT-S/4 "$steps" "${small[@]}" "${gaussian[@]}" --init-from "$checkpoint" \
    --lr-warmup-steps 50 --flops-target 0.7 --flops-warmup-steps "$((steps / 3))" --stratified-t \
    --token-router-bias 15 --gate-noise-steps "$((steps * 2 / 3))"
echo "== Training a DDT"
trained "$out/runs/DDT" DDT-S/4 "${FASHION_STEPS:-2000}" "${small[@]}" --encoder-depth 4 --process flow
echo "== Training a Skip-DiT"
trained "$out/runs/Skip-DiT" Skip-DiT-S/4 "${FASHION_STEPS:-2200}" "${small[@]}" "${gaussian[@]}"
