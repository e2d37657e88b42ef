"""All conformance cases, a file a family."""

from engine.cases import access, code16, control, debug, exceptions, interrupts, modes, processor

CASES = (
    *access.CASES,
    *code16.CASES,
    *control.CASES,
    *debug.CASES,
    *exceptions.CASES,
    *interrupts.CASES,
    *modes.CASES,
    *processor.CASES,
)
