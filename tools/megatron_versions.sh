#!/usr/bin/env bash
# Tests what touches Megatron with the pinned megatron-core and with the previous minor version.
#
#   tools/megatron_versions.sh             both; or name others: tools/megatron_versions.sh 0.17.1
#
# A version is put into a folder of its own, before the environment's on PYTHONPATH, without its
# dependencies: .venv stays as it is. TESTS names other tests than the usual ones.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PREVIOUS=0.18.2
PINNED=$(sed -n 's/^megatron-core==//p' constraints/cpu.txt)
readonly PINNED
readonly FOLDER=${TMPDIR:-/tmp}/tropd-megatron-core
# The plug-in's numbers against Megatron's own cross entropy; the fields a config may set are those
# of the pinned version alone.
read -ra TESTS <<<"${TESTS:-tests/distributed/test_megatron_lm_pretrain.py -k one_hot}"

[ $# -gt 0 ] || set -- "$PINNED" "$PREVIOUS"
for version in "$@"; do
    where=$FOLDER/$version
    [ -d "$where" ] || .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps \
        --target "$where" "megatron-core==$version"
    found=$(PYTHONPATH=$where .venv/bin/python -W ignore -c \
        'import megatron.core; print(megatron.core.__version__)' 2>/dev/null)
    printf 'megatron-core %s: %s\n' "$found" "${TESTS[*]}"
    [ "$found" = "$version" ] || { echo "expected $version, found $found" >&2; exit 1; }
    PYTHONPATH=$where OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} .venv/bin/python -m pytest -q "${TESTS[@]}"
done
