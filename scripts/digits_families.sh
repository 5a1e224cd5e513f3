#!/usr/bin/env bash
# All families on the embedded digits: train those that have not been trained yet (quickstart.sh, digits_dydit.sh,
# digits_ddt.sh, digits_skip_dit.sh), and compare DiT, DyDiT, DDT and Skip-DiT, each with its ways to save work, in one
# table and one picture. An hour on two cores, or three minutes if all networks are there.
#
#   bash scripts/digits_families.sh [OUTPUT_FOLDER]
#
# The variables of those scripts make it shorter.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/digits_common.sh"
begin "${BASH_SOURCE[0]}" digits_families_out "${DIGITS_PYTHON:-}" "DIGITS_STEPS DIGITS_SAMPLES" "$@"
export QUICKSTART_PYTHON="${QUICKSTART_PYTHON:-${DIGITS_PYTHON:-}}"
# The last file that each script writes.
for last in quickstart_out/scores.json {digits_dydit,digits_ddt}_out/families.md digits_skip_dit_out/ddpm/families.md; do
    [ -f "$last" ] || bash "scripts/${last%%_out/*}.sh"
done
PYTHONPATH=. "$python" scripts/compare_families.py --num-samples "${DIGITS_SAMPLES:-1000}" --output-dir "$out"
