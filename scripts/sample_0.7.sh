#!/usr/bin/env bash
# 50,000 images of the DyDiT-XL/2 that was released at 0.7 of the blocks' MACs, and their scores (published: FID 2.12).
#
#   bash scripts/sample_0.7.sh VIRTUAL_imagenet256_labeled.npz [more flags of sample_ddp.py]
#
# CKPT=FILE samples from another file, such as dydit_0.7.pth of the first release, or one of ours.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/sample_dydit.sh" "${CKPT:-new_dydit0.7}" "$@"
