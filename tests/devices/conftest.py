"""Devices without a guest."""

from __future__ import annotations

import pytest
from devices.fakes import FakeMachine, Guest

from vmfs.devices.board import Board
from vmfs.devices.machine import Pc
from vmfs.memory.ram import Memory


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
