#!/usr/bin/env bash
# DyDiT-XL/2 at half of the blocks' work, from a trained DiT-XL/2, on ImageNet at 256 x 256.
# Published: 57.88 G MACs instead of 118.69, FID 2.07 instead of 2.27 (arXiv 2410.03456, table 8).
#
#   bash scripts/train_dydit_0.5.sh /path/to/imagenet/train DiT-XL-2-256x256.pt [more flags of train.py]
#
# The released recipe is two programs: 30,000 steps with a complete pass besides the routed one, stopped by hand, then up
# to 200,000 without. Here it is one run. Updates with a gradient norm of 200 or more are skipped, as there. (Its first
# program steps twice with every gradient, this does not.) The same command again resumes the run. Add
# --precision bf16 --compile for speed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe_common.sh"
begin_recipe "${BASH_SOURCE[0]}" 2 "/path/to/imagenet/train DiT-XL-2-256x256.pt" "$@"
exec "${launch[@]}" --max-restarts 3 train.py \
    --data-path "${paths[0]}" --init-from "${paths[1]}" --model DyDiT-XL/2 --image-size 256 --global-batch-size 256 \
    --max-steps 200000 --lr 1e-4 --grad-norm-mode skip --grad-clip 200 --global-seed 16 --resume auto \
    --flops-target 0.5 --flops-warmup-steps 1000 --complete-loss-steps 30000 --stratified-t "${@:3}"
