"""Running a script in two processes on a CPU, under DDP with gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path


def results(script, folder):
    """Runs a script of this folder, which starts its second process by itself; gives what each one wrote as JSON."""
    # a launcher that the tests themselves may run under is none of the script's
    launchers = ("LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), str(folder)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
