#!/usr/bin/env bash
# Skip-Latte-XL/2 on SkyTimelapse, unconditional, as published: squares are cut before resizing, nothing is mirrored.
#
#   bash scripts/train_latte_sky.sh /path/to/videos [more flags of train.py]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_latte.sh" "${@:1:1}" \
    --num-classes 0 --clip-window strided --clip-crop square --no-flip --grad-clip-start 20000 "${@:2}"
