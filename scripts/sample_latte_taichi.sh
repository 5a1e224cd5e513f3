#!/usr/bin/env bash
# 2,048 clips of the Skip-Latte-XL/2 released for Taichi-HD, and their FVD; CKPT=FILE samples from another.
#
#   bash scripts/sample_latte_taichi.sh REAL_CLIPS.npz [more flags of sample_ddp.py]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/sample_latte.sh" "${CKPT:-taichi-skip}" "$@"
