#!/usr/bin/env bash
# Test and time lit_rl on a GPU machine without a network, within 8 minutes:
#
#     bash benchmarks/gpu_check.sh OUT                          # table and OUT/gpu_check.json
#     bash benchmarks/gpu_check.sh OUT --device cpu --short     # the same in small, without a GPU
#
# The machine's Python (PYTHON, else python3) must have torch, lightning, numpy, pandas, pyarrow and pytest. The rest
# comes from benchmarks/gpu_wheels/ (WHEELS, see gpu_wheels.sh), if there is one, and lands in a folder that is removed
# at the end: nothing is installed. Ray is not needed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
wheels=${WHEELS:-$root/benchmarks/gpu_wheels}

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [[ -d $wheels ]]; then
  PIP_CONFIG_FILE=/dev/null "$python" -m pip --isolated install --quiet --disable-pip-version-check --no-index --no-deps \
    --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
fi
PYTHONPATH=$site:$root${PYTHONPATH:+:$PYTHONPATH} "$python" "$root/benchmarks/gpu_check.py" "$@"
