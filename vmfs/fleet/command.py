"""`vmfs fleet run`: a script's function for each of many files, on a Dask cluster, with results on disk.

OUT/results.csv          a row a case
OUT/CASE/result.json     what became of it; it is there once all of the case is
OUT/CASE/value.json      what the function returned, where JSON has it; else value.txt, its repr
OUT/CASE/console.txt, output.txt, why.txt, error.txt, note.txt, coverage, machine.vmfs     where there is one
"""

from __future__ import annotations

import argparse
import csv
import glob
import json
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmfs.words.errors import Invalid

FUNCTION = "case"
COLUMNS = ("case", "kind", "exit", "seconds", "value", "error", "worker")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["run"], help="`run`: run cases")
    parser.add_argument(
        "script",
        metavar="SCRIPT",
        type=Path,
        help="a Python file with `def case(machine, file)`; file has `name` and `data`",
    )
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of Dask (default: a cluster on this host)")
    parser.add_argument(
        "--template",
        metavar="PATH",
        type=Path,
        help="what each machine starts as: a file of `vmfs save` or `Machine.save`, or a saved directory",
    )
    parser.add_argument("--inputs", metavar="GLOB", required=True, help="the files, a case each")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        required=True,
        help="for results; cases that are there already are not run again",
    )
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=60.0, help="for a case")
    parser.add_argument("--memory", metavar="BYTES", type=int, default=0, help="for a case")
    parser.add_argument(
        "--coverage", metavar="SIZE", type=int, default=0, help="keep a map of the jumps that were taken"
    )
    parser.add_argument("--keep", action="store_true", help="keep the machines of cases that fail")
    parser.add_argument(
        "--history",
        metavar="BYTES",
        type=int,
        default=0,
        help="record machines, and keep those of cases that fail with their past, of so many bytes",
    )


def run(arguments: argparse.Namespace) -> int:
    function = _function(arguments.script)
    paths = _inputs(arguments.inputs)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    todo = [(case, path) for case, path in paths.items() if not (out / case / "result.json").exists()]
    if len(todo) < len(paths):
        print(f"{len(paths) - len(todo)} of {len(paths)} cases are there already", file=sys.stderr)
    if todo:
        _run(arguments, function, todo, out)
    rows = [json.loads((out / case / "result.json").read_text()) for case in paths]
    write_table(out, rows)
    failed = sum(bool(row["kind"]) for row in rows)
    print(f"{len(rows)} cases, {failed} failed: {out / 'results.csv'}")
    return 1 if failed else 0


def _function(script: Path) -> Any:
    try:
        found = runpy.run_path(os.fspath(script), run_name="vmfs-fleet")
    except OSError as failure:
        raise Invalid(f"{script}: {failure.strerror}") from None
    if not callable(found.get(FUNCTION)):
        raise Invalid(f"{script} has no function `{FUNCTION}(machine, file)`")
    return found[FUNCTION]


def _inputs(pattern: str) -> dict[str, Path]:
    """By the name of its case: of the file, with its folders where several have one name."""
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        raise Invalid(f"no file is {pattern}")
    names = [os.path.basename(path) for path in paths]
    if len(set(names)) < len(names):
        common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        names = [os.path.relpath(path, common).replace(os.sep, "+") for path in paths]
    names = [f"case-{name}" if name.startswith((".", "results.")) else name for name in names]
    return {name: Path(path) for name, path in zip(names, paths, strict=True)}


def _run(arguments: argparse.Namespace, function: Any, todo: list[tuple[str, Path]], out: Path) -> None:
    try:
        from distributed import Client

        from vmfs.fleet.fleet import Fleet
        from vmfs.fleet.local import client_of, local_cluster
    except ModuleNotFoundError as missing:
        raise Invalid(f"a fleet needs Dask (there is no {missing.name}): pip install 'vmfs[fleet]'") from None
    cluster = None if arguments.scheduler else local_cluster()
    try:
        client = client_of(arguments.scheduler) if cluster is None else Client(cluster)
        with client, Fleet(client) as fleet, tempfile.TemporaryDirectory(dir=out, prefix=".new-") as new:
            template = fleet.template(arguments.template) if arguments.template else None
            results = fleet.map(
                _call(function),
                _Files(todo),
                template=template,
                timeout=arguments.timeout,
                memory=arguments.memory,
                coverage=arguments.coverage,
                keep=new if arguments.keep or arguments.history else None,
                history=arguments.history,
                progress=sys.stderr.isatty(),
            )
            for result in results:
                _write(out, Path(new), todo[result.number][0], result)
    finally:
        if cluster is not None:
            cluster.close()


class _Files:
    """Names and contents, which are read as they are needed, and whose number is known."""

    def __init__(self, paths: list[tuple[str, Path]]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        for case, path in self._paths:
            yield case, path.read_bytes()


def _call(function: Any) -> Any:
    from types import SimpleNamespace

    def call(machine: Any, file: tuple[str, bytes]) -> Any:
        return function(machine, SimpleNamespace(name=file[0], data=file[1]))

    return call


def _write(out: Path, new: Path, case: str, result: Any) -> None:
    """All of a case, then its name: one that was interrupted is not there."""
    folder = Path(tempfile.mkdtemp(dir=new))
    texts = {
        "console.txt": result.console,
        "output.txt": result.output,
        "why.txt": result.why,
        "error.txt": result.error,
        "note.txt": result.note,
    }
    for name, text in texts.items():
        if text:
            (folder / name).write_text(text, errors="replace")
    if result.coverage:
        (folder / "coverage").write_bytes(result.coverage)
    if result.saved is not None:
        os.replace(result.saved, folder / "machine.vmfs")
    value = ""
    if not result.kind and result.value is not None:
        try:
            value = json.dumps(result.value)
            (folder / "value.json").write_text(value)
        except (TypeError, ValueError, RecursionError):
            value = _shown(result.value)
            (folder / "value.txt").write_text(value, errors="replace")
    row = {
        "case": case,
        "kind": result.kind,
        "exit": result.exit,
        "seconds": round(result.seconds, 6),
        "value": value[:1000],
        "error": result.error.splitlines()[-1] if result.error else "",
        "worker": result.worker,
    }
    (folder / "result.json").write_text(json.dumps(row))
    shutil.rmtree(out / case, ignore_errors=True)
    os.chmod(folder, 0o755)
    os.replace(folder, out / case)


def _shown(value: object) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError) as failure:  # numbers of thousands of digits
        return f"a value that Python does not show: {failure}"


def write_table(out: Path, rows: list[dict[str, Any]]) -> None:
    """results.csv; results.parquet as well, where pyarrow is installed."""
    path = out / "results.csv"
    with open(out / ".results.csv", "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    os.replace(out / ".results.csv", path)
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return
    parquet.write_table(pyarrow.Table.from_pylist(rows), out / "results.parquet")


def _cell(value: object) -> object:
    """What a guest says is text in a spreadsheet, too, and no formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
