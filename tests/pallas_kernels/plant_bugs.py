"""Plants bugs in the kernels, one at a time in a copy of the tree, and says whether the tests notice.

    python tests/pallas_kernels/plant_bugs.py [part of a name ...]

Exit code 1 if a bug survives. A bug counts as caught when a test fails or the run does not end in time (an unmatched
DMA wait hangs). A substitution that no longer applies is an error: bring it up to date with the kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300  # seconds a bug
CRASHES = ("SyntaxError", "NameError", "TypeError")  # of the planted code itself, which says nothing of the tests
OP = "tests/pallas_kernels/test_paged_attention.py"
ITEMS_AND_TILES = "test_matches_the_oracle and h64-page16"


@dataclasses.dataclass(frozen=True)
class Bug:
    """`old` becomes `new` in `file`; `tests` are a file and pytest's -k."""

    name: str
    old: str
    new: str
    file: str
    tests: tuple[str, str]


tpu = functools.partial(Bug, file="pallas_kernels/paged_attention/tpu.py", tests=(OP, f"{ITEMS_AND_TILES} and tpu"))
ATTENTION = [
    tpu("attention: a missing wait", "            wait(count, half)\n", "", tests=(OP, "dmas")),
    tpu(
        "attention: a wait too many",
        "            wait(count, half)\n",
        "            wait(count, half)\n            wait(count, half)\n",
        tests=(OP, "dmas"),
    ),
    tpu(
        "attention: the last page is not waited for", "pl.loop(0, count)(", "pl.loop(0, count - 1)(", tests=(OP, "dmas")
    ),
    tpu(
        "attention: prefetch into the live buffer",
        "span.end, 1 - half)",
        "span.end, half)",
        tests=(OP, "dmas"),
    ),
    tpu(
        "attention: prefetch for the share before",
        "share * rows if other else (share + 1) * rows",
        "share * rows",
        tests=("tests/pallas_kernels/test_tpu_attention.py", "shares"),
    ),
    tpu(
        "attention: page id off by one",
        "copy(pages_ref[0, 0, at]",
        "copy(1 + pages_ref[0, 0, at]",
    ),
    tpu("attention: the next run's pages from this run", "fetch(kind, ref.next_pages", "fetch(kind, ref.pages"),
    tpu("attention: the parity of halves forgets earlier runs", "done + block + 2", "block + 2"),
    tpu("attention: no tail mask", "jnp.where(seen, scores, 2 * NEG)", "scores"),
    tpu("attention: stale V is not zeroed", "values = jnp.where(any_seen, values, 0)", "values = values"),
    tpu("attention: the newest token is not seen", "position <= _spread", "position < _spread"),
    tpu("attention: wrong scale", "spec.scale * LOG2E", "spec.scale"),
    tpu(
        "attention: swapped K and V scales",
        "key_scale, value_scale = (1.0",
        "value_scale, key_scale = (1.0",
        tests=(OP, "int8 and tpu"),
    ),
    tpu(
        "attention: swapped K and V",
        "reshape(chunk, width)\n",
        "reshape(chunk, width)\n                tokens = jnp.concatenate(jnp.split(tokens, 2, axis=1)[::-1], axis=1)\n",
    ),
    tpu(
        "attention: a row that sees nothing is divided by nothing",
        "total = jnp.where(l == 0, 1.0, l)",
        "total = l",
        tests=(OP, "padding_rows and tpu"),
    ),
    tpu(
        "attention: the window is one too long",
        "position - window, -1)",
        "position - window - 1, -1)",
        tests=(OP, "h64-page64-window and tpu"),
    ),
    tpu(
        "attention: pages before the window are not skipped right",
        "+ 1 - start, stride), 0)",
        "+ 1 - start, stride) + 1, 0)",
        tests=(OP, "h64-page64-window and tpu"),
    ),
    tpu(
        "attention: a block is called complete too early",
        "(page_size - 1) + stride, 0)",
        "(page_size - 1) + 2 * stride, 0)",
    ),
    tpu(
        "attention: the maximum is not carried over",
        "decay = jnp.exp2(m_ref[h, :padded] - m)",
        "decay = jnp.ones_like(m)",
    ),
    tpu(
        "attention: the shard's offset is forgotten",
        "base = start + limits[0]",
        "base = start",
        tests=(OP, "shards and tpu"),
    ),
    tpu("attention: a run's rows are not put back", "all_rows[at] = mine[:, lanes]", "_ = at"),
    tpu(
        "attention: a run forgets the runs before", "mine[:, lanes] = all_rows[at]", "mine[:, lanes] = all_rows[0] * 0"
    ),
    tpu(
        "attention: soft cap after the mask's scale",
        "jnp.tanh(scores) * (spec.soft_cap * LOG2E)",
        "jnp.tanh(scores) * spec.soft_cap",
        tests=(OP, "h256-cap and tpu"),
    ),
]

