#!/usr/bin/env bash
# DDT-XL/2 on ImageNet at 256 x 256, the published recipe: flow matching with logit-normal times, features of block 8
# aligned with DINOv2-B/14 at weight 0.5, batch 256, AdamW at a constant 1e-4, bf16, EMA 0.9999, no mirrored images.
# Published: FID 1.52 after 80 epochs, 1.31 after 256, with guidance on part of the times (arXiv 2504.05741).
#
#   bash scripts/train_ddt_xl2_256.sh /path/to/imagenet/train [more flags of train.py]
#
# DINOv2 comes from the hub's cache; without network give its file: --align-ckpt dinov2_vitb14_pretrain.pth.
# The same command again resumes the run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe_common.sh"
begin_recipe "${BASH_SOURCE[0]}" 1 "/path/to/imagenet/train" "$@"
exec "${launch[@]}" --max-restarts 3 train.py \
    --data-path "${paths[0]}" --model DDT-XL/2 --image-size 256 --global-batch-size 256 --resume auto \
    --align dinov2_vitb14 --align-block 8 --align-weight 0.5 \
    --precision bf16 --adam-betas 0.9 0.95 --no-flip --epochs 256 "${@:2}"
