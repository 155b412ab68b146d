"""Tests in a process of their own: environment variables that Triton reads once, on its first import."""

from __future__ import annotations

import os
import subprocess
import sys


def run_in_child(file: str, keyword: str, **variables: str) -> str:
    """Run the tests of a file that a keyword selects, with variables of the environment; what pytest said of each."""
    # the child is no worker of ours, and plugins would take it for one
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-x", "-vv", "-p", "no:cacheprovider", "-k", keyword, file]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout
