"""The choice of an engine, with engines that are not there; and the debug registers of KVM."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs import engine as engines
from vmfs.engine import ENGINES, EngineInfo, Row, by_name, choose, describe
from vmfs.engine.base import Availability, DebugRequest
from vmfs.engine.kvm.debugregs import NO_PLAN, NOTHING, Plan, plan
from vmfs.engine.kvm.engine import KvmEngine
from vmfs.words.errors import EngineFailed, Invalid, Unsupported
from vmfs.words.stops import Breakpoint, Watchpoint


class Works:
    name = "works"

    def probe(self):
        return Availability(True, "it does")


class Other(Works):
    name = "other"


class Broken:
    name = "broken"

    def probe(self):
        return Availability(False, "a reason")


def row(cls):
    return Row(cls.name, __name__, cls.__name__)


@pytest.fixture
def rows(monkeypatch):
    """Rows for the three, and speeds by name: nothing here is timed."""
    here = {cls.__name__: cls for cls in (Works, Other, Broken)}
    monkeypatch.setattr(engines.importlib, "import_module", lambda name: type("module", (), here))
    speeds = {"works": 1.0, "other": 100.0}
    monkeypatch.setattr(engines, "measure_speed", lambda engine: speeds[engine.name])
    return row(Works), row(Broken), row(Other)


def test_describe(rows):
    assert describe(rows) == (
        EngineInfo("works", True, False, 1.0, "it does"),
        EngineInfo("broken", False, False, None, "a reason"),
        EngineInfo("other", True, True, 100.0, "it does"),
    )


def test_auto_is_the_fastest(rows):
    assert choose("auto", rows=rows).name == "other"
    assert choose("auto", describe(rows[:2]), rows).name == "works"


def test_of_equals_the_first_is_preferred(rows, monkeypatch):
    monkeypatch.setattr(engines, "measure_speed", lambda engine: 5.0)
    assert [info.preferred for info in describe(rows)] == [True, False, False]


def test_a_forced_engine_is_that_one_or_none(rows):
    assert choose("works", rows=rows).name == "works"
    with pytest.raises(EngineFailed, match="broken does not work here: a reason"):
        choose("broken", rows=rows)
    with pytest.raises(Invalid, match="no engine nonsense: works, broken, other"):
        choose("nonsense", rows=rows)


def test_no_engine_at_all(rows):
    with pytest.raises(EngineFailed, match="broken: a reason"):
        choose("auto", rows=rows[1:2])


def test_an_engine_that_fails_while_it_is_timed_is_not_available(rows, monkeypatch):
    def fail(engine):
        raise EngineFailed("it stopped")

    monkeypatch.setattr(engines, "measure_speed", fail)
    assert describe(rows[:1]) == (EngineInfo("works", False, False, None, "it stopped"),)


def test_an_engine_that_is_not_built_is_a_reason():
    missing = Row("missing", "vmfs.engine.there_is_none", "Engine")
    with pytest.raises(EngineFailed, match="missing is not installed"):
        by_name("missing", (missing,))
    assert describe((missing,))[0].available is False


def test_the_table_names_what_it_loads():
    assert len({row.name for row in ENGINES}) == len(ENGINES)
    for entry in ENGINES:
        try:
            assert entry.load().name == entry.name
        except EngineFailed as error:
            assert "not installed" in str(error)


def test_kvm_without_a_device():
    availability = KvmEngine("/dev/there-is-none").probe()
    assert not availability.available
    assert "/dev/there-is-none does not exist: load kvm_intel" in availability.reason


def test_kvm_with_another_device():
    availability = KvmEngine("/dev/null").probe()
    assert not availability.available
    assert "KVM_GET_API_VERSION: " in availability.reason
    with pytest.raises(EngineFailed):
        KvmEngine("/dev/null").create_machine()


def planned(request) -> Plan:
    return plan(request, has_watchpoints=True)


def hardware(request):
    return planned(request).hardware


def registers(points):
    control, _, dr0, dr1, dr2, dr3, _, _, _, dr7 = struct.unpack("<II8Q", points.pack())
    return control, (dr0, dr1, dr2, dr3), dr7


def test_nothing_to_stop_for():
    assert NOTHING.pack() == bytes(72)


def test_debug_registers():
    """Intel SDM 3B 18.2.4."""
    request = DebugRequest(stops=(Breakpoint(1, 0x1000), Watchpoint(2, 0x2000, 8, False, True)))
    control, addresses, dr7 = registers(hardware(request))
    assert control == 1 | 0x20000
    assert addresses == (0x1000, 0x2000, 0, 0)
    assert dr7 & 0xFF == 0b1010  # G0 and G1
    assert dr7 >> 16 & 0xF == 0b0000  # execution, length 0
    assert dr7 >> 20 & 0xF == 0b1001  # writes, of 8 bytes
    assert registers(hardware(DebugRequest(step=True)))[0] == 3


@given(
    address=st.integers(0, 1 << 64) | st.integers((1 << 64) - 64, 1 << 64),
    length=st.integers(-1, 40),
    read=st.booleans(),
)
def test_watchpoints_cover_their_bytes_and_no_others(address, length, read):
    watch = Watchpoint(1, address, length, on_read=read, on_write=True)
    try:
        found = planned(DebugRequest(stops=(watch,)))
    except (Invalid, Unsupported) as error:
        assert length < 1 or address + length > 1 << 64 or (read and length > 8 and isinstance(error, Unsupported))
        return
    points = found.hardware
    if found.ways == {1: "stepping"}:  # what is written, where it does not fit
        assert (found.watches, points.slots, read) == ((watch,), (), False) and length > 8
        return
    assert found.ways == {1: "hardware"} and not found.steps and not found.watches
    sizes = {0b00: 1, 0b01: 2, 0b11: 4, 0b10: 8}
    covered = []
    for slot in points.slots:
        size = sizes[slot.length]
        assert slot.address % size == 0, "a debug register ignores the low bits of its address"
        assert slot.kind == (0b11 if read else 0b01)
        covered += range(slot.address, slot.address + size)
    assert covered == list(range(address, address + length))
    assert len(points.slots) <= 4


@pytest.mark.parametrize(
    "watchpoint, words",
    [
        (Watchpoint(1, 0, 4, on_read=True, on_write=False), "cannot watch reads alone"),
        (Watchpoint(1, 0, 4, on_read=True, on_write=True, physical=True), "guest-physical"),
        (
            Watchpoint(1, 0, 64, on_read=True, on_write=True),
            "64 bytes at 0x0 need more debug registers",
        ),
    ],
)
def test_what_debug_registers_cannot_watch(watchpoint, words):
    with pytest.raises(Unsupported, match=words):
        planned(DebugRequest(stops=(watchpoint,)))


def test_the_first_four_are_in_hardware():
    """In the order of their ids, of whatever kind; two of one place share a register."""
    found = planned(
        DebugRequest(
            stops=(
                Breakpoint(1, 5),
                Breakpoint(3, 6),
                Breakpoint(4, 5),
                Breakpoint(6, 7),
                Breakpoint(7, 8),
                Watchpoint(2, 0x1000, 8, False, True),
                Watchpoint(5, 0x2000, 16, False, True),
            )
        )
    )
    assert {id_ for id_, way in found.ways.items() if way == "hardware"} == {1, 2, 3, 4, 6}
    assert [slot.point.id for slot in found.hardware.slots] == [1, 2, 3, 6]
    assert found.breakpoints == {5: (1, 4), 6: (3,), 7: (6,), 8: (7,)}
    assert [watch.id for watch in found.watches] == [5] and found.steps


def test_without_data_breakpoints_writes_are_stepped_for():
    found = plan(DebugRequest(stops=(Watchpoint(1, 0x1000, 8, False, True),)), has_watchpoints=False)
    assert found.ways == {1: "stepping"} and found.hardware == NOTHING
    with pytest.raises(Unsupported, match="PVM"):
        plan(DebugRequest(stops=(Watchpoint(1, 0x1000, 8, True, True),)), has_watchpoints=False)
    assert planned(DebugRequest()) == NO_PLAN
