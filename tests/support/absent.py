"""What a new interpreter does in which some packages can't be imported."""

from __future__ import annotations

import subprocess
import sys

_BLOCKER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"{{name}} is absent here")

sys.meta_path.insert(0, Absent())
"""


def run_without(names: tuple[str, ...], code: str, *arguments: str) -> str:
    """What the code prints, in an interpreter without these packages, its arguments in `sys.argv[1:]`."""
    command = [sys.executable, "-W", "ignore", "-c", _BLOCKER.format(names=names) + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
