"""A machine in one's own process: `from vmfs import Machine`. No mount, no root, no thread (docs/library.md)."""
