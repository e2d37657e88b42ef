"""The command's arguments, the options of -o and the mount table; nothing is mounted here."""

import io
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs import cli
from vmfs.commands import boot, daemon, doctor, mount
from vmfs.commands.options import OPTIONS, count, parse_options, size
from vmfs.host import mounts
from vmfs.host.settings import MountSettings
from vmfs.words.errors import EngineFailed, Invalid

ROOT = Path(__file__).resolve().parents[2]


def settings_of(*argv: str) -> MountSettings:
    parser = cli.Parser("vmfs mount")
    mount.add_arguments(parser)
    return mount.settings_of(parser.parse_args(argv))


# --- sizes and counts ------------------------------------------------------------------------------------


UNITS = ["", "K", "M", "G", "T", "k", "m", "g", "t", "MiB", "GB"]


@given(st.integers(0, (1 << 23) - 1), st.sampled_from(UNITS))
def test_size_is_the_number_times_its_unit(number, unit):
    assert size(f"{number}{unit}") == number * 1024 ** " KMGT".index(unit[:1].upper() or " ")


@given(st.text(max_size=60))
def test_any_text_is_a_size_or_invalid(text):
    try:
        value = size(text)
    except Invalid as failure:
        assert "\n" not in str(failure)
    else:
        assert 0 <= value < 1 << 63


NO_SIZES = ["", "M", "-1", "1.5G", "1Q", "9999999999999999999", "8388608T", "1 2", "2G,ro"]


@pytest.mark.parametrize("text", NO_SIZES)
def test_what_is_no_size(text):
    with pytest.raises(Invalid):
        size(text)


@pytest.mark.parametrize("text", ["", "-1", "many", "2147483648", "1K"])
def test_what_is_no_count(text):
    with pytest.raises(Invalid):
        count(text)


# --- options ---------------------------------------------------------------------------------------------


def test_nothing_asked_for_is_the_defaults():
    assert settings_of("/mnt") == MountSettings()


LONG_AND_SHORT = [
    (["--engine", "kvm"], "engine=kvm"),
    (["--allow-other"], "allow_other"),
    (["--max-vms", "3"], "max_vms=3"),
    (["--max-mem", "2G"], "max_mem=2G"),
    (["--max-vms-user", "3"], "max_vms_user=3"),
    (["--max-mem-user", "2G"], "max_mem_user=2G"),
    (["--max-waiting-user", "9"], "max_waiting_user=9"),
    (["--debug"], "debug"),
]


@pytest.mark.parametrize("long, short", LONG_AND_SHORT, ids=[short for _, short in LONG_AND_SHORT])
def test_each_long_option_has_its_name_in_o(long, short):
    assert settings_of("/mnt", *long) == settings_of("/mnt", "-o", short) != settings_of("/mnt")


def test_every_option_of_vmfs_is_also_a_long_one():
    long = {short.partition("=")[0] for _, short in LONG_AND_SHORT}
    assert {option.name for option in OPTIONS if option.field} == long


def test_options_are_one_list_however_they_are_given():
    together = settings_of("-o", "ro,max_vms=2,engine=kvm", "/mnt")
    apart = settings_of("-o", "ro", "/mnt", "-o", "max_vms=2", "-oengine=kvm")
    assert together == apart
    assert together == MountSettings(engine="kvm", max_vms=2, fuse_options=("ro",))


def test_a_long_option_wins_over_o_and_the_last_of_o_over_those_before():
    assert settings_of("/mnt", "--max-mem", "1M", "-o", "max_mem=2M").max_memory == 1 << 20
    assert parse_options(["max_mem=2M,max_mem=3M", "max_mem=4M"]).max_memory == 4 << 20


def test_what_mount_8_adds_is_accepted_and_not_handed_on():
    added = "rw,dev,suid,exec,auto,nouser,async,relatime,_netdev,nofail,x-systemd.automount,comment=lab"
    assert parse_options([added]) == MountSettings()


def test_fuse_options_are_handed_on_with_their_values():
    given = ["fsname=lab", "noatime", "max_read=4096"]
    assert parse_options([",".join(given)]).fuse_options == tuple(given)


