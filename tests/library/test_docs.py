"""docs/library.md: its first program runs as it says, and what it names is there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from vmfs import Machine
from vmfs.library.hooks import Hook

PAGE = (Path(__file__).parents[2] / "docs/library.md").read_text()


def test_the_first_program(capsys):
    program = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    wanted = re.search(r"print\(.*#\s+(.*)", program)[1]
    exec(program, {})  # noqa: S102
    assert capsys.readouterr().out.strip() == wanted


def test_all_that_it_names_is_there_and_all_that_is_there_is_named(tmp_path):
    named = set(re.findall(r"\bm\.(\w+)", PAGE)) | set(re.findall(r"\b((?:hook|save|load)_\w+)", PAGE)) - {"hook_add"}
    for name in named - {"linux"}:
        assert hasattr(Machine, name) or name in ("mem", "exit"), name
    public = {name for name, value in vars(Machine.__mro__[1]).items() if inspect.isfunction(value) and name[0] != "_"}
    assert public - named == set()
    assert {"hits", "remove"} <= {name for name in dir(Hook) if name[0] != "_"}


def test_the_arguments_are_those_of_the_page():
    for name, wanted in (("__init__", "mode memory engine exceptions"), ("run", "until insns timeout start")):
        assert list(inspect.signature(getattr(Machine, name)).parameters)[1:] == wanted.split()
