"""Instructions to compare with the host CPU: from a row of the core's table to bytes and a state for them.

64-bit mode only. Memory operands go to the data area of native.py: aligned, unaligned, over page borders and,
sometimes, out of it.
"""

import random
import struct

from emulator.native import ARITHMETIC, CODE, CODE_SIZE, DATA, DATA_SIZE, DF, GPRS, PAGE, START, TF, Case

EDGES = (
    0,
    1,
    2,
    3,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
MANDATORY = {"66": b"\x66", "F3": b"\xf3", "F2": b"\xf2"}
JUMPS = {"JMP", "CALL", "RET"}
RM_LETTERS = "EMWQUNR"


def value(rng: random.Random) -> int:
    """A 64-bit number: an edge, near an edge, small, or anything."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(EDGES)
    if kind == 1:
        return (rng.choice(EDGES) + rng.randrange(-2, 3)) % 2**64
    return rng.getrandbits(rng.choice((8, 16, 32, 64))) if kind == 2 else rng.getrandbits(64)


def float_bytes(rng: random.Random) -> bytes:
    """Eight bytes that are interesting as two floats, a double, or integers."""
    kind = rng.randrange(5)
    if kind == 0:
        values = (0.0, -0.0, 1.0, -1.5, 2.0**31, -(2.0**63), 1e308, 5e-324, 1e-310)
        values += (float("inf"), float("-inf"), float("nan"), rng.uniform(-1e6, 1e6))
        return struct.pack("<d", rng.choice(values))
    if kind == 1:
        values = (0.0, -0.0, 1.0, -1.5, 2.0**31, 3e38, 1e-45, 1e-39)
        values += (float("inf"), float("nan"), rng.uniform(-1e5, 1e5))
        return struct.pack("<ff", rng.choice(values), rng.choice(values))
    return struct.pack("<Q", value(rng))


def fx_image(rng: random.Random) -> bytes:
    """An FXSAVE image: mostly default control words, empty or full x87 stack, random XMM registers."""
    fx = bytearray(512)
    struct.pack_into("<HHB", fx, 0, 0x37F, rng.randrange(8) << 11, rng.choice((0, 0xFF, rng.getrandbits(8))))
    mxcsr = 0x1F80 | rng.choice((0, 0, 0, rng.randrange(4) << 13, 1 << 15, 1 << 6))
    struct.pack_into("<II", fx, 24, mxcsr, 0xFFFF)
    for i in range(8):
        struct.pack_into(
            "<QH",
            fx,
            32 + 16 * i,
            rng.getrandbits(63) | 1 << 63,
            rng.choice((0x3FFF, 0xBFFF, rng.randrange(0x3FC0, 0x4040))),
        )
    for at in range(160, 416, 8):
        fx[at : at + 8] = float_bytes(rng)
    return bytes(fx)


def operand_target(rng: random.Random, width: int) -> int:
    """Where a memory operand goes."""
    kind = rng.randrange(12)
    if kind == 0:  # over a page border
        return DATA + PAGE * rng.randrange(1, 4) - rng.randrange(1, max(width, 2))
    if kind == 1:  # over the end, or before the start
        return rng.choice((DATA - rng.randrange(1, 17), DATA + DATA_SIZE - rng.randrange(0, max(width, 2))))
    if kind < 5:
        return DATA + rng.randrange(0, DATA_SIZE - 64)
    return DATA + rng.randrange(0, DATA_SIZE - 64, 16)


def testable(row: dict) -> bool:
    """Whether a row has a comparison with the host at all."""
    return not {"NO64", "NOTEST", "CPL0"} & set(row["attributes"])


def has_modrm(row: dict) -> bool:
    operands = {operand for operand in row["operands"] if operand} - FIXED
    letters = {operand[0] for operand in operands if operand[0].isupper()}
    return row["digit"] >= 0 or row["mod"] != "rm" or bool(letters & set("EGMVWPQSCDNU"))


FIXED = {"AL", "AX", "rAX", "CL", "DX", "One", "ST0", "STi", "XMM0", "Xb", "Xv", "Yb", "Yv"}


def make_case(row: dict, rng: random.Random) -> Case:
    """A random encoding of the row and a random state."""
    gprs = {name: value(rng) for name in GPRS}
    if rng.randrange(16):
        gprs["rsp"] = DATA + rng.randrange(1024, DATA_SIZE - 1024, rng.choice((8, 8, 8, 2)))
    data = bytearray(b"".join(float_bytes(rng) for _ in range(DATA_SIZE // 64)) * 8)
    operands = [operand for operand in row["operands"] if operand]
    name, ip = row["name"], START
    if rng.randrange(8) == 0:  # over the end of a page
        ip = CODE + 2 * PAGE - rng.randrange(1, 12)

    legacy, rex = bytearray(), 0
    if row["prefix"] in MANDATORY:
        legacy += MANDATORY[row["prefix"]]
    if row["size"] in "VS" and row["prefix"] in ("any", "no-rep", "F3", "F2") and rng.randrange(3) == 0:
        legacy += b"\x66"
    if rng.randrange(2):
        rex = 0x40 | rng.getrandbits(4)
        if row["handler"] in ("nop", "pause"):  # 41 90 is XCHG; with F3, which of them it is is not said
            rex &= ~1
    vex = bool(row["length"])
    if vex:
        legacy, rex = bytearray(), 0x40 | rng.getrandbits(4)
        if row["w"] != "WX":
            rex = rex & ~8 | (8 if row["w"] == "W1" else 0)
    short = rng.randrange(12) == 0
    if short:
        legacy += b"\x67"
    if row["prefix"] == "any" and rng.randrange(20) == 0:
        legacy += rng.choice((b"\x2e", b"\x3e", b"\x36"))
    modrm = tail = b""
    displacement = gather_index = None
    if has_modrm(row):
        reg = row["digit"] if row["digit"] >= 0 else rng.randrange(6 if "Sw" in operands else 8)
        mod = row["mod"]
        if mod == "reg" or (mod == "rm" and rng.randrange(2)):
            modrm = bytes([0xC0 | reg << 3 | rng.randrange(8)])
        elif mod.startswith("reg"):
            modrm = bytes([0xC0 | reg << 3 | int(mod[3])])
        else:
            target = operand_target(rng, 32 if vex else 16)
            if "LOCK" in row["attributes"] and rng.randrange(4) == 0:
                legacy += b"\xf0"
            kind = rng.choice(("base", "base", "sib", "sib", "rip", "absolute"))
            if "Mvs" in operands:
                kind = "vsib"
            base = rng.randrange(16)
            if not rex:
                base &= 7
            disp = rng.choice((0, rng.randrange(-128, 128), rng.randrange(-(2**20), 2**20)))
            if kind in ("base", "sib"):
                if rex:
                    rex = rex & ~1 | base >> 3
                index = (rng.randrange(8) | (rex & 2) << 2) if kind == "sib" else 4
                scale = rng.randrange(4)
                if index == base:
                    index, kind = 4, "sib"
                    rex &= ~2 if rex else 0
                form = 0 if disp == 0 and base & 7 != 5 else 1 if -128 <= disp < 128 else 2
                tail = b"" if form == 0 else struct.pack("<b", disp) if form == 1 else struct.pack("<i", disp)
                offset = disp
                if kind == "sib" or base & 7 == 4:
                    modrm = bytes([form << 6 | reg << 3 | 4, scale << 6 | (index & 7) << 3 | base & 7])
                    if index != 4:
                        gprs[GPRS[index]] = rng.randrange(0, 256)
                        if index == 4:
                            gprs["rsp"] = 0
                        offset += gprs[GPRS[index]] << scale
                else:
                    modrm = bytes([form << 6 | reg << 3 | base & 7])
                gprs[GPRS[base]] = (target - offset) % 2**64
                if short:
                    gprs[GPRS[base]] = gprs[GPRS[base]] % 2**32 | rng.getrandbits(32) << 32
            elif kind == "vsib":
                gprs[GPRS[base]], scale = (target - disp) % 2**64, rng.randrange(4)
                rex = rex & ~1 | base >> 3
                gather_index = index = rng.randrange(8) | (rex & 2) << 2
                modrm = bytes([0x84 | reg << 3, scale << 6 | (index & 7) << 3 | base & 7])
                tail = struct.pack("<i", disp)
                if short:
                    gprs[GPRS[base]] = gprs[GPRS[base]] % 2**32
            elif kind == "rip":
                modrm = bytes([reg << 3 | 5])
                displacement = target
                tail = bytes(4)
            else:
                modrm = bytes([reg << 3 | 4, 0x25])
                tail = struct.pack("<i", target)
    opcode = row["opcode"] + (rng.randrange(8) if "OPREG" in row["attributes"] else 0)
    wide = bool(rex & 8)
    narrow = b"\x66" in legacy and row["prefix"] != "66"
    size = {
        "B": 1,
        "W": 2,
        "D": 4,
        "Q": 8,
        "V": 8 if wide else 2 if narrow else 4,
        "Y": 8 if wide else 4,
        "S": 2 if narrow and not wide else 8,
        "N": 8,
    }[row["size"]]
    immediate = b""
    for operand in operands:
        if operand in ("Ib", "sIb", "Lx"):
            immediate += struct.pack("<B", value(rng) & 0xFF)
        elif operand == "Iw":
            immediate += struct.pack("<H", value(rng) & (0x3F8 if name == "RET" else 0xFFFF))
        elif operand == "IwIb":
            depth = rng.randrange(4) if rng.randrange(2) else rng.randrange(32)
            immediate += struct.pack("<HB", rng.randrange(512), depth)
        elif operand == "Iz":
            immediate += struct.pack("<Q", value(rng))[: 2 if size == 2 else 4]
        elif operand == "Iv":
            immediate += struct.pack("<Q", value(rng))[:size]
        elif operand == "Jb":  # not into itself
            immediate += struct.pack("<b", rng.choice((rng.randrange(-100, -16), rng.randrange(100))))
        elif operand == "Jz":
            immediate += struct.pack("<i", rng.choice((rng.randrange(-PAGE, -16), rng.randrange(PAGE))))
        elif operand in ("Ob", "Ov"):
            target = operand_target(rng, 16)
            immediate += struct.pack("<I", target) if short else struct.pack("<Q", target)
    if name in JUMPS or row["handler"].startswith("j"):  # a narrow near branch differs between makers
        legacy = bytearray(legacy.replace(b"\x66", b""))
    escape = bytes.fromhex(row["map"])
    # mandatory prefixes and 66 may stand anywhere before REX
    prefixes = list(legacy)
    rng.shuffle(prefixes)
    if vex:
        vvvv = rng.randrange(16) if {"By", "Hx", "Hd", "Hq"} & set(operands) else 0
        long = row["length"] == "L1" or (row["length"] in ("LX", "LIG") and rng.randrange(2) == 1)
        escape = vex_prefix(row, rex, vvvv, long)
    if rex and not vex:
        prefixes.append(rex)
    code = bytes(prefixes) + escape + bytes([opcode]) + modrm + tail + immediate
    if displacement is not None:
        at = len(code) - len(immediate) - 4
        code = code[:at] + struct.pack("<i", displacement - (ip + len(code))) + code[at + 4 :]
    case = Case(
        code=code,
        gprs=gprs,
        data=b"",
        flags=rng.getrandbits(32) & (ARITHMETIC | (DF if rng.randrange(4) == 0 else 0)),
        fx=fx_image(rng),
        ymm=b"".join(float_bytes(rng) for _ in range(32)),
        ip=ip,
        name=f"{name} {','.join(operands)}",
        undefined=row["flags_undefined"],
    )
    _prepare(row, case, data, rng)
    if gather_index is not None:
        _set_index(row, case, gather_index, rng)
    case.data = bytes(data)
    return case


def _set_index(row: dict, case: Case, number: int, rng: random.Random) -> None:
    """Numbers of elements of a gather that lie near each other, now and then one far away."""
    size, form = (4, "<i") if "GATHERD" in row["name"] else (8, "<q")
    far = rng.randrange(4) == 0
    values = b"".join(
        struct.pack(form, rng.randrange(-(2**31), 2**31) if far and rng.randrange(6) == 0 else rng.randrange(-64, 256))
        for _ in range(32 // size)
    )
    fx, ymm = bytearray(case.fx), bytearray(case.ymm)
    fx[160 + 16 * number : 176 + 16 * number] = values[:16]
    ymm[16 * number : 16 * number + 16] = values[16:]
    case.fx, case.ymm = bytes(fx), bytes(ymm)


def vex_prefix(row: dict, rex: int, vvvv: int, long: bool) -> bytes:
    """C4 and two bytes, or C5 and one. R, X, B, vvvv are inverted (Intel SDM 2A 2.3.5)."""
    pp = ("none", "66", "F3", "F2").index(row["prefix"])
    last = (~vvvv & 15) << 3 | long << 2 | pp
    if row["map"] == "0F" and not rex & 11:
        return bytes([0xC5, (~rex & 4) << 5 | last])
    opcode_map = ("0F", "0F38", "0F3A").index(row["map"]) + 1
    return bytes([0xC4, (~rex & 7) << 5 | opcode_map, (rex & 8) << 4 | last])


def _prepare(row: dict, case: Case, data: bytearray, rng: random.Random) -> None:
    """What some instructions need so that they do not leave the test, or seldom fault."""
    if {"Xb", "Xv"} & set(row["operands"]):
        case.gprs["rsi"] = operand_target(rng, 8)
    if {"Yb", "Yv"} & set(row["operands"]):
        case.gprs["rdi"] = operand_target(rng, 8)
    if row["name"] in ("SHLD", "SHRD") and b"\x66" in case.code[:4]:  # 16 bits by more than 16: makers differ

        def at_most_16(count: int) -> int:
            return count & ~31 | min(count & 31, 16)

        if row["operands"][2] == "Ib":
            case.code = case.code[:-1] + bytes([at_most_16(case.code[-1])])
        else:
            case.gprs["rcx"] = at_most_16(case.gprs["rcx"])
    if row["name"] == "LEAVE" and rng.randrange(2):
        case.gprs["rbp"] = operand_target(rng, 8)
    if row["name"] == "XLAT":
        case.gprs["rbx"] = operand_target(rng, 1) - rng.randrange(256)
    if row["name"] in ("DIV", "IDIV") and rng.randrange(2):  # a high half that lets the quotient fit
        small = rng.getrandbits(rng.choice((1, 4, 16, 31)))
        case.gprs["rdx"] = small if rng.randrange(2) else 0
        case.gprs["rax"] &= ~0xFF80 if rng.randrange(2) else ~0
        if row["name"] == "IDIV" and rng.randrange(2):
            case.gprs["rdx"], case.gprs["rax"] = 2**64 - 1 - case.gprs["rdx"], case.gprs["rax"] | 0xFF80
    if row["name"] in JUMPS:
        target = CODE + rng.choice((rng.randrange(PAGE), rng.randrange(3 * PAGE, CODE_SIZE - 16)))
        for at in range(0, DATA_SIZE, 8):
            struct.pack_into("<Q", data, at, target)
        case.gprs["rsp"] &= ~7
        if row["mod"] == "rm" and row["digit"] >= 0 and case.gprs:
            for name in GPRS:
                if not DATA - 2**22 <= case.gprs[name] % 2**32 < DATA + 2**22 and case.gprs[name] >= 256:
                    case.gprs[name] = target
    if row["name"] == "POPF":
        for at in range(0, DATA_SIZE, 2):  # neither TF nor AC, at whichever alignment
            flags = struct.unpack_from("<H", data, at)[0] & ~(TF | TF >> 8 << 8 | 0x0404) & 0xFEFB
            struct.pack_into("<H", data, at, flags & 0x0CD5 if at % 8 == 0 else 0)
