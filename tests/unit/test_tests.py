"""The tests themselves: what one asserts is not swallowed, and can be false."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parents[1].rglob("*.py"))
EVERYTHING = {"AssertionError", "Exception", "BaseException"}


def names_in(node: ast.expr | None) -> set[str]:
    """The exceptions that an `except` or a suppress() names; a bare `except` is all of them."""
    if node is None:
        return set(EVERYTHING)
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


def asserts(nodes: list[ast.stmt]) -> bool:
    return any(isinstance(one, ast.Assert) for node in nodes for one in ast.walk(node))


def swallowed(tree: ast.AST) -> Iterator[int]:
    """The lines where a failed assertion would go on as a pass."""
    for node in ast.walk(tree):
        if isinstance(node, ast.With):
            for item in node.items:
                call = item.context_expr
                if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("suppress"):
                    named = set().union(*(names_in(one) for one in call.args)) & EVERYTHING
                    if "AssertionError" in named or named and asserts(node.body):
                        yield node.lineno
        elif isinstance(node, ast.Try):
            for handler in node.handlers:
                named = names_in(handler.type) & EVERYTHING
                raises = any(isinstance(one, ast.Raise) for each in handler.body for one in ast.walk(each))
                # A helper that hands the exception on says what it is called.
                if not raises and handler.name is None and named and ("AssertionError" in named or asserts(node.body)):
                    yield handler.lineno


def always_true(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            test = node.test
            alternatives = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or) else [test]
            if any(isinstance(one, ast.Tuple) or isinstance(one, ast.Constant) and one.value for one in alternatives):
                yield node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-2:]))
def test_what_is_asserted_can_fail(path):
    tree = ast.parse(path.read_text())
    assert list(swallowed(tree)) == []
    assert list(always_true(tree)) == []


@pytest.mark.parametrize(
    "code",
    [
        "with suppress(AssertionError): f()",
        "with contextlib.suppress(OSError, AssertionError): f()",
        "with suppress(Exception): assert x",
        "try: f()\nexcept AssertionError: pass",
        "try: assert x\nexcept: pass",
        "assert (x == 1, 'text')",
        "assert x or True",
        "assert 'text'",
    ],
)
def test_such_a_test_is_found(code):
    tree = ast.parse(code)
    assert [*swallowed(tree), *always_true(tree)]


@pytest.mark.parametrize(
    "code",
    [
        "with suppress(OSError): assert x",
        "try: assert x\nexcept AssertionError as error: raise ValueError from error",
        "try: f()\nexcept Exception: pass",
        "assert x or y",
        "assert False",
    ],
)
def test_others_are_not(code):
    tree = ast.parse(code)
    assert not [*swallowed(tree), *always_true(tree)]