gpu = functools.partial(
    Bug,
    file="pallas_kernels/paged_attention/gpu.py",
    tests=("tests/pallas_kernels/test_gpu_attention.py", "matches_numpy"),
)
GPU_ATTENTION = [
    gpu("gpu: page id off by one", "page_stride < end, other=0)", "page_stride < end, other=0) + 1"),
    gpu("gpu: a block of the pages of the one before", "pages_of(block + 1)", "pages_of(block)"),
    gpu("gpu: no tail mask", "fetched[None] & (start + token[None] <= position[:, None])", "fetched[None]"),
    gpu("gpu: the newest token is not seen", "token[None] <= position[:, None]", "token[None] < position[:, None]"),
    gpu("gpu: an unmasked padding row", "<= position[:, None])", "<= jnp.maximum(position, start)[:, None])"),
    gpu("gpu: wrong scale", "(spec.scale * k_scale)", "spec.scale"),
    gpu("gpu: swapped K and V scales", "head, i] for i in (0, 1))", "head, i] for i in (1, 0))"),
    gpu("gpu: swapped K and V", "first + dims", "(h - first) + dims"),
    gpu("gpu: stale V is not zeroed", "0)[:, None] > 0, values, 0)", "0)[:, None] >= 0, values, 0)"),
    gpu("gpu: the maximum is not carried over", "old = jnp.exp2(m - high)", "old = jnp.ones_like(m)"),
    gpu("gpu: the last block is left out", "stored + (block_t - 1)", "stored"),
    gpu("gpu: the window is one too long", "position[:, None] - window", "position[:, None] - window - 1"),
    gpu("gpu: the shard's offset is forgotten", "* spec.page_stride + offset + cell", "* spec.page_stride + cell"),
    gpu("gpu: the log-sum-exp stays in units of log 2", "(m + jnp.log2(total)) / LOG2E", "(m + jnp.log2(total))"),
    gpu("gpu: a row in one run is merged", "pl.when(count != 1)", "pl.when(count != 0)"),
    gpu("gpu: a padding row is left as it is", "pl.when(count != 1)", "pl.when(count > 1)"),
    gpu("gpu: parts merged with equal weights", "jnp.exp(lse - highest[None])", "1.0"),
    gpu("gpu: sums of earlier parts not rescaled", "old = jnp.exp(high - highest)", "old = jnp.ones_like(high)"),
    gpu("gpu: the last parts are left out", "lax.div(count + (block - 1), block)", "lax.div(count, block)"),
    gpu(
        "gpu: a tile's results in the items' places",
        "put(partial, first_place + run",
        "put(partial, run",
        tests=(OP, f"{ITEMS_AND_TILES} and gpu"),
    ),
]

