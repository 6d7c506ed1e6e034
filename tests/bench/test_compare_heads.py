"""The comparison of heads: differences and their ranges over rows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from icarus_jax.bench import compare_heads
from icarus_jax.errors import UsageError


def write(path, scores, data="d"):
    """Writes a file of answers; `scores` has a list of scores for each model."""
    lines = [{"hash": "h", "task": "intent", "data": data}]
    for model, values in scores.items():
        lines += [{"model": model, "row": row, "score": score} for row, score in enumerate(values)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def exact(values):
    return [{"exact_match": bool(value)} for value in values]


def test_the_difference_and_its_range_are_those_of_a_binomial(tmp_path):
    """Of independent rows; the normal range of a difference of paired means is the reference."""
    rng = np.random.default_rng(1)
    ours, theirs = rng.random(1000) < 0.9, rng.random(1000) < 0.85
    file = write(tmp_path / "a", {"a": exact(ours), "b": exact(theirs)})
    figure = compare_heads.run([file], ["a"], ["b"])["exact_match"]
    pairs = ours.astype(float) - theirs
    assert figure["heads"] == round(ours.mean(), 4)
    assert figure["baseline"] == round(theirs.mean(), 4)
    assert figure["difference"] == round(pairs.mean(), 4)
    spread = 1.96 * pairs.std() / 1000**0.5
    np.testing.assert_allclose(figure["range"], [pairs.mean() - spread, pairs.mean() + spread], atol=0.1 * spread)


def test_the_same_answers_differ_by_nothing_and_seeds_are_averaged(tmp_path):
    same, worse = exact([1, 0, 1, 1]), exact([0, 0, 1, 1])
    one, two = write(tmp_path / "a", {"a": same}), write(tmp_path / "b", {"b": same, "c": worse})
    figure = compare_heads.run([one, two], ["a"], ["b"])["exact_match"]
    assert figure["difference"] == 0 and figure["range"] == [0, 0]
    assert compare_heads.run([one, two], ["a"], ["b", "c"])["exact_match"]["baseline"] == 0.625


def test_f1_is_of_the_rows_together(tmp_path):
    counts = [{"slots": [1, 1, 1]}, {"slots": [0, 3, 1]}]
    file = write(tmp_path / "a", {"a": counts, "b": [{"slots": [1, 1, 1]}] * 2})
    report = compare_heads.run([file], ["a"], ["b"])
    assert report["slot_f1"]["heads"] == round(2 / 6, 4) and report["slot_f1"]["baseline"] == 1


def test_answers_with_unicode_ends_of_lines_are_one_line(tmp_path):
    file = tmp_path / "a"
    write(file, {"a": exact([1]), "b": exact([0])})
    head, *lines = (json.loads(line) for line in file.read_bytes().splitlines())
    for line in lines:
        line["text"] = "one\u2028two\x85three"
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [head, *lines]))
    assert compare_heads.run([str(file)], ["a"], ["b"])["exact_match"]["difference"] == 1


@pytest.mark.parametrize(
    "heads, match",
    [(["nobody"], "has no model 'nobody'; it has a, b"), (["b"], "same rows")],
)
def test_what_cannot_be_compared_is_said(tmp_path, heads, match):
    file = write(tmp_path / "a", {"a": exact([1, 0]), "b": exact([1])})
    with pytest.raises(UsageError, match=match):
        compare_heads.run([file], heads, ["a"])


def test_files_of_other_data_or_of_another_kind_are_refused(tmp_path):
    one, two = write(tmp_path / "a", {"a": exact([1])}), write(tmp_path / "b", {"b": exact([1])}, data="e")
    with pytest.raises(UsageError, match="different tasks or data"):
        compare_heads.run([one, two], ["a"], ["b"])
    with pytest.raises(UsageError, match="'a' is a model of two of these files"):
        compare_heads.run([one, write(tmp_path / "again", {"a": exact([0]), "c": exact([1])})], ["a"], ["c"])
    (tmp_path / "c").write_text("no json\n")
    with pytest.raises(UsageError, match="is no file of launch/evaluate"):
        compare_heads.run([str(tmp_path / "c")], ["a"], ["b"])
