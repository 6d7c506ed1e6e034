#!/usr/bin/env bash
# Prepares tests/gpu_heads.sh for a lent machine with jax 0.11 on Python 3.12 and no network: the wheels that it lacks,
# the data, the trunk in two halves (64 MiB travel in a call), and the trunk's own chats, which hold it near the original.
# The folders are ignored by git: name them in `carry`.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
shared="${DATA:-../shared/data}"
to=results/gpu_heads
mkdir -p "$to/first" "$to/second/data"
[ -s "$to/second/data/chats.jsonl" ] || "$python" examples/own_chats.py "$to/second/data/chats.jsonl" math tools
for name in banking77 snips geography gsm8k; do cp "$shared/${name}"_{train,dev}.jsonl "$to/second/data/"; done
cp "$shared/geography.sqlite" "$shared/HumanEval.jsonl.gz" "$to/second/data/"
trunk=$("$python" -c 'from icarus_jax.cli import serving_config; from icarus_jax.weights.sources import resolve; print(resolve(serving_config().trunk.source))')
split -n 2 -d "$trunk" "$to/half"
mv "$to/half00" "$to/first/trunk0"
mv "$to/half01" "$to/second/trunk1"
cp "$(dirname "$trunk")/source.json" "$to/second/"
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_31_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 -d "$to/second/wheels" $("$python" -m pip list --format=freeze |
        grep -iE '^(gguf|llguidance|ml_collections|grain|array_record|more-itertools|portpicker|tensorboardX|fastapi|starlette|pydantic|pydantic_core|annotated-types|typing-inspection|uvicorn|python-multipart|opentelemetry-api|sse-starlette)==')
echo "first: $(du -sh "$to/first" | cut -f1), second: $(du -sh "$to/second" | cut -f1), the tree without them: $(git ls-files -z -co --exclude-standard | du -ch --files0-from=- | tail -1 | cut -f1); 64M a call"
