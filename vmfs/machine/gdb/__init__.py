"""GDB's Remote Serial Protocol: packets, register layouts, the commands of a stub, and their server."""
