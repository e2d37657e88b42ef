"""All conformance cases, a file a family."""

from engine.cases import access, control, debug, exceptions, interrupts, modes

CASES = (
    *access.CASES,
    *control.CASES,
    *debug.CASES,
    *exceptions.CASES,
    *interrupts.CASES,
    *modes.CASES,
)
