"""A mount of an ordinary user's own: its server has no capability, and serves all the same.

The user is `nobody`, since fusermount3 wants a name. It acts in a mount namespace of the test's, in which it may come
to the interpreter and /dev/fuse, whatever the host's modes are.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from host.conftest import open_up
from mounting import reason_against_mounts

NOBODY = 65534
TREE = Path(__file__).resolve().parents[2]

ROOTS_PART = """
import os, stat, subprocess, sys
def mount(*words):
    subprocess.run(["mount", *words], check=True)
work = sys.argv[1]
mount("-t", "tmpfs", "none", work)
os.chmod(work, 0o755)
for number, path in enumerate(filter(None, sys.argv[2].split(":"))):
    # A closed folder on the way to it: an open one in its place, in this namespace only.
    closed = next((str(one) for one in reversed(__import__("pathlib").Path(path).parents)
                   if not os.stat(one).st_mode & 0o001), None)
    if closed:
        kept = f"{work}/kept{number}"
        os.mkdir(kept)
        mount("--bind", path, kept)
        mount("-t", "tmpfs", "-o", "mode=755", "none", closed)
        os.makedirs(path)
        mount("--bind", kept, path)
os.mknod(f"{work}/fuse", stat.S_IFCHR | 0o666, os.makedev(10, 229))
os.chmod(f"{work}/fuse", 0o666)
mount("--bind", f"{work}/fuse", "/dev/fuse")
with open(f"{work}/fuse.conf", "w") as conf:
    conf.write("user_allow_other\\n")
mount("--bind", f"{work}/fuse.conf", "/etc/fuse.conf")
os.mkdir(f"{work}/home")
os.chown(f"{work}/home", 65534, 65534)
os.setgroups(())
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
os.environ["HOME"] = f"{work}/home"
os.chdir(f"{work}/home")
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[3:]])
"""

USERS_PART = """
import errno, json, mmap, os, signal, subprocess, sys, time
command = [sys.executable, "-m", "vmfs.cli"]
said = {}
os.mkdir("m")
subprocess.run([*command, "mount", "m", "--engine", "emulator", "--log", "log", *sys.argv[1:]], check=True)
try:
    os.mkdir("m/one")
    def write(name, data, at=0):
        fd = os.open(f"m/one/{name}", os.O_WRONLY)
        os.pwrite(fd, data, at)
        os.close(fd)
    def read(name):
        with open(f"m/one/{name}") as file:
            return file.read()
    write("mode", b"real")
    write("mem", bytes.fromhex("c60600208b f4"), 0x1000)  # mov byte [2000h], 8bh; hlt
    write("reg/rip", b"0x1000")
    with open("m/one/mem", "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0x4000)
        said["before"] = memory[0x2000]
        said["run"] = read("vm_run")
        said["after"] = memory[0x2000]
        memory[0x2001] = 0x77
        memory.flush()
        said["written"] = os.pread(file.fileno(), 2, 0x2000).hex()
        memory.close()
    facts = dict(line.split(" ", 1) for line in read("stat").splitlines())
    said["sandbox"] = facts["sandbox"]
    status = open(f"/proc/{facts['pid']}/status").read()
    said["uid"] = next(line.split()[1] for line in status.splitlines() if line.startswith("Uid"))
    said["capabilities"] = next(line.split()[1] for line in status.splitlines() if line.startswith("CapPrm"))
    os.rmdir("m/one")
    os.mkdir("m/one")
    write("machine", b"pc")
    facts = dict(line.split(" ", 1) for line in read("stat").splitlines())
    with open("disk", "wb") as disk:
        disk.truncate(1 << 20)
    write("dev/add", b"blk %s/disk rw" % os.fsencode(os.getcwd()))
    said["devices"] = sorted(name for name in os.listdir("m/one/dev") if name.startswith("blk"))
    write("kernel", b"x" * 100000)
    os.kill(int(facts["pid"]), signal.SIGKILL)
    end = time.monotonic() + 60
    while read("state") != "failed\\n" and time.monotonic() < end:
        time.sleep(0.01)
    said["state"] = read("state")
    said["error"] = read("error")
    os.rmdir("m/one")
    os.mkdir("m/one")
    said["again"] = read("state")
    os.rmdir("m/one")
finally:
    subprocess.run([*command, "umount", "--lazy", "m"], check=True)
said["mounted"] = os.path.ismount("m")
said["log"] = open("log").read()
print(json.dumps(said))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes the namespace")
@pytest.mark.parametrize("options", [[], ["--allow-other"]], ids=["alone", "allow-other"])
def test_a_user_mounts_and_uses_machines(tmp_path, options):
    if reason := reason_against_mounts() or ("" if shutil.which("unshare") else "there is no unshare"):
        pytest.skip(reason)
    open_up(tmp_path)
    needed = [sys.base_prefix, str(TREE), sys.prefix]
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", ROOTS_PART, tmp_path]
    paths = [os.environ.get("PYTHONPATH", ""), str(TREE)]  # `make asan` sets it
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [*command, ":".join(needed), USERS_PART, *options], capture_output=True, text=True, timeout=120, env=environment
    )
    if "Operation not permitted" in done.stderr and not done.stdout:
        pytest.skip(f"no mount namespace can be made here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["run"] == "hlt rip=0x1006\n"
    assert (said["before"], said["after"], said["written"]) == (0, 0x8B, "8b77")
    assert (said["uid"], int(said["capabilities"], 16)) == (str(NOBODY), 0)
    assert {"seccomp", "no_new_privs"} <= set(said["sandbox"].split(","))
    assert said["devices"] == ["blk0"]
    assert said["state"] == "failed\n" and "was killed by SIGKILL" in said["error"]
    assert said["again"] == "paused\n" and not said["mounted"]
    assert "Traceback" not in said["log"]
