#!/usr/bin/env bash
# Installs megatron_tropd into NVIDIA's PyTorch image; of docker/Dockerfile and docker/tropd.def.
# NOT RUN YET in such an image.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# What the image built for its own torch stays as it is.
readonly KEPT='^(torch|torchvision|torchaudio|triton|pytorch-triton|transformer[-_]engine.*|apex|flash[-_]attn)=='
work=$(mktemp -d)
readonly work
trap 'rm -rf "$work"' EXIT

# The image's own constraints hold other libraries than ours.
export PIP_CONSTRAINT="" PIP_NO_CACHE_DIR=1

pip list --format freeze | { grep -iE "$KEPT" || true; } >"$work/kept.txt"
grep -q '^torch==' "$work/kept.txt" || { echo "the image has no torch" >&2; exit 1; }
{
    cat "$work/kept.txt"
    grep -vE "$KEPT|^#|^(nvidia|cuda)-" constraints/gpu.txt
} >"$work/constraints.txt"

vllm=$(sed -n 's/^vllm==//p' constraints/gpu.txt)
pip install --constraint "$work/constraints.txt" --no-build-isolation --no-binary vllm "vllm==$vllm"
pip install --constraint "$work/constraints.txt" '.[train,serve,tasks]'

# Fails here and not on a cluster: an extension that was built for another torch does not import.
pip list --format freeze | { grep -iE "$KEPT" || true; } | diff "$work/kept.txt" -
python -c 'import apex, torch, transformer_engine.pytorch, vllm; print(torch.__version__)'
tropd --version
