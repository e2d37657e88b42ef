"""What lives use, laid together in memory.

CPython counts references in the objects themselves, so a process that was forked has a page of its own of each one
that it only looked at. Functions and their code, which are used the most, lie where their module happened to be loaded:
a few that are called among many that nobody calls. Copies that are made one after another fill few pages.

Source: CPython 3.11 Objects/obmalloc.c (pools of one size), Objects/funcobject.c; mallopt(3) (arenas).
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

_SIZES = range(48, 513, 16)  # bytes: of these CPython keeps pools; smaller ones hold nothing of ours
_FREE_MOST = 2 << 20  # bytes of one size that are taken from what is free
_POOL = 16 << 10  # bytes
_HELD: list[Any] = []  # for good: what is made later does not come where it was
_KINDS = (types.FunctionType, staticmethod, classmethod, property)

Codes = dict[int, types.CodeType]  # by id: equal ones are not the same


def executed(act: Callable[[], object]) -> Codes:
    """The code that `act` runs, in its thread and in those that it starts, and of the functions which that makes."""
    found: Codes = {}

    def look(frame: types.FrameType, event: str, _: object) -> None:
        if event == "call" and id(frame.f_code) not in found:
            found.update((id(one), one) for one in _with_inner(frame.f_code))

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        act()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return found


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for one in code.co_consts:
        if type(one) is types.CodeType:
            yield from _with_inner(one)


def lay_together(codes: Codes) -> None:
    """Make copies of them, and of the functions whose they are, as far as only classes and modules have those. They are
    cold: CPython has adapted none of them yet. Another thread does it, which may be there for a moment longer."""
    gc.unfreeze()  # what is frozen is in no list
    fill_holes()
    _HELD.append(codes)
    # What is larger than those sizes is malloc's, which gives a new thread an arena of its own.
    thread = threading.Thread(target=_copy_all, args=(codes,))
    thread.start()
    thread.join()


def fill_holes() -> None:
    """What is made from now on lies together."""
    _HELD.extend(_fill(size) for size in _SIZES)


def _fill(size: int) -> list[bytes]:
    """What was free of that size, until it comes from a new pool."""
    held = [bytes(size - 33)]  # sys.getsizeof(b"") is 33
    row = 0
    while row < _POOL // size - 2 and len(held) < _FREE_MOST // size:  # all of a pool in a row: nobody has used it
        held.append(bytes(size - 33))
        row = row + 1 if id(held[-1]) - id(held[-2]) == size else 0
    return held


def _copy_all(codes: Codes) -> None:
    copies = _Copies(codes)
    for code in codes.values():
        copies.of_code(code)
    for value, places in _of_modules_and_classes():
        if (new := copies.of(value)) is not value:
            _HELD.append(value)
            for owner, name in places:
                with contextlib.suppress(TypeError):  # of a class that cannot be changed
                    type.__setattr__(owner, name, new) if isinstance(owner, type) else setattr(owner, name, new)
    for one in gc.get_objects():  # those that others have, too
        if type(one) is types.FunctionType and id(one.__code__) in codes:
            one.__code__ = copies.of_code(one.__code__)
            _name(one)


def _of_modules_and_classes() -> list[tuple[Any, list[tuple[Any, str]]]]:
    """What nothing else has, and where it is."""
    owners = [one for one in gc.get_objects() if issubclass(type(one), type) or type(one) is types.ModuleType]
    places: dict[int, list[tuple[Any, str]]] = {}
    others: dict[int, int] = {}
    for owner in owners:
        for name, value, references in _members(owner):
            if type(value) in _KINDS and name != "__new__":
                places.setdefault(id(value), []).append((owner, name))
                others[id(value)] = references - _ALONE + 1
    return [
        (vars(there[0][0])[there[0][1]], there) for at, there in places.items() if others[at] == len(there)
    ]


def _members(owner: Any) -> Iterator[tuple[str, Any, int]]:
    """With their reference counts, as they are seen here."""
    for name, value in list(vars(owner).items()):
        yield name, value, sys.getrefcount(value)


def _name(function: types.FunctionType) -> None:
    """By the strings of its code, which are not elsewhere."""
    code = function.__code__
    if function.__name__ == code.co_name:
        function.__name__ = code.co_name
    if function.__qualname__ == code.co_qualname:
        function.__qualname__ = code.co_qualname


class _Probe:
    """What its members have of references nobody else has."""

    def alone(self) -> None: ...

    @property
    def wrapped(self) -> None: ...


_ALONE = next(references for name, _, references in _members(_Probe) if name == "alone")
_ALONE_WRAPPED = sys.getrefcount(vars(_Probe)["wrapped"].fget)


class _Copies:
    def __init__(self, codes: Codes) -> None:
        self._codes = codes
        self._made: dict[int, types.CodeType] = {}

    def of(self, value: Any) -> Any:
        """A function, or what wraps some; itself, where it is to stay."""
        kind = type(value)
        if kind is types.FunctionType:
            return self._of_function(value)
        if kind in (staticmethod, classmethod):
            alone = sys.getrefcount(value.__func__) == _ALONE_WRAPPED
            new = self._of_function(value.__func__) if alone else value.__func__
            return value if new is value.__func__ else kind(new)
        if kind is property:
            alone = sys.getrefcount(value.fget) == _ALONE_WRAPPED
            new = self._of_function(value.fget) if alone else value.fget
            return value if new is value.fget else property(new, value.fset, value.fdel, value.__doc__)
        return value

    def _of_function(self, one: Any) -> Any:
        if type(one) is not types.FunctionType or weakref.getweakrefcount(one):
            return one
        code = self.of_code(one.__code__)
        if code is one.__code__:
            return one
        new = types.FunctionType(code, one.__globals__, one.__name__, one.__defaults__, one.__closure__)
        new.__kwdefaults__, new.__annotations__, new.__doc__ = one.__kwdefaults__, one.__annotations__, one.__doc__
        new.__module__, new.__qualname__ = one.__module__, one.__qualname__
        new.__dict__.update(one.__dict__)
        _name(new)
        return new

    def of_code(self, code: types.CodeType) -> types.CodeType:
        if id(code) not in self._codes:
            return code
        if id(code) not in self._made:
            inner = (self.of_code(one) if type(one) is types.CodeType else one for one in code.co_consts)
            self._made[id(code)] = code.replace(
                co_consts=tuple(inner), co_name=_again(code.co_name), co_qualname=_again(code.co_qualname)
            )
        return self._made[id(code)]


def _again(name: str) -> str:
    """The same in another place: a function or a generator that is made has it."""
    return "".join(list(name))