@pytest.mark.parametrize("text, says", [
    ("frobnicate", "'frobnicate' is unknown"),
    ("engine", "'engine' needs a value"),
    ("engine=qemu", "'qemu' is none of auto, "),
    ("ro=1", "'ro' takes no value"),
    ("allow_other=yes", "'allow_other' takes no value"),
    ("max_mem=big", "'max_mem': 'big' is not a size"),
    ("fsname", "'fsname' needs a value"),
])
def test_a_bad_option_is_named(text, says):
    with pytest.raises(Invalid, match=says):
        parse_options([text])


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), max_size=80))
def test_any_option_text_is_settings_or_invalid(text):
    try:
        found = parse_options([text])
    except Invalid as failure:
        assert str(failure)
    else:
        assert isinstance(found, MountSettings)


def test_the_names_of_the_options_are_unique():
    names = [option.name for option in OPTIONS]
    assert len(names) == len(set(names))


# --- how it is called ------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, becomes", [
    (["none", "/mnt", "-o", "rw,dev,suid"], ["mount", "-o", "rw,dev,suid", "--", "/mnt"]),
    (["", "/mnt", "-o", "rw"], ["mount", "-o", "rw", "--", "/mnt"]),
    (["lab", "/mnt", "-o", "rw"], ["mount", "-o", "rw,fsname=lab", "--", "/mnt"]),
    (["mount", "/mnt", "-o", "rw"], ["mount", "/mnt", "-o", "rw"]),
    (["doctor"], ["doctor"]),
    (["none", "/mnt"], ["none", "/mnt"]),       # a misspelled command is no source
    (["-x", "/mnt", "-o", "rw"], ["-x", "/mnt", "-o", "rw"]),
    ([], []),
])
def test_calls_of_mount_fuse3(argv, becomes):
    assert cli.from_mount_helper(argv) == becomes


@pytest.mark.parametrize("argv", [
    [], ["nonsense"], ["--nonsense"], ["mount"], ["mount", "/a", "/b"], ["mount", "/a", "--max-vms", "few"],
    ["mount", "/a", "--max-mem"], ["mount", "/a", "-o", "nonsense"], ["mount", "/a", "--engine", "qemu"],
    ["mount", "/a", "--eng", "kvm"], ["umount"], ["umount", "/a", "/b"], ["doctor", "now"],
    ["version", "now"],
])
def test_a_mistake_in_the_arguments_is_one_line_and_code_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    out, err = capsys.readouterr()
    assert exit.value.code == cli.USAGE
    assert out == ""
    assert err.startswith("vmfs") and err.count("\n") == 1 and "--help" in err


@pytest.mark.parametrize("command", [each.name for each in cli.COMMANDS])
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0
    assert f"usage: vmfs {command}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["version"], ["--version"]])
def test_version(argv, capsys):
    try:
        code = cli.main(argv)
    except SystemExit as exit:
        code = exit.code
    assert code == 0
    assert capsys.readouterr().out.startswith("vmfs 0.")


def test_asking_for_the_version_or_the_arguments_loads_no_fuse_and_no_event_loop():
    script = ("import sys; from vmfs import cli; cli.main(['version']); from vmfs.commands import mount;"
              "sys.exit(any(each in sys.modules for each in ('pyfuse3', 'trio')))")
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("argv, says", [
    (["mount", "{tmp}/absent"], "{tmp}/absent does not exist"),
    (["mount", "{tmp}/file"], "{tmp}/file is not a directory"),
    (["mount", "{tmp}/file/below"], "{tmp}/file/below: Not a directory"),
    (["mount", "{tmp}/loop"], "{tmp}/loop: Too many levels of symbolic links"),
    (["mount", "{tmp}", "--log", "{tmp}/a/b"], "cannot write the log {tmp}/a/b: No such file or directory"),
    (["umount", "{tmp}"], "{tmp} is not a vmfs mount"),
    (["umount", "{tmp}/absent"], "{tmp}/absent is not a vmfs mount"),
    (["umount", "/proc"], "/proc is not a vmfs mount"),
])
def test_a_failure_is_one_sentence_and_code_1(argv, says, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert cli.main([each.format(tmp=tmp_path) for each in argv]) == cli.FAILURE
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"vmfs {argv[0]}: {says.format(tmp=tmp_path)}\n")


