#!/usr/bin/env bash
# Prepares tests/gpu_check.sh for a lent machine with jax 0.11 on Python 3.12 and no network: fetches the wheels that it
# lacks to results/gpu_wheels (ignored by git: name the folder in `carry`), and runs the tiny form.
#
# Nothing else travels: weights are drawn on the device, and programs are compiled there, since those that jax 0.10
# compiles here are none for jax 0.11.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
wheels=results/gpu_wheels
rm -rf "$wheels"
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_31_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    -d "$wheels" gguf==0.19.0 llguidance==1.9.1 ml_collections==1.1.0
echo "wheels: $(du -sh "$wheels" | cut -f1); the tree without them: $(git ls-files -z -co --exclude-standard | du -ch --files0-from=- | tail -1 | cut -f1) of 64M"
PYTHON="$python" OUT=results/gpu_check_tiny GPU_CHECK_TINY=1 bash tests/gpu_check.sh
echo 'device tool: run, command="bash tests/gpu_check.sh", carry=["results/gpu_wheels"], timeout_s=520'
