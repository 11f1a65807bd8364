#!/usr/bin/env bash
# Wheels of what lit_rl needs beside torch and lightning, for a GPU machine that has no network: about 4 MB.
#
#     bash benchmarks/gpu_wheels.sh [PYTHON_VERSION]        # 3.12 by default; PYTHON names the interpreter with pip
#
# They go to benchmarks/gpu_wheels/, which git ignores and benchmarks/gpu_check.sh reads. tensordict 0.12 is the release
# that followed torch 2.11; its extension uses nothing of torch's own libraries, so it loads beside any torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VERSION=${1:-3.12}
NEEDED=(
  gymnasium==1.2.2 farama-notifications==0.0.6 cloudpickle==3.1.3
  tensordict==0.12.4 orjson==3.13.0 pyvers==0.2.3 importlib-metadata==10.2.0 zipp
  jsonargparse==4.53.0 docstring-parser==0.18.0 typeshed-client==2.15.0 importlib-resources
  pytest-timeout==2.4.0
)
PLATFORMS=()
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux_2_12 manylinux2014 manylinux1; do
  PLATFORMS+=(--platform "${platform}_x86_64")
done

rm -rf gpu_wheels
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --implementation cp --python-version "$VERSION" "${PLATFORMS[@]}" --dest gpu_wheels "${NEEDED[@]}"
du -sh gpu_wheels
