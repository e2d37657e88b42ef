"""The commands of `vmfs` (vmfs.cli.COMMANDS), a module each."""
