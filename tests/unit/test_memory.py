"""RAM as a memfd: sizes, ends, and that it is given back."""

import mmap
import os

import pytest

from vmfs.memory.ram import HIGH_START, LOW_MOST, MAXIMUM_SIZE, PAGE, Memory, regions_of, size_to
from vmfs.words.errors import Busy, Gone, Invalid, PastEnd


def test_reads_and_writes_stop_at_the_end():
    memory = Memory(2 * PAGE)
    assert memory.write(2 * PAGE - 2, b"abcd") == 2
    assert memory.read(2 * PAGE - 2, 100) == b"ab"
    assert memory.read(2 * PAGE, 1) == b""
    with pytest.raises(PastEnd):
        memory.write(2 * PAGE, b"x")
    assert os.fstat(memory.fd).st_size == 2 * PAGE


@pytest.mark.parametrize("size", [0, -PAGE, PAGE + 1, MAXIMUM_SIZE + PAGE])
def test_sizes_that_cannot_be(size):
    with pytest.raises(Invalid):
        Memory(size)
    memory = Memory(PAGE)
    with pytest.raises(Invalid):
        memory.resize(size)
    assert memory.size == PAGE


def test_resize_until_sealed():
    memory = Memory(PAGE)
    memory.resize(4 * PAGE)
    memory.write(3 * PAGE, b"x")
    memory.seal()
    memory.seal()
    memory.resize(4 * PAGE)  # the same size is no change
    with pytest.raises(Busy):
        memory.resize(PAGE)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, PAGE)  # not for anyone who holds the descriptor either


def test_untouched_ram_costs_nothing_and_close_gives_it_back():
    memory = Memory(64 << 20)
    assert os.fstat(memory.fd).st_blocks == 0
    view = mmap.mmap(memory.fd, 64 << 20)
    view[: 1 << 20] = b"x" * (1 << 20)
    assert os.fstat(memory.fd).st_blocks * 512 >= 1 << 20
    kept = os.dup(memory.fd)
    memory.close()
    memory.close()
    assert os.fstat(kept).st_blocks == 0
    assert view[0] == 0
    view.close()
    os.close(kept)
    with pytest.raises(Gone):
        memory.read(0, 1)


def test_a_view_knows_what_was_touched_and_outlives_the_memory():
    memory = Memory(64 << 20)
    with memory.view() as ram:
        assert list(ram.extents()) == []
        memory.write(5 * PAGE + 7, b"x")
        memory.write((64 << 20) - 1, b"y")
        touched = list(ram.extents())
        assert all(start % PAGE == end % PAGE == 0 for start, end in touched)
        assert any(start <= 5 * PAGE + 7 < end for start, end in touched)
        assert touched[-1][1] == 64 << 20
        assert sum(end - start for start, end in touched) < 16 << 20
        assert ram.read(5 * PAGE + 7, 2) == b"x\0"
        assert ram.read((64 << 20) - 1, 9) == b"y" and ram.read(64 << 20, 1) == b""
        memory.close()
        assert list(ram.extents()) == [] and ram.read(5 * PAGE + 7, 1) == b"\0"
    with pytest.raises(Gone):
        memory.view()


def test_where_ram_lies():
    for size in (PAGE, LOW_MOST, LOW_MOST + PAGE, 64 << 30, MAXIMUM_SIZE):
        regions = regions_of(size)
        assert sum(one.size for one in regions) == size and size_to(regions[-1].end) == size
        assert all(one.end <= LOW_MOST or one.address >= HIGH_START for one in regions)
    for end in (LOW_MOST + 1, HIGH_START):
        with pytest.raises(Invalid, match="devices"):
            size_to(end)
