#!/usr/bin/env bash
# Installs the CPU stack into a virtual environment: requirements/install.sh .venv
set -euo pipefail

venv=$1
here=$(dirname "$0")
python=$venv/bin/python
torch=2.13.0+cpu

# One line that counts, instead of pip's hundreds.
pip_install() {
    "$python" -m pip install --disable-pip-version-check --no-input --no-deps "$@" 2>&1 | awk '
        /^(Collecting|Processing|Requirement already)/ { n++; printf "\r  %3d packages  %-50.50s", n, $2; fflush(); next }
        /^Installing collected/                        { printf "\r  %3d packages  %-50s", n, "unpacking ..."; fflush(); next }
        /^ERROR|^error/                                { printf "\n%s\n", $0; fflush() }
        END                                            { printf "\r%-70s\r", "" }'
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed, this is $("$python" --version): make PYTHON=python3.12 ..." >&2
    exit 1
}

echo "[1/4] torch $torch"
if ! pip_install "torch==$torch" >/dev/null; then
    # Not among pip's own sources: PyTorch's index of CPU wheels, which uv knows.
    pip_install uv==0.13.9
    "$venv/bin/uv" pip install --quiet --python "$python" --torch-backend cpu --no-deps "torch==$torch"
fi
echo "[2/4] vLLM for CPUs and what it needs (about 3 minutes)"
pip_install -r "$here/cpu.txt"
pip_install -r "$here/gateway.txt"
echo "[3/4] training and development tools"
pip_install -r "$here/train.txt"
pip_install -r "$here/dev.txt"
pip_install --target "$venv/openai-2" --upgrade -r "$here/openai-2.txt"
pip_install --target "$venv/suites" --upgrade --no-compile -r "$here/suites.txt"
echo "[4/4] medassist"
pip_install --no-build-isolation -e "$here/.."
