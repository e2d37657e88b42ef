#!/usr/bin/env python3
"""`python mount_vmfs.py DIR` is `vmfs mount DIR`, with the packages of .venv where `make setup` made one."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    own = Path(__file__).resolve().parent / ".venv"
    if (own / "bin/python").exists() and Path(sys.prefix) != own:
        os.execv(own / "bin/python", [str(own / "bin/python"), *sys.argv])
    from vmfs.cli import main
    sys.exit(main(["mount", *sys.argv[1:]]))