xla = functools.partial(Bug, file="pallas_kernels/paged_attention/xla.py", tests=(OP, "xla"))
XLA_ATTENTION = [
    xla(
        "xla: blocks without the maximum",
        "jnp.exp(a.m - high), jnp.exp(b.m - high)",
        "1.0 + 0 * a.m, 1.0 + 0 * b.m",
    ),
    xla("xla: the larger maximum is not kept", "new[..., None], high, a.l", "new[..., None], b.m, a.l"),
    xla("xla: a branch too small by one", "(amount > size)", "(amount > size + 1)"),
    xla("xla: a tile's last row is left out", ".sum(1).max()", ".sum(1).max() - 1"),
    xla(
        "xla: the last page of an item",
        "pages = _ceil_div(part.length.max(),",
        "pages = _ceil_div(part.length.max() - 1,",
    ),
    xla(
        "xla: the pages of the shortest item",
        "pages = _ceil_div(part.length.max()",
        "pages = _ceil_div(part.length.min()",
    ),
    xla(
        "xla: the last block of a tile",
        "blocks = _ceil_div(part.length.max(),",
        "blocks = _ceil_div(part.length.max() - 1,",
    ),
    xla(
        "xla: blocks before the window are not skipped right",
        "part.start).min(), 0) // block",
        "part.start).min(), 0) // block + 1",
        tests=(OP, "window and xla"),
    ),
]

work = functools.partial(
    Bug, file="pallas_kernels/paged_attention/work.py", tests=("tests/pallas_kernels/test_work_list.py", "")
)
merge = functools.partial(
    Bug, file="pallas_kernels/paged_attention/partial.py", tests=(OP, f"{ITEMS_AND_TILES} and xla")
)
WORK_AND_MERGE = [
    work("work: the newest token is left out", "self.table.positions[end - 1] + 1", "self.table.positions[end - 1]"),
    work(
        "work: a tile's end by its first row",
        "np.maximum.at(highest, tile, self.work.positions[rows])",
        "highest[tile[::-1]] = self.work.positions[rows][::-1]",
    ),
    work(
        "work: a run's last, partly full page is left out",
        "pages = _ceil_div(length, self.page_size)",
        "pages = length // self.page_size",
    ),
    work("work: a run starts a page late", "= start * self.page_size,", "= (start + 1) * self.page_size,"),
    work("work: the group's last page is read again", "done[members] = end", "done[members] = end - 1"),
    work("work: a group on one page too many", "split + int(differs.argmax())", "split + int(differs.argmax()) + 1"),
    work("work: a group within one that found no room", " or (done[members] != start).any()", ""),
    work(
        "work: a tile's results in the items' places",
        "base = 0 if runs is self.work.items else",
        "base = 0 if True else",
    ),
    work(
        "work: the last result is not merged", "build.counts.max(initial=0)", "max(build.counts.max(initial=0) - 1, 0)"
    ),
    merge("merge: with equal weights", "jnp.exp(lse - high[:, None])", "1.0"),
    merge("merge: a result that is none", "(work.parts < 0)", "(work.parts < -1)"),
    merge(
        "merge: a padding row is divided by zero",
        "safe = jnp.where(total == 0, 1.0, total)",
        "safe = total",
        tests=(OP, "padding_rows and xla"),
    ),
    merge("merge: the sum is not in the log-sum-exp", "high + jnp.log(safe)", "high"),
    merge(
        "merge: rows and query heads swapped",
        "reshape(x, k, rows, g, h).transpose(0, 2, 1, 3, 4)",
        "reshape(x, k, g, rows, h).transpose(0, 3, 1, 2, 4)",
    ),
]

