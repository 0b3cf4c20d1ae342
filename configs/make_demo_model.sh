#!/usr/bin/env bash
# Make configs/demo-model anew from the BF16 checkpoint, and say whether it is the one committed.
set -euo pipefail
src=$1 dst=$2
here=$(cd "$(dirname "$0")" && pwd)
"$here/../.venv/bin/sparkmoe" quantize "$src" "$dst"
for file in model.safetensors hf_quant_config.json config.json tokenizer.json; do
    cmp "$dst/$file" "$here/demo-model/$file"
done
echo "$dst equals configs/demo-model"
