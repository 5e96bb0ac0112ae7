"""Running a script in several processes on a CPU, with gloo."""

import functools
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
LIMIT = 300  # seconds
# torch imports some of its parts only where they are used
IMPORTED = ["helpers", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint"]


@functools.cache
def forks():
    """Processes of this context are forks of one that has imported all and calculated nothing: it has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    before = dict(os.environ)
    try:
        _become(environment())  # its forks inherit it
        forkserver.ensure_running()
    finally:
        _become(before)
    return context


def environment():
    # a launcher that the tests themselves may run under is none of the script's
    launchers = ("LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_")
    names = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return {**names, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def _become(environment):
    os.environ.clear()
    os.environ.update(environment)


def run(script, *arguments):
    """Runs a script of this folder, or at another path, in a process that need not import torch; gives how it ended."""
    with tempfile.TemporaryDirectory() as said:
        files = [Path(said) / name for name in ("stdout", "stderr")]
        process = forks().Process(target=_as_script, args=(HERE / script, [*map(str, arguments)], *files))
        process.start()
        process.join(LIMIT)
        code = process.exitcode
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        stdout, stderr = (file.read_text() if file.exists() else "" for file in files)
    assert code is not None, f"{script} did not end in {LIMIT} seconds\n{stdout}{stderr}"
    return SimpleNamespace(returncode=code, stdout=stdout, stderr=stderr)


def _as_script(path, arguments, *files):
    os.setsid()  # it can be killed with all processes that it has started
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    warnings.simplefilter("ignore")
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def python(*arguments, cwd=None):
    """Runs Python in a process of its own, which imports everything anew; gives how it ended."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        env={**environment(), "PYTHONUNBUFFERED": ""},  # else what two processes print is mixed within a line
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=LIMIT,
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
