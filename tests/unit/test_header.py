"""vmfs.h against the tables that it repeats, with every compiler here, and its functions on plain files."""

import errno
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

import vmfs
from vmfs.words import exits, tracing
from vmfs.words.registers import REGISTERS

INCLUDE = Path(vmfs.__file__).parent / "include"
HEADER = INCLUDE / "vmfs.h"
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wsign-conversion", "-Wshadow", "-Werror"]
C_STANDARDS = ["gnu89", "gnu99", "gnu11", "gnu17"]
CXX_STANDARDS = ["c++11", "gnu++11", "c++17", "gnu++20"]
COMPILERS = [
    *(("gcc", "c", standard) for standard in C_STANDARDS),
    *(("g++", "c++", standard) for standard in CXX_STANDARDS),
]
if shutil.which("clang"):  # a second opinion, where there is one
    COMPILERS += [("clang", "c", "gnu99"), ("clang++", "c++", "c++11")]
TWICE = "#include <vmfs.h>\n#include <vmfs.h>\n"
ENUMS = ("KVM_REG_", "KVM_SREG_", "VMFS_EXIT_", "VMFS_IO_", "VMFS_DEBUG_", "VMFS_SHUTDOWN_", "VMFS_TRACE_")


def build(folder, source, compiler="gcc", language="c", standard="gnu99", flags=()):
    """An executable of `source`, compiled without a warning."""
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    program = folder / "program"
    command = [compiler, "-x", language, f"-std={standard}", *WARNINGS, *flags, f"-I{INCLUDE}", "-"]
    done = subprocess.run([*command, "-o", program], input=source, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return program


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def capitals(word):
    return word.upper().replace("-", "_")


def constants():
    """Every constant that the tables ask of the header, with its value."""
    for row in REGISTERS.values():
        if row.state == "regs":
            yield f"KVM_REG_{capitals(row.name)}", row.offset
        elif row.state == "sregs" and row.name.endswith(".base"):  # a struct starts with its base
            yield f"KVM_SREG_{capitals(row.name.removesuffix('.base'))}", row.offset
        elif row.state == "sregs" and row.bits == 64:
            yield f"KVM_SREG_{capitals(row.name)}", row.offset
    for kind in exits.EXITS:
        yield f"VMFS_EXIT_{capitals(kind.REASON)}", kind.CODE
    yield "VMFS_IO_IN", exits.IO_IN
    yield "VMFS_IO_OUT", exits.IO_OUT
    for index, cause in enumerate(exits.DEBUG_CAUSES, 1):
        yield f"VMFS_DEBUG_{capitals(cause)}", index
    for index, cause in enumerate(exits.SHUTDOWN_CAUSES, 1):
        yield f"VMFS_SHUTDOWN_{capitals(cause)}", index
    for index, kind in enumerate(tracing.RECORD_KINDS, 1):
        yield f"VMFS_TRACE_{capitals(kind)}", index
    for bit, flag in enumerate(tracing.RECORD_FLAGS):
        yield f"VMFS_TRACE_{capitals(flag)}", 1 << bit


@pytest.mark.parametrize(("compiler", "language", "standard"), COMPILERS)
def test_constants_equal_the_tables(tmp_path, compiler, language, standard):
    expected = dict(constants())
    prints = "\n".join(f'printf("%s %ld\\n", "{name}", (long){name});' for name in expected)
    source = f"{TWICE}#include <stdio.h>\nint main(void) {{ {prints} return 0; }}\n"
    program = build(tmp_path, source, compiler, language, standard)
    printed = dict(line.split() for line in run(program).stdout.splitlines())
    assert {name: int(value) for name, value in printed.items()} == expected


def test_the_header_has_no_constant_of_its_own():
    found = re.findall(r"^    (\w+) = [0-9x]+,?", HEADER.read_text(), re.MULTILINE)
    found += re.findall(r"(VMFS_IO_\w+) = ", HEADER.read_text())
    assert sorted(found) == sorted(name for name, _ in constants())
    assert all(name.startswith(ENUMS) for name in found)


def test_without_posix_it_says_what_it_needs(tmp_path):
    done = run("gcc", "-std=c99", f"-I{INCLUDE}", "-fsyntax-only", "-include", "vmfs.h", "-xc", "/dev/null")
    assert done.returncode and "vmfs.h needs openat()" in done.stderr
    build(tmp_path, f"{TWICE}int main(void) {{ return 0; }}\n", standard="c99", flags=["-D_XOPEN_SOURCE=700"])


# Prints a line for each struct vmfs_exit on standard input: every member of the arm that its reason names.
READ_EXITS = r"""
#include <stdio.h>
#include <vmfs.h>
static void hex(const uint8_t *data, unsigned size)
{
    unsigned i;
    for (i = 0; i < size; i++)
        printf("%02x", data[i]);
}
int main(void)
{
    struct vmfs_exit e;
    while (fread(&e, sizeof e, 1, stdin) == 1) {
        printf("%lx %u ", (unsigned long)e.rip, e.cpu);
        switch (e.reason) {
        case VMFS_EXIT_IO:
            printf("io %s ", e.io.direction == VMFS_IO_OUT ? "out" : "in");
            printf("%x %u %u ", e.io.port, e.io.size, e.io.count);
            hex(e.io.data, sizeof e.io.data);
            break;
        case VMFS_EXIT_MMIO:
            printf("mmio %u %lx %u ", e.mmio.is_write, (unsigned long)e.mmio.addr, e.mmio.len);
            hex(e.mmio.data, sizeof e.mmio.data);
            break;
        case VMFS_EXIT_HLT: printf("hlt"); break;
        case VMFS_EXIT_DEBUG:
            printf("debug %u %u ", e.debug.cause, e.debug.id);
            printf("%lx %u", (unsigned long)e.debug.addr, e.debug.vector);
            break;
        case VMFS_EXIT_SHUTDOWN: printf("shutdown %u %u", e.shutdown.cause, e.shutdown.code); break;
        case VMFS_EXIT_INTERRUPTED: printf("interrupted"); break;
        case VMFS_EXIT_LIMIT: printf("limit"); break;
        case VMFS_EXIT_ERROR: printf("error %s", e.error.reason); break;
        default: printf("?"); break;
        }
        printf("\n");
    }
    return 0;
}
"""
RIP = 0xFFFF800012345678
READ_AS = [
    (
        exits.Io(direction="out", port=0x3F8, size=2, count=3, data=bytes(range(1, 7)), rip=RIP, cpu=3),
        f"{RIP:x} 3 io out 3f8 2 3 010203040506" + "00" * 34,
    ),
    (exits.Io(direction="in", port=0xFFFF, size=4, rip=RIP), f"{RIP:x} 0 io in ffff 4 1 " + "00" * 40),
    (
        exits.Mmio(direction="write", addr=1 << 40, size=8, data=b"abcdefgh", rip=RIP),
        f"{RIP:x} 0 mmio 1 10000000000 8 6162636465666768",
    ),
    (exits.Mmio(direction="read", addr=0xA0000, size=1, rip=1), "1 0 mmio 0 a0000 1 0000000000000000"),
    (exits.Hlt(rip=RIP), f"{RIP:x} 0 hlt"),
    (exits.Debug(cause="step", rip=2), "2 0 debug 1 0 0 0"),
    (exits.Debug(cause="watchpoint", id=7, addr=RIP, rip=2), f"2 0 debug 3 7 {RIP:x} 0"),
    (exits.Debug(cause="exception", vector=14, rip=2), "2 0 debug 5 0 0 14"),
    (exits.Shutdown(cause="debug-exit", code=33, rip=2), "2 0 shutdown 4 33"),
    (exits.Interrupted(rip=2), "2 0 interrupted"),
    (exits.Limit(rip=2), "2 0 limit"),
    (exits.Error(reason="no such instruction" * 4, rip=2), "2 0 error " + ("no such instruction" * 4)[:47]),
]


def test_a_c_program_reads_every_exit(tmp_path):
    assert {type(exit_) for exit_, _ in READ_AS} == set(exits.EXITS)
    packed = b"".join(exit_.pack() for exit_, _ in READ_AS)
    done = subprocess.run([build(tmp_path, READ_EXITS)], input=packed, capture_output=True, check=True)
    assert done.stdout.decode().splitlines() == [line for _, line in READ_AS]


# Calls each function of the header once on the machine argv[1], and prints what it answered.
CALLS = r"""
#include <stdio.h>
#include <vmfs.h>
#define SHOW(call) do { \
        long answer; \
        errno = 0; \
        answer = (long)(call); \
        printf("%s = %ld errno %d\n", #call, answer, errno); \
    } while (0)
int main(int argc, char **argv)
{
    struct vmfs_exit e;
    uint64_t rax = 0;
    size_t size = 0;
    unsigned char *ram;
    char text[8];
    int ctx = open(argv[1], O_RDONLY | O_DIRECTORY);
    int before = dup(0);

    (void)argc;
    SHOW(kvm_create(argv[1]));
    SHOW(kvm_run(ctx, &e));
    printf("rip %lx\n", (unsigned long)e.rip);
    SHOW(vmfs_run(ctx, &e));
    SHOW(vmfs_answer(ctx, "\x2a", 1));
    SHOW(vmfs_write(ctx, "mode", "long"));
    SHOW(vmfs_write(ctx, "nothing", "long"));
    SHOW(vmfs_set(ctx, KVM_REG_RBX, 0x1122334455667788));
    SHOW(vmfs_get(ctx, KVM_REG_RBX, &rax));
    printf("rbx %lx\n", (unsigned long)rax);
    SHOW(vmfs_irq(ctx, 0x20));
    SHOW(vmfs_error(ctx, text, sizeof text));
    printf("error '%s'\n", text);
    ram = (unsigned char *)vmfs_map(ctx, &size);
    printf("%lu bytes of ram, the first %u\n", (unsigned long)size, ram[0]);
    ram[4095] = 9;
    SHOW(vmfs_read(ctx, "version", text, sizeof text));
    SHOW(vmfs_destroy(argv[1]));
    printf("leaked %d\n", dup(0) - before - 1);
    return 0;
}
"""


@pytest.mark.parametrize(
    ("compiler", "language", "standard"), [("gcc", "c", "gnu99"), ("g++", "c++", "c++11")]
)
def test_functions_on_plain_files(tmp_path, compiler, language, standard):
    """Plain files in place of a machine's: what is read from and written into which, and where."""
    machine = tmp_path / "machine"
    machine.mkdir()
    (machine / "vm_run.bin").write_bytes(exits.Hlt(rip=RIP).pack())
    (machine / "regs").write_bytes(bytes(144))
    (machine / "mem").write_bytes(b"\x07" + bytes(8191))
    (machine / "version").write_bytes(b"1\n")
    (machine / "error").write_bytes(b"too long\n")
    for name in ("exit.data", "mode", "irq"):
        (machine / name).touch()
    done = run(build(tmp_path, CALLS, compiler, language, standard), machine)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        f"kvm_create(argv[1]) = -1 errno {errno.EEXIST}",
        "kvm_run(ctx, &e) = 5 errno 0",
        f"rip {RIP:x}",
        f"vmfs_run(ctx, &e) = -1 errno {errno.EISDIR}",
        'vmfs_answer(ctx, "\\x2a", 1) = 0 errno 0',
        'vmfs_write(ctx, "mode", "long") = 0 errno 0',
        f'vmfs_write(ctx, "nothing", "long") = -1 errno {errno.ENOENT}',
        "vmfs_set(ctx, KVM_REG_RBX, 0x1122334455667788) = 0 errno 0",
        "vmfs_get(ctx, KVM_REG_RBX, &rax) = 0 errno 0",
        "rbx 1122334455667788",
        "vmfs_irq(ctx, 0x20) = 0 errno 0",
        "vmfs_error(ctx, text, sizeof text) = 0 errno 0",
        "error 'too lon'",
        "8192 bytes of ram, the first 7",
        'vmfs_read(ctx, "version", text, sizeof text) = 2 errno 0',
        f"vmfs_destroy(argv[1]) = -1 errno {errno.ENOTEMPTY}",
        "leaked 0",
    ]
    assert (machine / "exit.data").read_bytes() == b"\x2a"
    assert (machine / "mode").read_bytes() == b"long"
    assert struct.unpack_from("<Q", (machine / "regs").read_bytes(), 8) == (0x1122334455667788,)
    assert (machine / "irq").read_bytes() == struct.pack("<I", 0x20)
    assert (machine / "mem").read_bytes()[4095] == 9


