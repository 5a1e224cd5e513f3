#!/usr/bin/env bash
# DiT-XL/2 on ImageNet at 512 x 512, the published recipe: as at 256, on four times the tokens.
# Published: FID 3.04 at guidance 1.5 after 3 million steps (arXiv 2212.09748, table 4).
#
#   bash scripts/train_dit_xl2_512.sh /path/to/imagenet/train [more flags of train.py]
#
# --init-from a 256-pixel checkpoint recomputes the positions and keeps everything else.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe_common.sh"
begin_recipe "${BASH_SOURCE[0]}" 1 "/path/to/imagenet/train" "$@"
exec "${launch[@]}" --max-restarts 3 train.py \
    --data-path "${paths[0]}" --model DiT-XL/2 --image-size 512 --global-batch-size 256 --resume auto "${@:2}"
