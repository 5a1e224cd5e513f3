#!/usr/bin/env bash
# The whole house in one command, on a laptop: trains a DiT on the embedded digits, draws 1,000 new ones with two
# processes, scores them, and leaves a picture, a loss curve and a table in quickstart_out/.
# About two minutes on two cores, after an installation that happens once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
python=.venv/bin/python
out="${1:-quickstart_out}"
steps="${QUICKSTART_STEPS:-2000}"
samples="${QUICKSTART_SAMPLES:-1000}"
mkdir -p "$out"

echo "== 1/3  Training a DiT on 1,297 digits for $steps steps"
$python train.py --dataset digits --model DiT-digits/2 --results-dir "$out/runs" \
    --noise-schedule squaredcos_cap_v2 --no-learn-sigma --class-dropout-prob 0.1 \
    --max-steps "$steps" --global-batch-size 64 --num-workers 0 --log-every 100 \
    --lr 2e-3 --lr-schedule cosine --lr-warmup-steps 100 --lr-final-ratio 0.05 --adam-betas 0.9 0.99 \
    --ema-decay 0.99 --ema-ramp
run=$(ls -d "$out"/runs/*/ | tail -n 1)
checkpoint=$(ls "$run"checkpoints/*.safetensors | tail -n 1)

echo "== 2/3  Drawing $samples digits with two processes (DDIM, 50 steps, guidance 1.1)"
OMP_NUM_THREADS=1 $python -m torch.distributed.run --standalone --nproc-per-node 2 sample_ddp.py \
    --ckpt "$checkpoint" --num-fid-samples "$samples" --per-proc-batch-size 125 \
    --sampler ddim --num-sampling-steps ddim50 --cfg-scale 1.1 --output "$out/samples.npz" --overwrite

echo "== 3/3  Scoring them"
$python scripts/digits_report.py --run "$run" --samples "$out/samples.npz" --output-dir "$out"