FAILURES = r"""
#include <stdio.h>
#include <vmfs.h>
#define SHOW(call) do { int failed = (call); printf("%d %d\n", failed, errno); } while (0)
int main(int argc, char **argv)
{
    struct vmfs_exit e;
    uint64_t value;
    size_t size;
    char text;
    int ctx = open(argv[argc - 1], O_RDONLY);

    SHOW(kvm_run(ctx, &e));
    SHOW(vmfs_get(ctx, KVM_REG_RAX, &value));
    SHOW(vmfs_map(ctx, &size) == NULL);
    SHOW(vmfs_error(ctx, &text, 1));
    SHOW(vmfs_error(ctx, &text, 0));
    return 0;
}
"""


def test_failures_keep_their_errno(tmp_path):
    machine = tmp_path / "machine"
    machine.mkdir()
    (machine / "vm_run.bin").write_bytes(b"short")
    (machine / "regs").write_bytes(b"short")
    (machine / "error").touch()
    lines = run(build(tmp_path, FAILURES), machine).stdout.splitlines()
    assert lines == [
        f"-1 {errno.EIO}",
        f"-1 {errno.EIO}",
        f"1 {errno.ENOENT}",
        f"0 {errno.ENOENT}",  # as it was: what works leaves errno alone
        f"-1 {errno.EINVAL}",
    ]
