#!/usr/bin/env bash
# DDT from scratch on the embedded digits in the quick start's budget of time, with a table of what sharing its encoder
# between steps saves and costs; and the quick start's DiT, trained as a flow and cached. About five minutes on one core.
#
#   bash scripts/digits_ddt.sh [OUTPUT_FOLDER]
#
# DIGITS_STEPS and DIGITS_SAMPLES make it shorter; DIGITS_PYTHON uses another environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cpu_common.sh"
begin "${BASH_SOURCE[0]}" digits_ddt_out "${DIGITS_PYTHON:-}" "DIGITS_STEPS DIGITS_SAMPLES" "$@"

# A step of the DDT takes as long as 1.8 of the DiT.
echo "== 1/3  Training a DDT on 1,297 digits"
train DDT-digits/2 "${DIGITS_STEPS:-1700}" --process flow --results-dir "$out/runs"
echo "== 2/3  Training a DiT as a flow, for as long"
train DiT-digits/2 "${DIGITS_STEPS:-3000}" --process flow --results-dir "$out/runs"
echo "== 3/3  Sampling digits with all encoder calls, and with a half, a quarter and a tenth of them"
compare --ckpt "$out" --num-sampling-steps 50 --intervals 2 4 10 --output-dir "$out"
