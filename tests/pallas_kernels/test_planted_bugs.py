"""The planted bugs of plant_bugs.py fit the kernels as they are, and the first one of each file is caught."""

from __future__ import annotations

import ast

import pytest

from tests.pallas_kernels import plant_bugs
from tests.pallas_kernels.plant_bugs import BUGS, ROOT, Bug

ONE_OF_EACH = {bug.file: bug for bug in reversed(BUGS)}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_it_applies(bug: Bug):
    text = (ROOT / bug.file).read_text()
    assert text.count(bug.old) == 1
    if bug.file.endswith(".py"):
        ast.parse(text.replace(bug.old, bug.new))
    assert (ROOT / bug.tests[0]).is_file()


@pytest.mark.full
@pytest.mark.parametrize("bug", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_it_is_caught(bug: Bug):
    fails, how = plant_bugs.run_tests(bug.tests, bug)
    assert fails, how
