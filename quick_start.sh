#!/usr/bin/env bash
# Train a standard and a low-curvature ResNet-18 on handwritten digits, measure both, and draw the results.
set -euo pipefail
cd "$(dirname "$0")"
runs=saved_models/quick_start
recipe="--dataset digits --num-epochs 5 --batch-size 32 --lr 0.02 --bn-momentum 0.5 --calibrate-batchnorm --output-dir $runs --resume"
penalties="--reg-beta 1e-3 --reg-gamma 1e-3 --reg-gnorm 3e-2 --reg-warmup 2"

say_and_do() { echo; echo "\$ $*"; "$@"; }

if [ -e $runs/quick_start.png ]; then
    echo "$runs is there already; to start over: rm -r $runs"
    say_and_do .venv/bin/python estimate_curvature.py --compare $runs/curvature.csv
    exit
fi
[ -x .venv/bin/python ] || say_and_do python3 -m venv .venv
say_and_do .venv/bin/pip install -r requirements.txt
say_and_do .venv/bin/python train_models.py --model-arch resnet18 $recipe
say_and_do .venv/bin/python train_models.py --model-arch resnet18lcnn --regularizer curvature_and_gnorm $penalties $recipe
say_and_do .venv/bin/python estimate_curvature.py --model-filename $runs/resnet18*.pt --split test --data-fraction 1 \
    --num-power-iter 40 --output $runs/curvature.csv --plot $runs/quick_start.png