append = functools.partial(
    Bug,
    file="pallas_kernels/kv_append/tpu.py",
    tests=("tests/pallas_kernels/test_kv_append.py", "matches_oracle and tpu"),
)
packed = functools.partial(append, file="pallas_kernels/kv_append/xla.py")
IN_ORDER = ("tests/pallas_kernels/test_kv_append.py", "copies_are_in_order")
APPEND = [
    append("append: a missing wait", "        read(job).wait()\n", "", tests=IN_ORDER),
    append(
        "append: a wait too many",
        "        read(job).wait()\n",
        "        read(job).wait()\n        read(job).wait()\n",
        tests=IN_ORDER,
    ),
    append(
        "append: a buffer's write is not waited for",
        "jnp.maximum(job - ring, blocker) + 1",
        "blocker + 1",
        tests=IN_ORDER,
    ),
    append(
        "append: the last writes are not waited for",
        "    pl.loop(written, count)(lambda done: write(done).wait())\n",
        "",
        tests=IN_ORDER,
    ),
    append(
        "append: a slab is read before an earlier job wrote it",
        "(job >= back) & (slabs[other]",
        "(job < 0) & (slabs[other]",
    ),
    append(
        "append: written back before it is changed",
        "        read(job).wait()\n",
        "        read(job).wait()\n        write(job).start()\n",
        tests=IN_ORDER,
    ),
    append("append: wrong cell", "== cells[row] - slabs[job] * slab", "== cells[row] + 1 - slabs[job] * slab"),
    append("append: wrong layer", "kv_hbm.at[layer[0], lax", "kv_hbm.at[0, lax"),
    append(
        "append: a padding row is written",
        "== cells[row] - slabs[job] * slab",
        "== jnp.maximum(cells[row] - slabs[job] * slab, 0)",
    ),
    append("append: rows of the first grid step again", "new(row - origin)", "new(row)", tests=IN_ORDER),
    append(
        "append: a job's last row is left out",
        "@pl.loop(begins[job], begins[job + 1])",
        "@pl.loop(begins[job], begins[job + 1] - 1)",
    ),
    packed("append: swapped K and V", "prepare(k, 0), prepare(v, 1)", "prepare(v, 0), prepare(k, 1)"),
    packed("append: swapped K and V scales", "kv_scales[layer, :, side, None]", "kv_scales[layer, :, 1 - side, None]"),
    packed("append: another layer's scale", "kv_scales[layer, :", "kv_scales[0, :"),
    packed(
        "append: not clipped",
        "jnp.clip(jnp.rint(new) if integer else new, float(info.min), float(info.max))",
        "jnp.rint(new) if integer else new",
    ),
    packed(
        "append: the shard's offset is forgotten",
        "% page_stride - page_offset",
        "% page_stride",
        tests=("tests/pallas_kernels/test_kv_append.py", "page_sharded and tpu"),
    ),
]

lora = functools.partial(
    Bug, file="pallas_kernels/lora/tpu.py", tests=("tests/pallas_kernels/test_lora.py", "matches_oracle and tpu")
)
TILES = ("tests/pallas_kernels/test_lora.py", "test_tpu_tiles")
LORA = [
    lora("lora: wrong slot", "active[0]) - 1, 0)", "active[0]), 0)"),
    lora("lora: wrong layer", "return layer[0], jnp", "return 0, jnp"),
    lora(
        "lora: an unmasked row without an adapter",
        "(slots_ref[...] == slot_of) & (slot_of > 0)",
        "slots_ref[...] == slot_of",
    ),
    lora("lora: the output is not cleared", "@pl.when(group == 0)", "@pl.when(group < 0)"),
    lora("lora: stale hidden values", "@pl.when(used & (j == 0))", "@pl.when(used & (j == 0) & (group == 0))"),
    lora("lora: another adapter overwrites", "out_ref[:, columns] += new", "out_ref[:, columns] = new"),
    lora("lora: every adapter's hidden values", "jnp.where(own, _down(x_ref, downs), 0.0)", "_down(x_ref, downs)"),
    lora(
        "lora: a piece of A is left out", "lax.fori_loop(0, din // lanes", "lax.fori_loop(1, din // lanes", tests=TILES
    ),
    lora("lora: the last adapter in use is left out", "for i in range(together):", "for i in range(together - 1):"),
    lora("lora: the last block of B for every one", "jnp.where(used, j, steps - 1)", "steps - 1", tests=TILES),
]

