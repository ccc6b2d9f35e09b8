#!/usr/bin/env bash
# The runs that need a GPU, one after the other. Stop it and start it again: each run continues, and
# a finished one is only shown.
#
#     dev/gpu.sh [DATA]               DATA: the prepared data set (default: data/tiny-imagenet)
#     SEEDS="0 1 2" dev/gpu.sh        more seeds (default: 0)
#
# On a rented machine: PyTorch with CUDA and a C compiler, this checkout, `pip install -e ".[dev]"`,
# and data/tiny-imagenet-200.zip (else it is downloaded). Then `nohup dev/gpu.sh &`. Code without its
# git history: TINYLAB_COMMIT=HASH says which commit it is. Bring back runs/ and
# results/throughput.csv; then, here: tinylab explain runs/NAME, make publish RUN=runs/NAME.
#
# Measured on one H200 (fp16, not compiled, 21,500 images/s): preparing the data 5 s on 16 cores;
# `accurate` 2 minutes of training and 25 s of tests; `cpu` in whole batches 155 s, for which the
# processor is too slow. From their arithmetic: `speedrun` 35 s, `official` 17 minutes. `published`
# augments in up to eight processes, 3,500 images/s each on an EPYC.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-data/tiny-imagenet}
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 NO_ALBUMENTATIONS_UPDATE=1
python=${PYTHON:-python3}
train() { "$python" -m tinylab train "$@" --data "$data" --seed "$seed"; }

[ -f "$data/meta.json" ] || "$python" -m tinylab prepare --data "$data"
"$python" benchmarks/bench_throughput.py --csv results/throughput.csv --seconds 120
for seed in ${SEEDS:-0}; do
    train accurate
    train speedrun
    train cpu --micro-batch None --run "runs/cpu-merged-s$seed-gpu"
    train published
    train official
done
