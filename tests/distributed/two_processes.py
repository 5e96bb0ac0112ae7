"""Running a script in several processes on a CPU, with gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path


def run(script, *arguments):
    """Runs a script of this folder, or at another path, which starts its further processes; gives how it ended."""
    return python(str(Path(__file__).parent / script), *map(str, arguments))


def python(*arguments, cwd=None):
    """Runs Python in a process of its own; gives how it ended."""
    # a launcher that the tests themselves may run under is none of the script's
    launchers = ("LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def ended(script, folder):
    """How each check of a script ended, in each of two processes; the script itself may have been ended by one."""
    ran = run(script, folder)
    files = [folder / f"{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), ran.stderr
    return [json.loads(file.read_text()) for file in files]


def results(script, folder, *arguments, processes=2):
    """Runs a script that writes what each process saw to ``<folder>/<rank>.json``; gives it."""
    ran = run(script, folder, *arguments)
    assert ran.returncode == 0, ran.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
