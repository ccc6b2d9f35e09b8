#!/usr/bin/env bash
# The runs that need a GPU, one after the other. Stop it and start it again: each run continues, and
# a finished one is only shown.
#
#     dev/gpu.sh [DATA]        DATA: the prepared data set (default: data/tiny-imagenet)
#     SEEDS="0 1 2" dev/gpu.sh
#
# Code without its git history: TINYLAB_COMMIT=HASH says which commit it is. Afterwards here:
# tinylab explain runs/NAME, make publish RUN=runs/NAME.
# Measured on one H200 (fp16, not compiled): preparing the data 5 s on 16 cores; `accurate` 120 s of
# training and 25 s of tests; `cpu` in whole batches 155 s, for which the processor is too slow.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-data/tiny-imagenet}
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 NO_ALBUMENTATIONS_UPDATE=1
tinylab() { "${PYTHON:-python3}" -m tinylab "$@"; }

[ -f "$data/meta.json" ] || tinylab prepare --data "$data"
"${PYTHON:-python3}" benchmarks/bench_throughput.py --csv results/throughput.csv --seconds 120
for seed in ${SEEDS:-0}; do
    tinylab train published --data "$data" --seed "$seed"
    tinylab train accurate --data "$data" --seed "$seed"
    tinylab train speedrun --data "$data" --seed "$seed"
    tinylab train cpu --micro-batch None --data "$data" --seed "$seed" --run "runs/cpu-merged-s$seed-gpu"
done
