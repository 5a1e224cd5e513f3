#!/usr/bin/env bash
# DyDiT on a laptop: fine-tunes the quick start's DiT to 70 % and 50 % of its blocks' work, draws 1,000 digits with
# each, and prints what ratio was reached, what was executed, and how good the digits are, beside the DiT's.
# Five to ten minutes on two cores.
#
#   bash scripts/digits_dydit.sh [OUTPUT_FOLDER]
#
# DIGITS_DIT=CHECKPOINT starts from another DiT-digits/2; without one, and without a quickstart_out/, the quick start
# runs first. DIGITS_STEPS, DIGITS_SAMPLES and DIGITS_TARGETS ("0.7 0.5") change the rest; QUICKSTART_PYTHON uses an
# environment of your own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/digits_common.sh"
begin "${BASH_SOURCE[0]}" digits_dydit_out "${QUICKSTART_PYTHON:-}" "DIGITS_STEPS DIGITS_SAMPLES" "$@"
start="${DIGITS_DIT:-}"
if [ -z "$start" ]; then
    newest() { find quickstart_out/runs -path '*DiT-digits-2/checkpoints/*.safetensors' 2>/dev/null | sort | tail -n 1; }
    [ -n "$(newest)" ] || bash scripts/quickstart.sh
    start=$(realpath "$(newest)")
fi
export PYTHONPATH=.
steps="${DIGITS_STEPS:-1800}"
samples="${DIGITS_SAMPLES:-1000}"
read -r -a targets <<<"${DIGITS_TARGETS:-0.7 0.5}"

sample() { # CHECKPOINT FOLDER
    local how=(--sampler ddim --num-sampling-steps ddim50 --cfg-scale 1.1)
    OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --standalone --nproc-per-node 2 sample_ddp.py --ckpt "$1" \
        --num-fid-samples "$samples" --per-proc-batch-size 125 --balanced-labels "${how[@]}" \
        --output "$2/samples.npz" --overwrite
    "$python" scripts/count_sampling.py --ckpt "$1" --images 100 "${how[@]}" --json >"$2/cost.json"
}

echo "== The DiT to start from: $start"
mkdir -p "$out/DiT"
sample "$start" "$out/DiT"
for target in "${targets[@]}"; do
    echo "== Fine-tuning to $target of the blocks' work, $steps steps"
    folder="$out/$target"
    rm -rf "$folder"
    mkdir -p "$folder"
    # Token routers start where width routers do: from the official 35, so few steps cannot bring them down. The last third
    # goes without noise in the gates, as sampling does, so that what was trained for is what sampling runs.
    "$python" train.py --dataset digits --model DyDiT-digits/2 --results-dir "$folder/runs" --init-from "$start" \
        --noise-schedule squaredcos_cap_v2 --no-learn-sigma --class-dropout-prob 0.1 \
        --max-steps "$steps" --global-batch-size 64 --num-workers 0 --log-every "$((steps < 100 ? steps : 100))" \
        --lr 3e-3 --lr-schedule cosine --lr-warmup-steps 50 --lr-final-ratio 0.05 --adam-betas 0.9 0.99 \
        --ema-decay 0.99 --ema-ramp \
        --flops-target "$target" --flops-warmup-steps "$((steps / 3))" --stratified-t --token-router-bias 15 \
        --gate-noise-steps "$((steps * 2 / 3))"
    checkpoint=$(find "$folder/runs" -name '*.safetensors' | sort | tail -n 1)
    sample "$checkpoint" "$folder"
done
echo "== What came of it"
"$python" scripts/digits_dydit_report.py --folder "$out" --targets "${targets[@]}"
