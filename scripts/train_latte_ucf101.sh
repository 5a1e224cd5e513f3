#!/usr/bin/env bash
# Skip-Latte-XL/2 on UCF101, 101 classes, as published: a tenth of the steps, after a warm-up.
#
#   bash scripts/train_latte_ucf101.sh /path/to/videos [more flags of train.py]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_latte.sh" "${@:1:1}" \
    --num-classes 101 --clip-window linspace --clip-crop resize \
    --max-steps 100000 --lr-warmup-steps 300 --grad-clip-start 10000 --ckpt-every 3000 "${@:2}"
