"""Plants bugs in the TPU kernel, one at a time in a copy of the tree, and says whether the tests notice.

    python tests/plant_bugs.py [name ...]

Exit code 1 if a bug survives. A bug counts as caught when a test fails or the run does not end in time (an unmatched
DMA wait hangs). A substitution that no longer applies is an error: bring it up to date with the kernel.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds a bug
TPU = "pallas_kernels/paged_attention/tpu.py"
VALUES = ("tests/test_paged_attention.py", "-k", "test_matches_the_oracle and tpu and h64-page16")
DMAS = ("tests/test_paged_attention.py", "-k", "dmas")


@dataclasses.dataclass(frozen=True)
class Bug:
    """`old` becomes `new` in `file`; `tests` are pytest's arguments."""

    name: str
    old: str
    new: str
    tests: tuple[str, ...] = VALUES
    file: str = TPU


BUGS = [
    Bug("a missing wait", "        wait(count, slot)\n", "", DMAS),
    Bug(
        "a wait too many", "        wait(count, slot)\n", "        wait(count, slot)\n        wait(count, slot)\n", DMAS
    ),
    Bug("the last page is not waited for", "pl.loop(0, count)(", "pl.loop(0, count - 1)(", DMAS),
    Bug("prefetch into the live buffer", "fetch(block + 1, 1 - slot)", "fetch(block + 1, slot)", DMAS),
    Bug("prefetch after the end of the list", "owner < pl.num_programs(0)", "owner <= pl.num_programs(0)", DMAS),
    Bug(
        "page id off by one", "copy(jnp.where(ours, pages_ref[0, 0, at]", "copy(jnp.where(ours, 1 + pages_ref[0, 0, at]"
    ),
    Bug("the next run's pages from this run", "next_pages_ref[0, 0, at])", "pages_ref[0, 0, at])"),
    Bug("slot parity forgets earlier runs", "plan.earlier[run] + block + 2", "block + 2"),
    Bug("no tail mask", "jnp.where(seen, scores, 2 * NEG)", "scores"),
    Bug("stale V is not zeroed", "values = jnp.where(any_seen, values, 0)", "values = values"),
    Bug("the newest token is not seen", "position <= _spread", "position < _spread"),
    Bug("wrong scale", "spec.scale * LOG2E", "spec.scale"),
    Bug(
        "swapped K and V scales",
        "key_scale, value_scale = (1.0",
        "value_scale, key_scale = (1.0",
        (*VALUES[:2], "int8 and tpu"),
    ),
    Bug(
        "swapped K and V",
        "reshape(chunk, width)\n",
        "reshape(chunk, width)\n            tokens = jnp.concatenate(jnp.split(tokens, 2, axis=1)[::-1], axis=1)\n",
    ),
    Bug("an unmasked padding row", "live = (l > 0) &", "live = (l >= 0) | ", (*VALUES[:2], "partial_results and tpu")),
    Bug(
        "the window is one too long",
        "runs.positions - spec.window",
        "runs.positions - spec.window - 1",
        (*VALUES[:2], "h64-page64-window and tpu"),
    ),
    Bug(
        "pages before the window are not skipped right",
        "+ 1 - runs.start) // stride, 0)",
        "+ 1 - runs.start) // stride + 1, 0)",
        (*VALUES[:2], "h64-page64-window and tpu"),
    ),
    Bug("a block is called complete too early", "(page_size - 1)) // stride + 1", "(page_size - 1)) // stride + 2"),
    Bug("the maximum is not carried over", "decay = jnp.exp2(m_ref[h] - m)", "decay = jnp.ones_like(m)"),
    Bug(
        "the shard's offset is forgotten",
        "base = runs.start + page_offset",
        "base = runs.start",
        (*VALUES[:2], "shards and tpu"),
    ),
    Bug(
        "soft cap after the mask's scale",
        "jnp.tanh(scores) * (spec.soft_cap * LOG2E)",
        "jnp.tanh(scores) * spec.soft_cap",
        (*VALUES[:2], "h256-cap and tpu"),
    ),
]


def run_tests(tests: tuple[str, ...], bug: Bug | None) -> tuple[bool, str]:
    """Whether the tests fail in a copy of the tree with the bug, and the first line that says how.

    Raises ValueError if the substitution does not apply exactly once, RuntimeError if pytest itself could not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for part in ("pallas_kernels", "tests"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        if bug:
            file = tree / bug.file
            text = file.read_text()
            if text.count(bug.old) != 1:
                raise ValueError(f"{bug.name}: {bug.old!r} occurs {text.count(bug.old)} times in {bug.file}, not once")
            file.write_text(text.replace(bug.old, bug.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", *tests]
        try:
            done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return True, f"no end within {LIMIT} s"
    output = done.stdout + done.stderr
    if done.returncode not in (0, 1):  # 1 is also what pytest-timeout ends a hanging run with
        raise RuntimeError(f"pytest could not run {' '.join(tests)}: {output[-2000:]}")
    telling = [line for line in output.splitlines() if line.startswith(("E  ", "FAILED")) or "Timeout" in line]
    return done.returncode != 0, (telling or ["passed"])[0].strip()


def main(names: list[str]) -> int:
    unknown = set(names) - {bug.name for bug in BUGS}
    if unknown:
        raise SystemExit(f"no such bug: {', '.join(sorted(unknown))}; known: {', '.join(bug.name for bug in BUGS)}")
    bugs = [bug for bug in BUGS if not names or bug.name in names]
    for tests in dict.fromkeys(bug.tests for bug in bugs):
        fails, how = run_tests(tests, None)
        if fails:
            raise SystemExit(f"{' '.join(tests)} fails without any bug: {how}")
    survivors = 0
    for bug in bugs:
        start = time.monotonic()
        fails, how = run_tests(bug.tests, bug)
        survivors += not fails
        print(
            f"{'caught' if fails else 'NOT CAUGHT':10} {bug.name} ({time.monotonic() - start:.0f} s): {how}", flush=True
        )
    print(f"{len(bugs) - survivors} of {len(bugs)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