gpu_product = functools.partial(
    Bug,
    file="pallas_kernels/linear/gpu.py",
    tests=("tests/pallas_kernels/test_linear.py", "bfloat16 or (gpu and adapters)"),
)
gpu_lora = functools.partial(gpu_product, file="pallas_kernels/lora/gpu.py")
GPU_PRODUCTS = [
    gpu_product(
        "gpu product: a part's last block is left out", "lax.fori_loop(first, end,", "lax.fori_loop(first, end - 1,"
    ),
    gpu_product("gpu product: every part adds all adapters", "(part, parts), dout", "(0, 1), dout"),
    gpu_product("gpu product: always the first layer", "x_ref.shape[1], layer_ref[0]", "x_ref.shape[1], 0"),
    gpu_lora("gpu product: always the first layer's A", "a_ref.at[layer,", "a_ref.at[0,"),
    gpu_lora("gpu product: always the first layer's B", "b_ref.at[layer,", "b_ref.at[0,"),
    gpu_lora("gpu product: another slot's A", "slot - 1, r[:, None], at]", "slot, r[:, None], at]"),
    gpu_lora("gpu product: every slot's hidden values", "((own == slot) & (slot > 0))[:, None]", "(own > 0)[:, None]"),
    gpu_lora(
        "gpu product: the last part of the inputs is left out", "for i in range(parts):", "for i in range(parts - 1):"
    ),
    gpu_lora("gpu product: the first pair's columns for all", "        start += width\n", ""),
    gpu_lora("gpu product: a group's columns in every group", "* width + place", "* 0 + place"),
    gpu_lora("gpu product: the first pair's hidden values for all", "hidden_ref.at[pair, i,", "hidden_ref.at[0, i,"),
]

# A bug that keeps the source from compiling is not caught: XLA's program then serves.
cpu_attention = functools.partial(
    Bug, file="pallas_kernels/paged_attention/cpu.cc", tests=(OP, "test_matches_the_oracle and cpu")
)
cpu_linear = functools.partial(
    Bug, file="pallas_kernels/linear/cpu.cc", tests=("tests/pallas_kernels/test_linear.py", "cpu")
)
cpu_quantised = functools.partial(
    Bug,
    file="pallas_kernels/linear/cpu_quantised.cc",
    tests=("tests/pallas_kernels/test_quantised_panels.py", "matches or exact or depend or size"),
)
cpu_lora = functools.partial(Bug, file="pallas_kernels/lora/cpu.cc", tests=("tests/pallas_kernels/test_lora.py", "cpu"))
CPU = [
    cpu_attention("cpu: a row does not see itself", "(place <= until)", "(place < until)"),
    cpu_attention("cpu: sums of earlier blocks not rescaled", "std::exp(m[lane] - high)", "1.0f"),
    cpu_attention("cpu: parts merged with equal weights", "share = std::exp(*m - now)", "share = 1.0f"),
    cpu_attention("cpu: reads beyond a run's length", "t < tokens && token < length;", "t < tokens;"),
    cpu_attention("cpu: the cap scales nothing", "spec.soft_cap * std::tanh(", "std::tanh("),
    cpu_linear("cpu: later inputs overwrite the first ones' sum", "dout, d > 0);", "dout, false);"),
    cpu_linear("cpu: the last input left out", "std::min(kDepth, din - d),", "std::min(kDepth, din - d - 1),"),
    cpu_linear("cpu: always the first layer", "layer.typed_data()[0] * panels * size", "0"),
    cpu_linear("cpu: later rows computed of the first ones", "(size_t)row * din + d", "d"),
    cpu_linear("cpu: the last panel of a share left out", "panel < last; ++panel", "panel < last - 1; ++panel"),
    cpu_quantised("cpu: 4-bit weights without minima not centred", "(HasMinima ? 0 : 8)", "0"),
    cpu_quantised("cpu: minima left out", "if (HasMinima) {", "if (false) {"),
    cpu_quantised("cpu: minima times the integers' sum", "to.scale[r] * sum;", "sum;"),
    cpu_quantised("cpu: single precision read as half", "if (!half) return", "if (false) return"),
    cpu_quantised("cpu: always the first layer of blocks", "layer.typed_data()[0] * panels * blocks", "0"),
    cpu_quantised("cpu: inputs rounded down", "* inverse + shift;", "* inverse - 0.4f + shift;"),
    cpu_quantised("cpu: an input that is not a number counts as 0", "spoilt += v * 0.0f;", ""),
    cpu_quantised("cpu: the last rows computed of the first tile", "tile * R + r, rows - 1", "r, rows - 1"),
    cpu_quantised("cpu: a tile between two groups left out", "group += kGroup)", "group += kGroup + 1)"),
    cpu_lora("cpu: always the first layer's adapters", "(size_t)layer.typed_data()[0] * num_slots", "0"),
    cpu_lora("cpu: the trunk's rows adapted", "slot <= 0 || slot", "slot < 0 || slot"),
    cpu_lora(
        "cpu: the tail of the inputs left out",
        "for (int i = d; i < din; ++i) total",
        "for (int i = d; i < d; ++i) total",
    ),
    cpu_lora("cpu: lanes of an adapter overwrite each other", "hidden[r * rank + first + j]", "hidden[r * rank + j]"),
    cpu_lora("cpu: a slot's last rows left out", "if (!unit.empty())", "if (unit.size() > 1)"),
    cpu_lora("cpu: rows scattered to the wrong place", "to + (size_t)unit[i] * dout", "to + (size_t)i * dout"),
    cpu_lora("cpu: rows that no adapter meets are garbage", "(size_t)rows * dout, 0.0f)", "(size_t)rows * dout, 1.0f)"),
    cpu_lora(
        "cpu: half of a panel from the other half",
        "sums[r][1] += x * b1;",
        "sums[r][1] += x * b0;",
        file="pallas_kernels/cpu_kernels.h",
    ),
]

