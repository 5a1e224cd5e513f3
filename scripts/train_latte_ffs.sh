#!/usr/bin/env bash
# Skip-Latte-XL/2 on FaceForensics, unconditional, as published.
#
#   bash scripts/train_latte_ffs.sh /path/to/videos [more flags of train.py]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_latte.sh" "${@:1:1}" \
    --num-classes 0 --clip-window linspace --clip-crop resize --grad-clip-start 500000 "${@:2}"
