#!/usr/bin/env bash
# Prepares tests/gpu_heads.sh for a lent machine with jax 0.11 on Python 3.12 and no network: the wheels that it lacks,
# the data, the trunk's own chats, which hold it near the original (on questions of none of the tasks), general texts, and
# the trunk in three parts, as 64 MiB travel in a call. The folders are ignored by git: name them in `carry`.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
shared="${DATA:-../shared/data}"
to=results/gpu_heads
rm -rf "$to/last/wheels"
mkdir -p "$to/last/data/texts"
[ -s "$to/last/data/chats.jsonl" ] || "$python" -c '
import sys
sys.path[:0] = [".", "examples"]
import own_chats
own_chats.main(sys.argv[1], "tools", rows=600)' "$to/last/data/chats.jsonl"
for name in banking77 snips geography gsm8k; do cp "$shared/${name}"_{train,dev}.jsonl "$to/last/data/"; done
cp "$shared/geography.sqlite" "$shared/HumanEval.jsonl.gz" "$to/last/data/"
gzip -dc "$shared/HumanEval.jsonl.gz" >"$to/last/data/texts/HumanEval.jsonl"
cp "$shared/gsm8k_dev.jsonl" "$to/last/data/texts/"
"$python" -c '
import importlib.metadata, pathlib, sys
for name in ("rich", "fastapi", "pydantic", "httpx"):
    pathlib.Path(sys.argv[1], f"{name}.txt").write_text(importlib.metadata.metadata(name).get_payload())' "$to/last/data/texts"
trunk=$("$python" -c 'from icarus_jax.cli import serving_config; from icarus_jax.weights.sources import resolve; print(resolve(serving_config().trunk.source))')
split -n 3 -d -a 1 "$trunk" "$to/trunk"
for i in 0 1 2; do mkdir -p "$to/part$i" && mv "$to/trunk$i" "$to/part$i/trunk$i"; done
cp "$(dirname "$trunk")/source.json" "$to/last/"
"$python" -m pip download -qq --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_31_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 -d "$to/last/wheels" $("$python" -m pip list --format=freeze |
        grep -iE '^(gguf|llguidance|ml_collections|grain|array_record|more-itertools|portpicker|tensorboardX|fastapi|starlette|pydantic|pydantic_core|annotated-types|typing_extensions|typing-inspection|uvicorn|python-multipart|opentelemetry-api|sse-starlette)==')
ls "$to/last/wheels" | wc -l
du -sh "$to"/*
echo "the tree without them: $(git ls-files -z -co --exclude-standard | du -ch --files0-from=- | tail -1 | cut -f1); 64M a call"
