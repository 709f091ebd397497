#!/usr/bin/env bash
# What a first hour on one GPU should show, within 30 minutes: benchmarks/gpu_day.py says what.
#
#   benchmarks/gpu_day.sh               every part; the result goes to benchmarks/results
#   benchmarks/gpu_day.sh --out DIR     result and logs there
#   benchmarks/gpu_day.sh --resume      parts that are done are left out
#   benchmarks/gpu_day.sh --dry-run     what would run; needs no GPU
#
# Environment: PYTHON  the interpreter (default: .venv/bin/python, else python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
if [ -z "${PYTHON:-}" ] && [ ! -x "$python" ]; then
    python=python3
fi
exec "$python" benchmarks/gpu_day.py "$@"
