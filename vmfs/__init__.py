"""vmfs: every virtual machine is a directory."""

__version__ = "0.1.0"