# --- the mount table -------------------------------------------------------------------------------------


def test_the_table_has_proc():
    assert mounts.at("/proc").kind == "proc"
    assert mounts.at("/proc/self/..").kind == "proc"
    assert mounts.at("/proc/self") is None


def test_a_link_to_a_mount_is_that_mount(tmp_path):
    (tmp_path / "link").symlink_to("/proc")
    assert mounts.at(tmp_path / "link") == mounts.at("/proc")


@given(st.text(alphabet=" \t\n\\a/é", max_size=30))
def test_unescape_undoes_what_the_kernel_does(path):
    escaped = "".join(f"\\{ord(each):03o}" if each in " \t\n\\" else each for each in path)
    assert mounts.unescape(escaped) == path


def test_boot_takes_a_mount_of_its_own_user_only(tmp_path, monkeypatch, capsys):
    """Another user's server is not to get what is booted, nor to be asked whether it may be written."""
    paths = [tmp_path / name for name in ("theirs", "other", "unknown", "mine", "later")]
    for path in paths:
        path.mkdir()
    me = os.geteuid()
    kinds = ("fuse.vmfs", "fuse.sshfs", "fuse.vmfs", "fuse.vmfs", "fuse.vmfs")
    table = [
        mounts.Mount(str(path), kind, "vmfs", number, user)
        for number, (path, kind, user) in enumerate(zip(paths, kinds, (me + 1, me, None, me, me), strict=True))
    ]
    looked_at = []
    monkeypatch.setattr(mounts, "table", lambda: table)
    monkeypatch.setattr(mounts, "is_dead", lambda path: looked_at.append(path))
    with boot.mount(None, keep=True) as (chosen, _):
        assert chosen == tmp_path / "mine"
    assert looked_at == [str(chosen)]
    assert capsys.readouterr().err == f"vmfs boot: on {chosen}, a mount of yours\n"
    table[3:] = []
    with pytest.raises(Invalid, match="--keep needs a mount that stays"), boot.mount(None, keep=True):
        raise AssertionError("it took a mount that is not its user's")


# --- failing to serve ------------------------------------------------------------------------------------


@pytest.fixture
def in_a_process():
    """Runs `daemon.background` with a `serve` made of `lines` in a process; its (code, stdout, stderr)."""
    def run(lines: str, **options):
        script = "\n".join([
            "import os, signal, sys, time",
            "from pathlib import Path",
            "from vmfs.commands import daemon",
            "from vmfs.words.errors import *",
            "from vmfs.host.settings import MountSettings",
            "def serve(directory, settings, ready):",
            *(f"    {line}" for line in lines.splitlines()),
            "daemon.serve = serve",
            "try: print(daemon.background(Path('/'), MountSettings(), None))",
            "except VmfsError as failure: sys.exit(str(failure))",
        ])
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, **options)
        return done.returncode, done.stdout, done.stderr
    return run


def test_the_parent_ends_when_the_server_is_ready_and_not_before(in_a_process, tmp_path):
    marker = tmp_path / "ready"
    code, out, err = in_a_process(f"Path({str(marker)!r}).touch()\nready()")
    assert (code, out, err) == (0, "0\n", "")
    assert marker.exists()


def test_a_daemon_holds_none_of_its_callers_files(in_a_process, tmp_path):
    """subprocess.run returns when the pipes it reads are closed by everyone: it would wait for the server."""
    stay = tmp_path / "stay"
    stay.touch()
    reader, writer = os.pipe()
    lines = f"ready()\nwhile os.path.exists({str(stay)!r}): time.sleep(0.01)"
    code, out, err = in_a_process(lines, pass_fds=[writer])
    os.close(writer)
    assert (code, out, err) == (0, "0\n", "")
    assert os.read(reader, 1) == b""        # the end of the file, though the server runs
    os.close(reader)
    stay.unlink()


