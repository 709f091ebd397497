#!/usr/bin/env bash
# Makes .venv with the pinned versions of constraints/; returns at once when nothing changed.
#
#   tools/setup_env.sh          extra "gpu" where nvidia-smi lists a device, else "cpu"
#
# Environment: PYTHON       the interpreter to use (default: look for 3.12, then 3.13)
#              TROPD_EXTRA  cpu or gpu, instead of looking for a device
#              TROPD_VENV   where to make the environment (default: .venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly UV_VERSION=0.13.8
readonly VENV=${TROPD_VENV:-.venv}
readonly STAMP=$VENV/.tropd-env

say() { printf '[setup] %s\n' "$*" >&2; }
die() { printf '[setup] %s\n' "$@" >&2; exit 1; }

# A name on PATH proves nothing (version managers put refusing shims there): run it.
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

can_make_environments() { "$1" -c 'import ensurepip, ssl, venv' >/dev/null 2>&1; }

candidates() {
    local version root
    for version in 3.12 3.13; do
        # Every one on PATH: the first may be a shim that hides a good one behind it.
        type -ap "python$version" || true
        for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv" /opt/pyenv; do
            ls -d "$root/versions/$version".*/bin/python 2>/dev/null || true
        done
        ls -d "${HOME:-}"/.local/share/uv/python/cpython-"$version".*/bin/python 2>/dev/null || true
    done
    type -ap python3 python || true
}

find_python() {
    local candidate without_venv=""
    if [ -n "${PYTHON:-}" ]; then
        case "$(version_of "$PYTHON")" in
            3.12 | 3.13) ;;
            *) die "PYTHON=$PYTHON is not a working Python 3.12 or 3.13. Name one or unset it." ;;
        esac
        can_make_environments "$PYTHON" || die "PYTHON=$PYTHON lacks venv, ensurepip or ssl." \
            "On Debian or Ubuntu: apt-get install python$(version_of "$PYTHON")-venv"
        echo "$PYTHON"
        return
    fi
    while read -r candidate; do
        case "$(version_of "$candidate")" in
            3.12 | 3.13) ;;
            *) continue ;;
        esac
        if can_make_environments "$candidate"; then
            echo "$candidate"
            return
        fi
        without_venv=${without_venv:-$candidate}
    done < <(candidates)
    if [ -n "$without_venv" ]; then
        die "$without_venv is Python $(version_of "$without_venv") without venv, ensurepip or ssl." \
            "On Debian or Ubuntu: apt-get install python$(version_of "$without_venv")-venv" \
            "Then run the same command again."
    fi
    die "Found no working Python 3.12 or 3.13 (megatron-core needs at least 3.12)." \
        "Ubuntu 24.04: apt-get install python3.12 python3.12-venv" \
        "Debian 13:    apt-get install python3.13 python3.13-venv" \
        "pyenv:        pyenv install 3.12" \
        "Already installed elsewhere? make PYTHON=/path/to/python3.12 ..."
}

find_extra() {
    case "${TROPD_EXTRA:-}" in
        cpu | gpu) echo "$TROPD_EXTRA" ;;
        "") if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then echo gpu; else echo cpu; fi ;;
        *) die "TROPD_EXTRA must be cpu or gpu, found '$TROPD_EXTRA'." ;;
    esac
}

# Line 1: what an environment is for; scripts in it hold the path of this folder, so that counts.
# Line 2: the versions in it.
describe() {
    echo "$1 $PWD"
    cat tools/setup_env.sh pyproject.toml constraints/overrides.txt "constraints/$1.txt" | cksum
}

works() {
    case "$(version_of "$VENV/bin/python")" in 3.12 | 3.13) ;; *) return 1 ;; esac
    [ ! -f "$STAMP" ] || [ "$(head -n 1 "$STAMP")" = "$1 $PWD" ]
}

install() {
    local extra=$1 arguments=(--constraint "constraints/$1.txt" --editable ".[$1,tasks,dev,docs]")
    if [ "$extra" = cpu ]; then
        arguments+=(--overrides constraints/overrides.txt)
    fi
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION"
    # Compiled once here: every rank and engine is a process that imports thousands of modules, and
    # where PYTHONDONTWRITEBYTECODE is set each would compile them anew.
    UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300} "$VENV/bin/uv" pip install --compile-bytecode \
        --python "$VENV/bin/python" "${arguments[@]}"
}

main() {
    local extra wanted python
    extra=$(find_extra)
    wanted=$(describe "$extra")
    if works "$extra"; then
        # $(...) drops the last newline on both sides.
        if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ]; then return; fi
    else
        python=$(find_python)
        say "making $VENV with $python (Python $(version_of "$python"), extra $extra)"
        "$python" -m venv --clear "$VENV"
    fi
    # Until the second line is there the environment counts as unfinished, and is gone on with.
    echo "$extra $PWD" >"$STAMP"
    say "installing the pinned packages of constraints/$extra.txt (once; some minutes)"
    install "$extra"
    printf '%s\n' "$wanted" >"$STAMP"
    say "done: $VENV"
}

main "$@"
