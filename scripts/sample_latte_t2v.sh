#!/usr/bin/env bash
# Clips of prompts by Skip-LatteT2V-XL/2 as published: 50 steps of DDIM, guidance scale 7.5, Skip-Cache N2-700-50.
#
#   bash scripts/sample_latte_t2v.sh prompts.txt [more flags of sample_ddp.py, such as --cache-interval 3]
#
# The file has a prompt a line. CKPT=FILE samples from another checkpoint than the released one, which is downloaded if
# need be. The text encoder needs pip install '.[text]'; the clips are in $SAMPLES, each also as a GIF.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe_common.sh"
begin_recipe "${BASH_SOURCE[0]}" 1 "prompts.txt" "$@"
checkpoint="${CKPT:-Latte-skip}"
samples="${SAMPLES:-samples/$(basename "$checkpoint" | sed -E 's/\.(pt|safetensors)$//').npz}"
exec "${launch[@]}" sample_ddp.py --ckpt "$checkpoint" --prompt-file "${paths[0]}" --output "$samples" \
    --cache-interval 2 --save-gif "${@:2}"
