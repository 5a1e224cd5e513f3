#!/usr/bin/env bash
# All ways to sample in few evaluations on the embedded digits: trains three seeds each of DiT, DyDiT, DDT and Skip-DiT,
# searches solvers for the first DiT and the first DDT, and compares everything with 1,000 evaluations from the same
# noise. Two and a half hours on one core; run again, it continues.
#
#   bash scripts/digits_samplers.sh [OUTPUT_FOLDER]
#
# DIGITS_SEEDS ("0 1 2"), DIGITS_STEPS, DIGITS_SAMPLES and DIGITS_SEARCH ("5 8 10 15", numbers of evaluations) make it
# shorter; DIGITS_PYTHON uses another environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cpu_common.sh"
begin "${BASH_SOURCE[0]}" digits_samplers_out "${DIGITS_PYTHON:-}" "DIGITS_STEPS DIGITS_SAMPLES" "$@"
export PYTHONPATH=.
evaluations=(${DIGITS_SEARCH:-5 8 10 15})

# searched NAME: searches tables for $checkpoint
searched() {
    local count
    for count in "${evaluations[@]}"; do
        [ -f "$out/solvers/$1-$count.json" ] || "$python" scripts/search_solver.py --ckpt "$checkpoint" --cfg-scale 1 \
            --evaluations "$count" --batches "${DIGITS_STEPS:-100}" --output "$out/solvers/$1-$count.json"
    done
}

for seed in ${DIGITS_SEEDS:-0 1 2}; do
    echo "== Training DiT, DyDiT, DDT and Skip-DiT, seed $seed"
    common=(--global-seed "$seed" --ckpt-every 1000)
    trained "$out/runs/DiT-digits-$seed" DiT-digits/2 "${DIGITS_STEPS:-3000}" "${common[@]}" "${gaussian[@]}"
    dit=$checkpoint
    [ "$seed" != 0 ] || searched DiT
    trained "$out/runs/DyDiT-digits-$seed" DyDiT-digits/2 "${DIGITS_STEPS:-1800}" "${common[@]}" --init-from "$dit" \
        "${gaussian[@]}" --lr-warmup-steps 50 --flops-target 0.7 --flops-warmup-steps 600 --stratified-t \
        --token-router-bias 15 --gate-noise-steps 1200
    trained "$out/runs/DDT-digits-$seed" DDT-digits/2 "${DIGITS_STEPS:-1700}" "${common[@]}" --process flow
    [ "$seed" != 0 ] || searched DDT
    trained "$out/runs/Skip-DiT-digits-$seed" Skip-DiT-digits/2 "${DIGITS_STEPS:-3000}" "${common[@]}" "${gaussian[@]}"
done
echo "== Comparing all samplers"
"$python" scripts/compare_samplers.py --ckpt "$out/runs" --seeds 10 11 12 --cfg-scale 1 --output-dir "$out" \
    --num-images "${DIGITS_SAMPLES:-100}" --grids own --solver-tables "$out"/solvers/*.json
