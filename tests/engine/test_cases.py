"""The conformance cases, each on every engine."""

import pytest
from engine.cases import CASES
from engine.divergences import DIVERGENCES


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_case(case, vm, divergences, assembler):
    case.play(vm, divergences)


def test_case_names_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


def test_divergences_of_cases_are_known_and_all_are_used():
    used = {name for case in CASES for name in case.instead}
    known = {row.name for row in DIVERGENCES if row.in_cases}
    assert used == known
