#!/usr/bin/env bash
# Prints the first Python that can hold this project: 3.12 or newer, with venv and pip.
#
# A candidate is tried by running it, because a pyenv shim called python3.12 exists
# whether or not that version is active. PYTHON=... skips the search.
set -u

usable() {
    "$1" - >/dev/null 2>&1 <<'PY'
import sys
import ensurepip, venv  # Debian's python3 comes without them unless python3-venv is installed
sys.exit(0 if sys.version_info >= (3, 12) else 1)
PY
}

if [ -n "${PYTHON:-}" ]; then
    if usable "$PYTHON"; then
        command -v "$PYTHON"
        exit 0
    fi
    echo "PYTHON=$PYTHON does not run, is older than 3.12, or has no venv module." >&2
    echo "Remedy: point PYTHON at a Python 3.12 or newer (on Debian also install python3-venv)." >&2
    exit 1
fi

shopt -s nullglob
candidates=(
    python3.12 python3.13 python3
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python
    ${CONDA_PREFIX:+"$CONDA_PREFIX/bin/python"}
    "$HOME"/{miniconda3,anaconda3,miniforge3,mambaforge}/{,envs/*/}bin/python
    "${UV_PYTHON_INSTALL_DIR:-$HOME/.local/share/uv/python}"/cpython-3.1[2-9]*/bin/python3
)
for candidate in "${candidates[@]}"; do
    if usable "$candidate"; then
        command -v "$candidate"
        exit 0
    fi
done

cat >&2 <<EOM
No usable Python 3.12 or newer was found (megatron-core 0.19 needs it).
Looked at: ${candidates[*]}
Remedy, one of:
    uv python install 3.12
    pyenv install 3.12
    conda create -n rw python=3.12
    apt-get install python3.12 python3.12-venv
or name one yourself:  make setup PYTHON=/path/to/python3.12
EOM
exit 1
