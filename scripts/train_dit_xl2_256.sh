#!/usr/bin/env bash
# DiT-XL/2 on ImageNet at 256 x 256, the published recipe: batch 256, AdamW at a constant 1e-4, EMA 0.9999, TF32.
# Published: FID 9.62 without guidance and 2.27 at scale 1.5 after 7 million steps (arXiv 2212.09748, table 3).
#
#   bash scripts/train_dit_xl2_256.sh /path/to/imagenet/train [more flags of train.py]
#
# Add --precision bf16 --compile for speed; the same command again resumes the run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe_common.sh"
begin_recipe "${BASH_SOURCE[0]}" 1 "/path/to/imagenet/train" "$@"
exec "${launch[@]}" --max-restarts 3 train.py \
    --data-path "${paths[0]}" --model DiT-XL/2 --image-size 256 --global-batch-size 256 --resume auto "${@:2}"
