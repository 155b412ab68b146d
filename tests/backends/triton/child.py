"""Tests in a process of their own: environment variables that Triton reads once, on its first import."""

from __future__ import annotations

import os
import subprocess
import sys


def run_in_child(file: str, keyword: str, *, workers: int = 0, **variables: str) -> str:
    """
    Run the tests of a file that a keyword selects, with variables of the environment; what pytest said of each.

    With `workers`, side by side: tests that compile for most of their time.
    """
    # the child is no worker of ours, and plugins would take it for one
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    # a plugin that is installed somewhere warns of workers, and warnings are errors
    options = ["-x", "-vv", "-p", "no:cacheprovider", "-p", "no:benchmark", "-n", str(workers)]
    command = [sys.executable, "-m", "pytest", *options, "-k", keyword, file]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout
