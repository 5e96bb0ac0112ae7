"""Checks that several processes run together, forked from one script, so that everything is imported once."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import traceback
import warnings
from pathlib import Path


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def fork(target, processes, *arguments):
    """Calls ``target(rank, processes, *arguments)`` in forked processes, told of each other as by a launcher.

    Gives how each ended: 0, the code it exited with, or minus the signal that killed it.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    started = [
        context.Process(target=_in_child, args=(target, rank, processes, port, arguments)) for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    left = [process for process in started if process.is_alive()]
    for process in left:
        process.kill()
        process.join()
    return ["never ended" if process in left else process.exitcode for process in started]


def _in_child(target, rank, processes, port, arguments):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        target(rank, processes, *arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # a process group that others have left is not waited for


def run_checks(rank, processes, checks, folder):
    """Runs functions of (rank, processes, folder) and writes to ``<folder>/<rank>.json`` how each ended: "" is well."""
    ended = {}
    for check in checks:
        try:
            check(rank, processes, folder)
            ended[check.__name__] = ""
        except BaseException:
            ended[check.__name__] = traceback.format_exc()
        (Path(folder) / f"{processes}-{rank}.json").write_text(json.dumps(ended))


def ended_well(check, processes, folder):
    """Asserts that a check of this name ended well in every process."""
    for rank in range(processes):
        ended = json.loads((Path(folder) / f"{processes}-{rank}.json").read_text())
        assert ended.get(check, "did not run") == "", f"process {rank}: {ended.get(check)}"
