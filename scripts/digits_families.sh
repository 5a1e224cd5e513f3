#!/usr/bin/env bash
# The whole family on the embedded digits: trains those that have not been trained yet (quickstart.sh, digits_dydit.sh,
# digits_ddt.sh, digits_skip_dit.sh), and compares DiT, DyDiT, DDT and Skip-DiT, each with its way to save work, in one
# table and one picture. An hour on two cores at first; three minutes when all are trained.
#
#   bash scripts/digits_families.sh [OUTPUT_FOLDER]
#
# The variables of those scripts make it shorter.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cpu_common.sh"
begin "${BASH_SOURCE[0]}" digits_families_out "${DIGITS_PYTHON:-}" "DIGITS_STEPS DIGITS_SAMPLES" "$@"
export QUICKSTART_PYTHON="${QUICKSTART_PYTHON:-${DIGITS_PYTHON:-}}"
# The last file of each script.
for last in quickstart_out/scores.json {digits_dydit,digits_ddt}_out/families.md digits_skip_dit_out/ddpm/families.md; do
    [ -f "$last" ] || bash "scripts/${last%%_out/*}.sh"
done
compare --output-dir "$out"
