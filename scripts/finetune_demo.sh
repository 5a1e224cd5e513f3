#!/usr/bin/env bash
# Fine-tuning on a laptop: trains a DiT on the digits 0 to 6, fine-tunes it on folders of 7, 8 and 9 in three ways (all
# weights, the label table alone, LoRA), samples all ten digits with each, and prints how many of the new and of the old
# ones an independent classifier recognises. Some ten minutes on two cores.
#
#   bash scripts/finetune_demo.sh [OUTPUT_FOLDER]
#
# LoRA needs the package peft (pip install -e '.[finetune]'); without it that row is left out, with a word.
# DIGITS_STEPS, DIGITS_TUNING_STEPS and DIGITS_SAMPLES make it shorter; DIGITS_PYTHON uses another environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cpu_common.sh"
begin "${BASH_SOURCE[0]}" finetune_out "${DIGITS_PYTHON:-}" "DIGITS_STEPS DIGITS_TUNING_STEPS DIGITS_SAMPLES" "$@"
steps="${DIGITS_STEPS:-2000}" tuning="${DIGITS_TUNING_STEPS:-600}" samples="${DIGITS_SAMPLES:-500}"
dataset=(--dataset imagefolder --image-size 8 --in-channels 1 --vae none --no-flip --global-batch-size 64 --lr 3e-3
    --ema-decay 0.99)

# sampled NAME: samples with the last checkpoint
sampled() {
    "$python" sample_ddp.py --ckpt "$checkpoint" --num-fid-samples "$samples" --per-proc-batch-size 125 \
        --sampler ddim --num-sampling-steps ddim25 --cfg-scale 1.1 --balanced-labels --output "$out/$1.npz" --overwrite
}

methods="full labels lora"
if ! "$python" -c "import peft" 2>/dev/null; then
    echo "finetune_demo: no LoRA, because the package peft is not installed; pip install -e '.[finetune]'" >&2
    methods="full labels"
fi

echo "== 1/3  Training a DiT on the digits 0 to 6 for $steps steps"
PYTHONPATH=. "$python" -c "import sys; from pathlib import Path; from data.digits import write_digits
root = Path(sys.argv[1]); write_digits(root / 'old', range(7)); write_digits(root / 'new', range(7, 10))" "$out/photos"
trained "$out/base" DiT-digits/2 "$steps" --data-path "$out/photos/old" --num-classes 7 "${gaussian[@]}"
start=$checkpoint
sampled base

echo "== 2/3  Fine-tuning it on the digits 7 to 9 for $tuning steps"
for method in $methods; do
    case "$method" in
        full) flags=(--lr 1e-3) ;;
        labels) flags=(--train-only labels --lr 1e-2) ;;
        lora) flags=(--train-only lora --lora-rank 8 --lr 5e-3) ;;
    esac
    trained "$out/$method" DiT-digits/2 "$tuning" --data-path "$out/photos/new" --num-classes 10 --keep-classes \
        --init-from "$start" "${gaussian[@]}" --lr-warmup-steps 20 "${flags[@]}"
    sampled "$method"
done

echo "== 3/3  Scoring them"
PYTHONPATH=. "$python" scripts/finetune_report.py --output-dir "$out"