BUGS = [*ATTENTION, *GPU_ATTENTION, *XLA_ATTENTION, *WORK_AND_MERGE, *APPEND, *LORA, *GPU_PRODUCTS, *CPU]


def run_tests(tests: tuple[str, str], bug: Bug | None) -> tuple[bool, str]:
    """Whether the tests fail in a copy of the tree with the bug, and the first line that says how.

    Raises ValueError if the substitution does not apply exactly once or is no code that works, RuntimeError if pytest
    itself could not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for part in ("pallas_kernels", "icarus_jax", "tests"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        if bug:
            file = tree / bug.file
            text = file.read_text()
            if text.count(bug.old) != 1:
                raise ValueError(f"{bug.name}: {bug.old!r} occurs {text.count(bug.old)} times in {bug.file}, not once")
            file.write_text(text.replace(bug.old, bug.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", tests[0], "-k", tests[1]]
        try:
            done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return True, f"no end within {LIMIT} s"
    output = done.stdout + done.stderr
    if done.returncode not in (0, 1):  # 1 is also what pytest-timeout ends a hanging run with
        raise RuntimeError(f"pytest could not run {' '.join(tests)}: {output[-2000:]}")
    telling = [line for line in output.splitlines() if line.startswith(("E  ", "FAILED")) or "Timeout" in line]
    how = (telling or ["passed"])[0].strip()
    if bug and any(crash in how for crash in CRASHES):
        raise ValueError(f"{bug.name}: {bug.new!r} in {bug.file} does not work: {how}")
    return done.returncode != 0, how


def main(names: list[str]) -> int:
    if unknown := [name for name in names if not any(name in bug.name for bug in BUGS)]:
        raise SystemExit(f"no such bug: {', '.join(unknown)}; known: {', '.join(bug.name for bug in BUGS)}")
    bugs = [bug for bug in BUGS if not names or any(name in bug.name for name in names)]
    begin = time.monotonic()
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
    print(f"{len(bugs) - survivors} of {len(bugs)} caught in {time.monotonic() - begin:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
