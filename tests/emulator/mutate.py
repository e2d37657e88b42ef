"""`make mutate`: do the tests of the translator find faults that are planted in it, one by one?

In a copy of the tree, under build/mutate, each row of PLANTS is put into the source, and what compares host code with
the host's CPU and with the interpreter has to fail: the fuzzer, its --ways, test_translator.py, test_tlb.py, and
test_code.py, which changes code. A plant that none of them finds fails this. `make mutate ARGS=words`: only those whose
text has the words.

What was found is noted in build/mutate/found, with a hash of the core and of its tests: a run that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build/mutate"
INSIDE = Path("vmfs/engine/emulator/core/translate")
FOUND = TREE / "found"
SECONDS = 900


@dataclass(frozen=True, slots=True)
class Plant:
    """`old` becomes `new`, in the first place where it stands."""

    what: str
    file: str
    old: str
    new: str


PLANTS = (
    Plant(
        "a memory access loses the flags that are read after it",
        "emit_flags.c",
        "(t->writes ? t->precise & ~t->writes : t->live)",
        "0",
    ),
    Plant(
        "what is asked of an instruction goes on being asked",
        "emit.c",
        "        return false;\n    t->asking = true;\n",
        "        return t->asking = true, false;\n    t->asking = true;\n",
    ),
    Plant(
        "CF alone, where other flags are needed, too",
        "emit_flags.c",
        "    if (needed == fC) {",
        "    if (needed & fC) {",
    ),
    Plant(
        "a comparison made again with its operands exchanged",
        "emit_flags.c",
        "case RECIPE_COMPARE: alu(t, p->size, GROUP_CMP, a, p, b)",
        "case RECIPE_COMPARE: alu(t, p->size, GROUP_CMP, b, p, a)",
    ),
    Plant(
        "a subtraction made again as an addition",
        "emit_flags.c",
        "p->kind == RECIPE_ADD ? GROUP_ADD : GROUP_SUB, T0, p, b);",
        "GROUP_ADD, T0, p, b);",
    ),
    Plant("flags that a fault may show, at a jump", "emit.c", "if (m->precise || (change", "if ((change"),
    Plant(
        "flags of a handler that host code reads after it",
        "accesses.c",
        "s->restore = t->writes & t->precise && !merges(t);",
        "s->restore = false;",
    ),
    Plant("OF in its own byte is forgotten", "emit_flags.c", "t->split |= t->writes;", "t->split |= t->writes & fC;"),
    Plant("CF in its own byte is older than a handler's", "emit.c", "unfold(t, s.split_behind);", ";"),
    Plant(
        "OF from a byte by a sum that is one too small",
        "emit_flags.c",
        "        put8(&t->code, 0x7f);\n        return;",
        "        put8(&t->code, 0x7e);\n        return;",
    ),
    Plant("OF does not come back from the image", "emit_flags.c", "    if (overflow) {", "    if (false) {"),
    Plant("OF is looked for in a wrong bit", "emit_flags.c", "kind ? masks[kind] : 1", "kind ? masks[kind] : 2"),
    Plant(
        "an index that is bounded no more is thought to be",
        "accesses.c",
        "        most = ~0ull;\n        if (!emitted",
        "        if (!emitted",
    ),
    Plant(
        "less without OF",
        "emit_flags.c",
        "restore_flags(t, true);\n        return condition;",
        "restore_flags(t, false);\n        return condition;",
    ),
    Plant(
        "RAX is lost when flags are saved", "emit_flags.c", "put_modrm(code, I_W, M1, 0x8b, RAX, in_register(T0));", ""
    ),
    Plant(
        "a vector register that is not stored",
        "emit.c",
        "t->dirty |= (u16)(writes << n);",
        "t->dirty |= (u16)((writes && n < 7) << n);",
    ),
    Plant("half of a vector is loaded", "emit.c", "        else if (t->ymm)", "        else if (t->ymm && store)"),
    Plant(
        "an address of 32 bits that is not cut",
        "accesses.c",
        "unsigned width = narrow ? 0 : I_W;",
        "unsigned width = I_W | narrow;",
    ),
    Plant(
        "a segment's base is forgotten",
        "accesses.c",
        "    if (r->seg >= SEG_FS)\n        put_modrm(code, I_W",
        "    if (r->seg > SEG_GS)\n        put_modrm(code, I_W",
    ),
    Plant("SIL instead of DH", "operands.h", "u.host += 4;", "u.host += 0;"),
    Plant(
        "a byte's register loses its rest",
        "operands.h",
        "u.reads |= writes && bytes < 4;",
        "u.reads |= writes && bytes < 2;",
    ),
    Plant(
        "a register of 32 bits keeps its high half",
        "emitters.c",
        "!(u->writes && bytes != 8)",
        "!(u->writes && bytes < 4)",
    ),
    Plant("AH to memory is AL", "emitters.c", "    u->host ^= 4;\n", "    u->host ^= 4;\n    return;\n"),
    Plant("operands exchanged, the direction not", "emitters.c", "    *opcode ^= 2;\n", "    *opcode ^= 0;\n"),
    Plant(
        "XCHG of two registers writes one", "emitters.c", "COPY(XCHG, CHANGES | WRITES_SECOND);", "COPY(XCHG, CHANGES);"
    ),
    Plant(
        "MOVZX is not thought to write",
        "emitters.c",
        "COPY(MOVZX, WRITES_FIRST);",
        "COPY(MOVZX, READS_FIRST);",
    ),
    Plant("BSF of zero writes", "emitters.c", "COPY(BSF, CHANGES);", "COPY(BSF, WRITES_FIRST);"),
    Plant("an address loads over a part of itself", "emitters.c", "pinned(r->base) != host));", "true));"),
    Plant("INC is DEC", "emitters.c", "0xff, o->operation == &operation_DEC", "0xff, o->operation != &operation_DEC"),
    Plant(
        "PUSH of half",
        "emitters.c",
        "t->wide ? I_W : 0, M1, 0x89, host, accessed(t)",
        "0, M1, 0x89, host, accessed(t)",
    ),
    Plant(
        "a scratch register is thought to hold what it did some instructions ago",
        "operands.h",
        "if (t->held.at != t->code.at)",
        "if (!t->held.at)",
    ),
    Plant(
        "a scratch register after a handler is older than struct vcpu",
        "emit.c",
        "if (s.held.at)",
        "if (s.held.at == NULL)",
    ),
    Plant(
        "two operands in one scratch register",
        "operands.h",
        "other->host = other->scratch = u->scratch;",
        "other->host = u->scratch;",
    ),
    Plant(
        "a scratch register is thought to hold another register",
        "operands.h",
        "if (!(u->is && u->reads && u->scratch != NO_REGISTER && u->offset == t->held.offset))",
        "if (!(u->is && u->reads && u->scratch != NO_REGISTER))",
    ),
    Plant(
        "CF from its own byte by another bit",
        "emit_flags.c",
        "put8(&t->code, t->split & fC ? 0 : image_bit(fC));",
        "put8(&t->code, t->split & fC ? 1 : image_bit(fC));",
    ),
    Plant("VEX without its length", "emitters_vex.c", "vectors && r->vector == 5, w", "false, w"),
    Plant("VEX without W", "emitters_vex.c", "(o->size == Y && r->size == 3)", "false"),
    Plant("VZEROUPPER leaves one", "emitters_vex.c", "n < (t->wide ? 16 : 8)", "n < (t->wide ? 15 : 8)"),
    Plant(
        "MULX has its halves exchanged where they are one",
        "emitters_vex.c",
        "    store_use(t, &third);\n    store_use(t, &reg);",
        "    store_use(t, &reg);\n    store_use(t, &third);",
    ),
    Plant(
        "a fused multiplication reads no addend",
        "emitters_vex.c",
        "#define NUMBER_3(name) COPY(name, CHANGES | FLOAT)",
        "#define NUMBER_3(name) COPY(name, WRITES_FIRST | FLOAT)",
    ),
    Plant(
        "a load is not thought to fault",
        "region.c",
        "precise = faults ? FLAGS_ARITHMETIC : reads",
        "precise = reads",
    ),
    Plant(
        "a way to other regions is open, whatever lies at the address now",
        "region.c",
        "    if (l->at != SAME_PAGE) {",
        "    if (false) {",
    ),
    Plant("a way to a block that is gone stays open", "region.c", "        close_ways(b);\n", ""),
    Plant(
        "a region outlives the code of one of its blocks",
        "../block/cache.c",
        "        region_kill(c, b->region);",
        "        ;",
    ),
    Plant(
        "a region goes on that has changed its own code",
        "region.c",
        "s->region->dead || s->region->key != c->key",
        "s->region->key != c->key",
    ),
    Plant(
        "an indirect jump to where other code lies now",
        "emit.c",
        "offsetof(struct jump_entry, id)));\n    stub_jump(s, jump_if(code, CC_NE));",
        "offsetof(struct jump_entry, id)));",
    ),
    Plant(
        "a way for which the budget is too small takes of it",
        "emit.c",
        "put_modrm(&t->code, I_W, M1, 0x03, BUDGET, in_memory(T0, offsetof(struct way, taken)));",
        "",
    ),
    Plant(
        "a call that the interpreter does again has pushed twice",
        "emit.c",
        "emit_jump_after(t, r, (i32)stack_width(t));",
        "emit_jump_after(t, r, 0);",
    ),
    Plant(
        "a row of accesses runs over the end of its page",
        "accesses.c",
        ".bytes = (u16)(run->high - run->low)",
        ".bytes = 1",
    ),
    Plant(
        "a row of accesses writes where it may only read",
        "accesses.c",
        ".write = run->writes",
        ".write = false",
    ),
    Plant(
        "a row of accesses loses the flags that are read after it",
        "accesses.c",
        "        flags_before(t, written);",
        "",
    ),
    Plant(
        "a row's later base is one that it has loaded",
        "accesses.c",
        "|| run->written >> (base >> 3) & 1)",
        ")",
    ),
    Plant(
        "vector registers after a handler are older than struct vcpu",
        "emit.c",
        "        t->stubs[i].reload = t->vectors;",
        "        t->stubs[i].reload = 0;",
    ),
    Plant(
        "vector registers before a handler are newer than struct vcpu",
        "emit.c",
        "            move_vectors(t, s.dirty, true);\n            flags_to_image(t);\n            load_constant",
        "            flags_to_image(t);\n            load_constant",
    ),
    Plant(
        "an access that has to be aligned is not checked", "accesses.c", "if (alignment > 1) {", "if (alignment > 64) {"
    ),
    Plant(
        "an address that is RIP's, of another instruction",
        "accesses.c",
        "(r->base == GPR_IP * 8 ? t->in->block->ip : 0)",
        "(r->base == GPR_IP * 8 ? t->in->block->ip + r->at : 0)",
    ),
    Plant(
        "a stretch runs over the end of its page",
        "accesses.c",
        ".write = s->write, .bytes = (u16)(s->high - s->low)",
        ".write = s->write, .bytes = 1",
    ),
    Plant(
        "a stretch writes where it may only read",
        "accesses.c",
        "    s->write |= a->write;\n",
        "    s->write &= a->write;\n",
    ),
    Plant(
        "a later access of a stretch is of its first byte",
        "accesses.c",
        "    t->at = (i32)(at - s->low);\n}\n\n/*",
        "}\n\n/*",
    ),
    Plant("two stretches have one slot", "accesses.c", "free_from[s->slot] > s->first", "false"),
    Plant(
        "a register that is written is what it was",
        "accesses.c",
        "        if (written >> reg & 1)",
        "        if (false)",
    ),
    Plant("a register goes on by the other way", "accesses.c", "-(i64)r->imm;", "(i64)r->imm;"),
    Plant("an address is a constant more than thought", "accesses.c", "        value.plus += r->disp;\n", ""),
    Plant("POP RSP is thought to pop", "accesses.c", "operation_POP && r->rm != RSP * 8)", "operation_POP)"),
    Plant("LEAVE leaves the stack where it is", "accesses.c", "(struct value){frame.of, frame.plus + width}", "top"),
    Plant("accesses by two indices are one", "accesses.c", "c->index == of_index.of && ", ""),
    Plant("accesses by two segments are one", "accesses.c", " && c->seg == seg", ""),
    Plant(
        "an aligned access relies on one that is not",
        "accesses.c",
        "    if (a->alignment > 1) {\n        u8",
        "    if (false) {\n        u8",
    ),
    Plant(
        "flags that only a copy's fault shows",
        "region.c",
        "(t->apart || !(m->checked >> i & 1))",
        "!(m->checked >> i & 1)",
    ),
    Plant(
        "flags after a copy are older than its own",
        "emit.c",
        "        load_flags(t, FLAGS_ARITHMETIC);\n    unfold",
        "        ;\n    unfold",
    ),
    Plant("vector registers after a copy", "emit.c", "    move_vectors(t, copy->vectors, false);\n", ""),
    Plant(
        "vector registers before a copy",
        "emit.c",
        "            move_vectors(t, s.dirty, true);\n            flags_to_image(t);\n            t->stubs",
        "            flags_to_image(t);\n            t->stubs",
    ),
    Plant("a scratch register after a copy", "emit.c", "    if (copy->held.at)\n", "    if (false)\n"),
    Plant(
        "a rotation of memory is one of a register",
        "emit_flags.c",
        "!(r->prefix & PREFIX_REGISTER) || !(left",
        "!(left",
    ),
    Plant(
        "a second place is looked at with no regard to the end of its page",
        "accesses.c",
        "compare_page(&t->code, &nowhere, look->bytes, look->alignment);",
        "compare_page(&t->code, &nowhere, 1, look->alignment);",
    ),
    Plant(
        "what has to be aligned need not be in a second place",
        "accesses.c",
        "compare_page(&t->code, &nowhere, look->bytes, look->alignment);",
        "compare_page(&t->code, &nowhere, look->bytes, 1);",
    ),
    Plant(
        "a store looks for a second place of loads",
        "accesses.c",
        "i32 side = second_side(look->write);",
        "i32 side = second_side(false);",
    ),
    Plant(
        "a known page is any that is in its second place",
        "accesses.c",
        "    stub_jump(s, jump_if(&t->code, CC_NE));\n    p.disp +=",
        "    if (s->in)\n        stub_jump(s, jump_if(&t->code, CC_NE));\n    p.disp +=",
    ),
    Plant(
        "a page that gets code is written by its second place",
        "../cpu/mmu.c",
        "                invalidate_second(t, TLB_WRITE, i);",
        "                continue;",
    ),
    Plant(
        "the log forgets second places",
        "../cpu/mmu.c",
        "            drop_write(c, &t->second[TLB_WRITE][i].page, TLB_INVALID(i),",
        "            continue;\n            drop_write(c, &t->second[TLB_WRITE][i].page, TLB_INVALID(i),",
    ),
    Plant(
        "what drops entries leaves those in second places",
        "../cpu/mmu.c",
        "    if (!(local && t->second_physical[kind][at] & TLB_GLOBAL))",
        "    if (false)",
    ),
    Plant(
        "a global page in a second place is dropped with the others",
        "../cpu/mmu.c",
        "    if (!(local && t->second_physical[kind][at] & TLB_GLOBAL))",
        "    if (true)",
    ),
    Plant(
        "entries change places, and keep their physical pages",
        "../cpu/mmu.c",
        "put_first(t, kind, at, &second, of_second);",
        "put_first(t, kind, at, &second, of_first);",
    ),
    Plant(
        "which entry goes follows from where it is",
        "../cpu/mmu.c",
        "    t->second_newer[kind][at] ^= 1;\n",
        "",
    ),
)


def make_tree() -> None:
    """With what was compiled, so that only what changes is compiled again."""
    (TREE / "build").mkdir(parents=True, exist_ok=True)
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy2(ROOT / name, TREE)
    copy = ["rsync", "-a", "--delete", "--exclude=__pycache__"]
    for name in ("vmfs", "tests"):
        subprocess.run([*copy, f"{ROOT / name}/", f"{TREE / name}/"], check=True)
    for planted in (TREE / "build").glob("lib.*"):  # of the last run; newer than the source that it gets back
        shutil.rmtree(planted)
    for each in ROOT.glob("build/temp.*"):
        subprocess.run([*copy, f"{each}/", f"{TREE / 'build' / each.name}/"], check=True)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=TREE,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": f"{TREE}:{TREE / 'tests'}", **environment},
    )


def build() -> None:
    done = run("setup.py", "-q", "build_ext", "--inplace")
    if done.returncode:
        raise SystemExit(f"mutate: the tree does not build:\n{done.stderr[-2000:]}")


def put(path: Path, source: str) -> None:
    """Of a header, what includes it is compiled again, and not all of the core, as setup.py would."""
    before = path.stat()
    path.write_text(source)
    if path.suffix == ".h":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        for each in path.parent.glob("*.c"):
            if f'"{path.name}"' in each.read_text():
                each.touch()


def digest(plant: Plant) -> str:
    """Of the plant, and of what decides whether it is found."""
    hashed = hashlib.sha256(repr(plant).encode())
    for folder in (ROOT / "vmfs/engine/emulator/core", ROOT / "tests/emulator"):
        for path in sorted(folder.rglob("*.[chS]")) + sorted(folder.glob("*.py")):
            if path != Path(__file__).resolve():
                hashed.update(path.read_bytes())
    return hashed.hexdigest()


def who_finds() -> str:
    """What fails; empty: nothing does."""
    try:
        tests = "-m pytest -q -x -p no:cacheprovider".split()
        folder, translator = f"--basetemp={TREE / 'pt'}", "tests/emulator/test_translator.py"
        if run(*tests, "tests/emulator/test_tlb.py", folder).returncode:
            return "the TLB's tests"
        if run(*tests, translator, folder, "-k", "not test_loops and not test_events").returncode:
            return "a test"  # those that take some seconds
        fuzz = ["-m", "emulator.fuzzing", "--seed", "11", "--finds", "1"]
        if run(*fuzz, "--cases", "400000", VMFS_JIT_THRESHOLD="0").returncode:
            return "fuzzer"
        if run(*fuzz, "--ways", "--cases", "400000").returncode:
            return "ways"
        if run(*tests, translator, folder, VMFS_LOOPS="200").returncode:
            return "loops"
        code = run(*tests, "tests/emulator/test_code.py", folder, VMFS_JIT_THRESHOLD="0")
        return "code" if code.returncode else ""
    except subprocess.TimeoutExpired:
        return "it hangs"


def main(words: list[str]) -> int:
    make_tree()
    build()
    if found := who_finds():
        print(f"mutate: {found} fails without a plant")
        return 2
    missed = 0
    known = set(FOUND.read_text().split()) if FOUND.exists() else set()
    for plant in PLANTS:
        if words and not all(word in plant.what for word in words):
            continue
        if (hashed := digest(plant)) in known:
            print(f"found   {plant.what} (before)", flush=True)
            continue
        path = TREE / INSIDE / plant.file
        source = path.read_text()
        if plant.old not in source:
            print(f"gone    {plant.what}: {plant.file} has no {plant.old!r}", flush=True)
            missed += 1
            continue
        put(path, source.replace(plant.old, plant.new, 1))
        build()
        found = who_finds()
        missed += not found
        if found:
            with FOUND.open("a") as file:
                print(hashed, file=file)
        print(f"{'found' if found else 'MISSED'}   {plant.what}{f' ({found})' if found else ''}", flush=True)
        put(path, source)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
