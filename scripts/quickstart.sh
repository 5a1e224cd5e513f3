#!/usr/bin/env bash
# Everything in one command, on a laptop: trains a DiT on the embedded digits, samples 1,000 new ones with two processes,
# scores them, and leaves a picture, a loss curve and a table in quickstart_out/.
# Two minutes on a new Xeon, six to eight on an older AMD, after an installation that happens once.
#
#   bash scripts/quickstart.sh [OUTPUT_FOLDER]
#
# QUICKSTART_STEPS and QUICKSTART_SAMPLES make it shorter; QUICKSTART_PYTHON uses another environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cpu_common.sh"
begin "${BASH_SOURCE[0]}" quickstart_out "${QUICKSTART_PYTHON:-}" "QUICKSTART_STEPS QUICKSTART_SAMPLES" "$@"
steps="${QUICKSTART_STEPS:-3000}" samples="${QUICKSTART_SAMPLES:-1000}"

echo "== 1/3  Training a DiT on 1,297 digits for $steps steps"
train DiT-digits/2 "$steps" --results-dir "$out/runs" "${gaussian[@]}"
run=$(find "$out/runs" -mindepth 1 -maxdepth 1 -type d | sort | tail -n 1)
checkpoint=$(find "$run/checkpoints" -name '*.safetensors' | sort | tail -n 1)

echo "== 2/3  Sampling $samples digits with two processes (DDIM, 50 steps, guidance 1.1)"
"$python" -m torch.distributed.run --standalone --nproc-per-node 2 sample_ddp.py \
    --ckpt "$checkpoint" --num-fid-samples "$samples" --per-proc-batch-size 125 \
    --sampler ddim --num-sampling-steps ddim50 --cfg-scale 1.1 --balanced-labels --output "$out/samples.npz" --overwrite

echo "== 3/3  Scoring them"
PYTHONPATH=. "$python" scripts/digits_report.py --run "$run" --samples "$out/samples.npz" --output-dir "$out"
