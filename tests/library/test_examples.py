"""The examples of the library do what they say."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def fuzz():
    if not (shutil.which("gcc") and shutil.which("objcopy")):
        pytest.skip("no gcc and objcopy")
    spec = importlib.util.spec_from_file_location("fuzz_example", EXAMPLES / "fuzz.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_fuzzer_finds_the_planted_bug(fuzz):
    text, exit_, cases, corpus = fuzz.fuzz(240, seed=2)
    assert exit_.REASON in ("debug", "mmio", "error") and b"#" in text
    assert cases > 100 and corpus > len(fuzz.SEEDS) + 10  # coverage has led it
    # The same input does the same in a new machine, and without the number it does no harm.
    assert fuzz.Target().run(text).line() == exit_.line()
    assert fuzz.Target().run(text.replace(b"#", b"0")).REASON == "hlt"


def test_a_parser_without_the_bug_ends_each_case(fuzz, monkeypatch, tmp_path):
    source = fuzz.SOURCE.read_text()
    mended = source.replace("if (place >= (int)value_count)", "if (place < 0 || place >= (int)value_count)")
    assert mended != source
    (tmp_path / "recipe.c").write_text(mended)
    monkeypatch.setattr(fuzz, "SOURCE", tmp_path / "recipe.c")
    assert fuzz.fuzz(3, seed=1) is None
