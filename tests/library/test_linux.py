"""Static programs, built by gcc with the host's C library, run as they do on the host."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from vmfs import Machine
from vmfs.words.errors import Invalid

PROGRAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>
int main(int argc, char **argv, char **environment)
{
    char line[100], *big = malloc(3 << 20), *none = 0;
    memset(big, 1, 3 << 20);
    while (fgets(line, sizeof line, stdin))
        printf("%zu %s", strlen(line), line);
    printf("%d %s %s %.6f\n", argc, argc > 1 ? argv[1] : "-", *environment ? *environment : "-", sqrt(argc));
    fprintf(stderr, "to stderr\n");
    if (fopen("/etc/passwd", "r"))
        puts("a file of the host");
    free(big);
    if (argc > 2)
        *none = 1;
    return 40 + argc;
}
"""


@pytest.fixture(scope="module", params=["-static", "-static-pie"])
def program(request, tmp_path_factory):
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    folder = tmp_path_factory.mktemp("program")
    (folder / "main.c").write_text(PROGRAM)
    command = ["gcc", "-O1", request.param, "-w", "-o", folder / "main", folder / "main.c", "-lm"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"gcc builds nothing static: {built.stderr.splitlines()[-1][:100]}")
    return folder / "main"


def test_as_on_the_host(program):
    text = b"first\nand second\n"
    wanted = subprocess.run([program, "one"], input=text, capture_output=True, env={"A": "b"}, check=False)
    with Machine.elf(program, ("one",), stdin=text, environment={"A": "b"}) as m:
        exit_ = m.run(timeout=60)
        assert exit_.REASON == "shutdown" and exit_.code == wanted.returncode == 42, exit_
        out = bytes(m.linux.stdout).replace(b"a file of the host\n", b"")
        assert out == wanted.stdout.replace(b"a file of the host\n", b"") and bytes(m.linux.stderr) == wanted.stderr
        assert b"host" not in m.linux.stdout and not m.linux.calls


def test_what_it_should_not_do_ends_the_run(program):
    with Machine.elf(program, ("one", "two")) as m:
        exit_ = m.run(timeout=60)
        assert (exit_.REASON, exit_.direction, exit_.addr) == ("mmio", "write", 0)


def test_other_files_are_refused(program, tmp_path):
    (tmp_path / "text").write_text("no program")
    data = bytearray(program.read_bytes())
    data[18] = 3  # for another machine
    (tmp_path / "other").write_bytes(data)
    data = bytearray(program.read_bytes())
    (tmp_path / "short").write_bytes(data[:200])
    for name in ("text", "other", "short"):
        with pytest.raises(Invalid, match=name):
            Machine.elf(tmp_path / name)
    with pytest.raises(Invalid, match="link it with -static"):
        Machine.elf("/bin/true")
    with pytest.raises(FileNotFoundError):
        Machine.elf(tmp_path / "absent")
