#!/usr/bin/env bash
# Make configs/demo-model anew from the BF16 checkpoint, and say whether it is the one committed.
set -euo pipefail
src=$1 dst=$2
here=$(cd "$(dirname "$0")" && pwd)
# On the CPU, where calibration is in float32: on a GPU it would be in bfloat16, and its scales others.
CUDA_VISIBLE_DEVICES='' "$here/../.venv/bin/sparkmoe" quantize "$src" "$dst"
diff -r --exclude README.md --exclude heldout.txt "$dst" "$here/demo-model"
echo "$dst equals configs/demo-model"
