#!/usr/bin/env bash
# Skip-Latte-XL/2 on clips of 16 frames at 256 x 256, the published recipe: every third frame, 8 single frames of other
# videos behind every clip, 32 clips a step, AdamW with a learning rate that falls from 1e-4 to 0, EMA 0.9999 (arXiv
# 2411.17616). scripts/train_latte_ffs.sh, _sky.sh, _taichi.sh and _ucf101.sh have what differs between the data sets.
#
#   bash scripts/train_latte.sh /path/to/videos [more flags of train.py]
#
# The folder holds videos (pip install av) or folders of frames, of UCF101 in a folder for each class. The same command
# again resumes the run. --init-from FILE starts from a plain Latte's weights; add --precision bf16 --compile for speed.
# --joint-image-list FILE takes the single frames from images of a list, as published for FaceForensics and UCF101.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe_common.sh"
begin_recipe "${BASH_SOURCE[0]}" 1 "/path/to/videos" "$@"
exec "${launch[@]}" --max-restarts 3 train.py --dataset videofolder --data-path "${paths[0]}" --model Skip-Latte-XL/2 \
    --image-size 256 --num-frames 16 --frame-interval 3 --joint-images 8 --vae mse --global-batch-size 32 --lr 1e-4 \
    --lr-schedule linear --max-steps 1000000 --grad-clip 0.1 --ckpt-every 10000 --global-seed 3407 --resume auto "${@:2}"
