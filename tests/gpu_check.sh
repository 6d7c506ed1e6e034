#!/usr/bin/env bash
# What one H100 can tell in eight minutes: are the kernels right, how fast is a step, how fast is attention, and the
# paper's table. NOTHING HERE HAS RUN ON A DEVICE YET (2026-11-28): it was run on a CPU in its tiny form, with jax 0.10.2
# and 0.11.2, and its kernels were compiled for an H100.
#
#     bash tests/gpu_check_prepare.sh     first, on the machine with a network: wheels that the lent one lacks
#     bash tests/gpu_check.sh             on the machine with the GPU; PYTHON=..., OUT=... as needed
#     GPU_CHECK_TINY=1 bash tests/gpu_check.sh      on a CPU, in a minute: tests/pallas_kernels/test_gpu_check.py
#     bash tests/gpu_check.sh attention table       these parts alone
#
# With the device tool: run, command="bash tests/gpu_check.sh", carry=["results/gpu_wheels"], timeout_s=520.
#
# Each part has a limit of its own, and writes its JSON to $OUT whenever a figure is there. The last one gets what the
# others have left of the eight minutes. Exit status: how many parts failed.
#
#     oracles    every kernel against its oracle in float64
#     steps      decode steps of Llama-3.1-8B's shape and of SmolLM2's, beside the bytes that they have to read; a profile
#     attention  variants of attention, merge and append apart, others' attention, the products
#     table      agents on 8, 4 and 2 heads, shared against isolated, measured and simulated
set -u
cd "$(dirname "$0")/.."
export OUT="${OUT:-results/gpu_check}"
python="${PYTHON:-python3}"
seconds="${GPU_CHECK_SECONDS:-480}"
mkdir -p "$OUT"

if [ "${GPU_CHECK_TINY:-}" = 1 ]; then
    export JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1
else
    # As in the runs of docs/kernels.md: XLA's own search for the fastest products takes minutes.
    export XLA_FLAGS="${XLA_FLAGS:---xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false}"
    export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 TF_CPP_MIN_LOG_LEVEL=2
    # Parts, and a second run on the same machine, compile the same programs.
    export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/results/gpu_cache}"
fi
export PYTHONUNBUFFERED=1 JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3

failed=0
part() { # name, most seconds
    local limit=$(($2 < seconds - SECONDS ? $2 : seconds - SECONDS)) status=0 begin=$SECONDS
    if [ "$limit" -lt 5 ]; then
        echo "== $1: no time left"
        status=124
    else
        echo "== $1: at most $limit s"
        timeout --kill-after=5 "$limit" "$python" -m "tests.gpu_check.$1" || status=$?
        echo "== $1: $((SECONDS - begin)) s, status $status (0: right, 1: see FAILED above, 124 or 137: past its limit)"
    fi
    [ "$status" = 0 ] || failed=$((failed + 1))
}

main() {
    if ! "$python" -c "import gguf, llguidance, ml_collections" 2>/dev/null; then
        "$python" -m pip install -q --no-index --no-deps --no-compile --target /tmp/gpu_check_site results/gpu_wheels/*.whl
        export PYTHONPATH="/tmp/gpu_check_site${PYTHONPATH:+:$PYTHONPATH}"
    fi
    command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.used --format=csv
    for name in "${@:-oracles steps attention table}"; do
        for one in $name; do
            case "$one" in
            oracles) part oracles 75 ;;
            steps) part steps 140 ;;
            attention) part attention 90 ;;
            table) part table "$seconds" ;;
            *) echo "no part $one" && failed=$((failed + 1)) ;;
            esac
        done
    done
    echo "== $failed parts failed, $SECONDS s, results in $OUT"
    return "$failed"
}

main "$@" 2>&1 | tee "$OUT/log.txt"
exit "${PIPESTATUS[0]}"