def test_a_failure_is_told_with_what_libfuse_said(in_a_process):
    code, _, err = in_a_process("os.write(2, b'fuse: no device\\nfuse: no device\\n')\n"
                                "raise EngineFailed('cannot mount')")
    assert (code, err) == (1, "cannot mount (no device)\n")


def test_a_server_that_is_killed_before_it_is_ready(in_a_process):
    code, _, err = in_a_process("os.kill(os.getpid(), signal.SIGKILL)")
    assert (code, err) == (1, "the server was killed by SIGKILL before the mount was ready\n")


def test_a_server_that_returns_before_it_is_ready(in_a_process):
    code, _, err = in_a_process("return")
    assert (code, err) == (1, "the server ended with code 0 before the mount was ready\n")


def test_an_unexpected_failure_shows_its_traceback(in_a_process):
    code, _, err = in_a_process("1 / 0")
    assert code == 1 and "Traceback" in err and "ZeroDivisionError" in err


def test_closed_standard_files_do_not_matter(in_a_process):
    command = f"exec {sys.executable} -m vmfs.cli mount /nowhere/at/all <&- >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "vmfs mount: /nowhere/at/all does not exist\n")


def test_foreground_puts_stderr_back(monkeypatch, capfd):
    def serve(directory, settings, ready):
        os.write(2, b"fuse: noise\n")
        raise EngineFailed("cannot mount")
    monkeypatch.setattr(daemon, "serve", serve)
    with pytest.raises(EngineFailed, match=r"^cannot mount \(noise\)$"):
        daemon.foreground(Path("/"), MountSettings(), None)
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


# --- doctor ----------------------------------------------------------------------------------------------


@pytest.fixture
def findings(monkeypatch):
    """Makes `vmfs doctor` find just these."""
    def find(*found):
        monkeypatch.setattr(doctor, "examine", lambda: list(found))
    return find


FINE = doctor.Finding("thing", doctor.OK, "is there")
LESS = doctor.Finding("extra", doctor.WARN, "is not there", "get it")
NONE = doctor.Finding("base", doctor.MISSING, "is not there", "get that")


@pytest.mark.parametrize("mode, gid, remedy", [
    (0o660, 5, "usermod -aG tty USER"),
    (0o660, 0, "chgrp kvm /dev/kvm; chmod 660 "),
    (0o600, 5, "chgrp kvm /dev/kvm; chmod 660 "),
    (0o660, 4_000_000_000, "usermod -aG 4000000000 USER"),
])
def test_doctor_says_how_a_user_may_open_dev_kvm(mode, gid, remedy):
    device = os.stat_result((stat.S_IFCHR | mode, 1, 1, 1, 0, gid, 0, 0, 0, 0))
    assert doctor.may_open(device).startswith(remedy)


@pytest.mark.parametrize("controllers, kind, options, name", [
    ("", "cgroup2", "rw", "memory.max"),
    ("memory", "cgroup", "rw,memory", "memory.limit_in_bytes"),
])
def test_doctor_says_what_a_memory_cgroup_bounds(tmp_path, controllers, kind, options, name):
    """The smallest of those that a process is in; one that is none says so in its own way."""
    (tmp_path / "cgroup").write_text(f"3:cpu:/other\n9:{controllers}:/slice/unit\n")
    (tmp_path / "mountinfo").write_text(f"30 24 0:26 / /cg rw shared:9 - {kind} cgroup {options}\n"
                                        "31 24 0:27 / /cpu rw - cgroup cgroup rw,cpu\n")
    groups = tmp_path / "cg"
    (groups / "slice" / "unit").mkdir(parents=True)
    (tmp_path / "cpu" / "other").mkdir(parents=True)
    (tmp_path / "cpu" / "other" / name).write_text("1\n")

    def found() -> int | None:
        return doctor.cgroup_memory(str(tmp_path), str(tmp_path))

    assert found() is None
    for file, limit, most in (("slice/unit", "max", None), (".", f"{1 << 62}", None), ("slice", "300000000", 300000000),
                              ("slice/unit", "200000000", 200000000), ("slice/unit", "400000000", 300000000)):
        (groups / file / name).write_text(f"{limit}\n")
        assert found() == most
    (tmp_path / "mountinfo").unlink()
    assert found() is None


