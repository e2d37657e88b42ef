"""Devices without a guest."""

from __future__ import annotations

import random

import pytest
from devices.fakes import IMAGE_SECTORS, FakeMachine, Guest

from vmfs.devices.board import Board
from vmfs.devices.machine import Pc
from vmfs.memory.ram import Memory


@pytest.fixture
def image(tmp_path):
    """A disk's file, in which no two sectors are alike."""
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(IMAGE_SECTORS * 512))
    return path


@pytest.fixture
def memory():
    memory = Memory(16 << 20)
    yield memory
    memory.close()


@pytest.fixture
def machine():
    return FakeMachine()


@pytest.fixture
def board(machine, memory):
    board = Board(machine, memory)
    yield board
    board.close()


@pytest.fixture
def pc(machine, memory):
    pc = Pc(machine, memory)
    yield pc
    pc.close()


@pytest.fixture
def guest(pc):
    return Guest(pc)
