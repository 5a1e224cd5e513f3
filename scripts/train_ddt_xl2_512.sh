#!/usr/bin/env bash
# DDT-XL/2 on ImageNet at 512 x 512, from weights for 256: rotary positions span every grid, so that all weights are
# kept as they are. Other settings are those of 256; DINOv2 sees 448 pixels, and its 32 x 32 tokens are the network's.
# Published: FID 1.28 at guidance 3.0 on the times (0.3, 1) (arXiv 2504.05741).
#
#   bash scripts/train_ddt_xl2_512.sh /path/to/imagenet/train WEIGHTS_FOR_256 [more flags of train.py]
#
# WEIGHTS_FOR_256 is a checkpoint of train.py or an official .ckpt. Runs are in $RESULTS; if one has left a checkpoint
# there, the same command again resumes it. --max-steps limits its length.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe_common.sh"
begin_recipe "${BASH_SOURCE[0]}" 2 "/path/to/imagenet/train WEIGHTS_FOR_256" "$@"
results="${RESULTS:-results/ddt-xl2-512}"
first=(--init-from "${paths[1]}")
if compgen -G "$results/*/checkpoints/*.safetensors" > /dev/null; then
    first=(--resume auto)
fi
exec "${launch[@]}" train.py \
    --data-path "${paths[0]}" --model DDT-XL/2 --image-size 512 --global-batch-size 256 --results-dir "$results" \
    "${first[@]}" --align dinov2_vitb14 --align-block 8 --align-weight 0.5 \
    --precision bf16 --adam-betas 0.9 0.95 --no-flip "${@:3}"