def test_doctor_where_no_process_can_be_started(monkeypatch):
    monkeypatch.setattr(doctor.sys, "executable", "/nonexistent/python3")
    (found,) = doctor.trial_mount()
    assert (found.status, found.meaning) == (
        doctor.MISSING, "/nonexistent/python3 cannot be started: No such file or directory")


@pytest.mark.parametrize("found, code", [([FINE], 0), ([FINE, LESS], 0), ([FINE, NONE, LESS], 1)])
def test_doctor_fails_only_where_no_mount_works(found, code, findings, capsys):
    findings(*found)
    assert cli.main(["doctor"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [each.status for each in found]
    assert cli.main(["doctor", "--json"]) == code
    report = json.load(io.StringIO(capsys.readouterr().out))
    assert report["works"] == (code == 0)
    assert [each["name"] for each in report["findings"]] == [each.name for each in found]


def test_doctor_says_how_to_get_what_is_missing(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (found,) = doctor.fusermount()
    assert (found.status, found.remedy) == (doctor.MISSING, "apt-get install fuse3")


# --- the documentation -----------------------------------------------------------------------------------


def test_each_option_is_documented():
    text = (ROOT / "docs/vmfs.md").read_text()
    parser = cli.Parser("vmfs mount")
    mount.add_arguments(parser)
    long = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    assert [name for name in long if f"`{name}" not in text and name != "--help"] == []
    for option in OPTIONS:
        if option.field or (option.fuse and "context" not in option.name):
            assert f"`{option.name}" in text, option.name
    assert [each.name for each in cli.COMMANDS if f"vmfs {each.name}" not in text] == []


# --- the table of commands ----------------------------------------------------------------------------------


def test_every_command_is_in_the_reference_and_has_a_section():
    text = (ROOT / "docs" / "vmfs.md").read_text()
    synopsis = text.split("\n\n")[1]
    for command in cli.COMMANDS:
        assert re.search(rf"^    vmfs {command.name}\b", synopsis, re.MULTILINE), command.name
        if command.name not in ("version",):
            assert f"## vmfs {command.name}\n" in text, command.name


def test_every_option_is_in_the_reference():
    text = (ROOT / "docs" / "vmfs.md").read_text()
    (commands,) = (one for one in cli.whole_parser()._actions if one.dest == "command")
    for name, parser in commands.choices.items():
        for action in parser._actions:
            for option in action.option_strings:
                if option.startswith("--") and option != "--help":
                    assert option in text, f"{name} {option}"


def test_pages_and_completions_are_made_of_the_table(tmp_path):
    pytest.importorskip("shtab")
    pytest.importorskip("argparse_manpage")
    subprocess.run([sys.executable, ROOT / "scripts" / "pages.py", tmp_path], check=True, cwd=ROOT)
    for command in cli.COMMANDS:
        page = (tmp_path / f"vmfs-{command.name}.1").read_text()
        assert f"vmfs {command.name}" in page and ".SH SYNOPSIS" in page
        for shell in ("bash", "zsh", "fish"):
            assert command.name in (tmp_path / f"vmfs.{shell}").read_text()
    said = subprocess.run(
        ["bash", "-c", 'source vmfs.bash; COMP_WORDS=(vmfs st); COMP_CWORD=1; COMP_LINE="vmfs st"; '
         'COMP_POINT=7; $(complete -p vmfs | sed "s/.*-F \\([^ ]*\\).*/\\1/") vmfs st vmfs; echo "${COMPREPLY[*]}"'],
        cwd=tmp_path, capture_output=True, text=True,
    )
    assert said.stdout.split() == ["step"], said
