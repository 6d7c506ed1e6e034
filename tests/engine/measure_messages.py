"""What a step's message to other hosts costs: python -m tests.engine.measure_messages [SEQUENCES ...]."""

from __future__ import annotations

import socket
import sys
import threading
import time

import numpy as np

from icarus_jax.config import EngineConfig
from icarus_jax.engine.buckets import make_buckets
from icarus_jax.engine.host_link import CALL, Link
from icarus_jax.engine.host_messages import MAX_BYTES, decode, encode
from icarus_jax.engine.sample_inputs import packed_width, unpack
from icarus_jax.engine.step_batch import StepBatch, empty_step, rows_in
from pallas_kernels.paged_attention import SequenceRows
from pallas_kernels.paged_attention.work import RowTable, fill_work

VOCAB, TOKENS = 128_256, 2000


def step_batch(sequences: int, sampled: bool, kernels: str = "tpu") -> StepBatch:
    """A decode step of sequences with heads at about TOKENS tokens each, or at as many as fit; seeds differ."""
    config = EngineConfig(max_num_seqs=sequences)
    length = min(TOKENS, config.max_model_len - 2)
    buckets = make_buckets(config, True, kernels)
    bucket = next(b for b in buckets if b.writers == b.logits == b.readers == sequences)
    rng = np.random.default_rng(0)
    ints = lambda n, top: rng.integers(0, top, n).astype(np.int32)  # noqa: E731
    rows = 2 * sequences
    per_seq = -(-length // config.page_size)
    tables = rng.permutation(sequences * per_seq).astype(np.int32).reshape(sequences, per_seq)
    seqs = [SequenceRows(np.array([i, sequences + i]), np.array([length - 1] * 2), tables[i]) for i in range(sequences)]
    step = empty_step(bucket, 8)
    inputs = rows_in(step, bucket, 8)
    inputs.tokens[:], inputs.slots[:], inputs.active[:] = ints(rows, VOCAB), ints(rows, 8), ints(8, 8)
    inputs.kv_cells[:], inputs.sample_rows[:] = ints(sequences, 1 << 20), ints(sequences, rows)
    fill_work(inputs.work, RowTable.of(seqs), bucket.work, config.page_size)
    variant = "random" if sampled else "greedy"
    sampling = np.zeros((sequences, packed_width(config.max_model_len, variant)), np.int32)
    if sampled:
        x = unpack(sampling, variant)
        x.temperature[:], x.seed[:], x.position[:] = 0.7, ints(sequences, 1 << 30), ints(sequences, length)
    return StepBatch(bucket, step, sampling, variant, [1] * sequences, {})


def microseconds(call, seconds: float = 1.0) -> float:
    """The median time of a call."""
    times, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return float(np.median(times)) * 1e6


def main(counts: list[int]) -> None:
    """Prints a line for each number of sequences."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        a, b = socket.create_connection(server.getsockname()), server.accept()[0]
    there, here = Link(a, (b"1", b"2"), "b", 10, MAX_BYTES), Link(b, (b"2", b"1"), "a", 10, MAX_BYTES)

    def answer() -> None:
        while True:
            here.receive()
            here.send(CALL)

    threading.Thread(target=answer, daemon=True).start()
    for count in counts:
        for sampled in (False, True):
            batch = step_batch(count, sampled)
            call = ("launch", batch.bucket, batch.step)
            message = bytearray(encode(call))

            def there_and_back(body: bytes = bytes(message)) -> None:
                there.send(CALL, body)
                there.receive()

            print(
                f"{count} sequences, {'sampled' if sampled else 'greedy'}: {len(message)} bytes; "
                f"encode {microseconds(lambda c=call: encode(c)):.0f} us, "
                f"decode {microseconds(lambda m=message: decode(m)):.0f} us, "
                f"over loopback TCP and an empty answer {microseconds(there_and_back):.0f} us"
            )


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [64, 256])
