#!/usr/bin/env bash
# The main job, small: train a DN-Deformable-DETR on the built-in shapes, evaluate it, draw what it finds.
# `make demo` runs this after the set-up. It replaces output/demo, and only that.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
config=projects/dn_deformable_detr/configs/shapes_demo.py
output=output/demo

# One thread a core, but no more than the small model can use; warnings of torch and detectron2
# about each other (FutureWarning) are not the reader's.
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores < 8 ? cores : 8))}"
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"

rm -rf "$output"
if ! "$python" -c 'from dn_detr.requirements import require_detectron2 as r; r()' 2>/dev/null; then
    echo "demo: without detectron2, this runs the plain PyTorch script instead."
    exec "$python" projects/plain_pytorch/train.py --output "$output"
fi

"$python" tools/train_net.py --config-file "$config" \
    train.output_dir="$output" train.overwrite=True
"$python" tools/visualize.py --config-file "$config" --output "$output/pictures" --threshold 0.3 \
    train.output_dir="$output"
"$python" tools/plot_metrics.py "$output" --output "$output/curves.png"

cat <<EOT

The demo is done. What it left in $output:
  pictures/predictions.png   predictions beside the ground truth, for 8 of the validation images
  curves.png                 losses and AP
  log.txt, metrics.json      what was said above, and the numbers of the curves
  model_best.pth             the weights; try them on an image of your own:
      $python tools/demo.py IMAGE --config-file $config --weights $output/model_best.pth --output $output/mine
EOT
