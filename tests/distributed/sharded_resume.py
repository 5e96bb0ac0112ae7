"""Run by test_sharded_run: resumes in 1 and in 4 processes what 2 processes wrote, from both formats.

The first process writes what was loaded and how it ended to ``<folder>/<format>/resumed-<processes>.pt``.
"""

import sys
from pathlib import Path

from sharded import Sharded, averaging, fit, forked, whole_of
from sharded_run import Look, rank_zero


def resume(root, processes):
    for name in ("file", "folder"):
        path, callback, loaded = root / name / "x.ckpt", averaging(), []
        look = Look(callback, loaded)
        kwargs = {"processes": processes, "folders": name == "folder", "epochs": 3, "ckpt_path": path}
        this = fit(Sharded(), callback, look, **kwargs)
        assert this.world_size == processes
        end = whole_of(callback.average.named_tensors()), whole_of(callback.average.named_live())
        rank_zero(this, (*loaded[:2], *end), path.with_name(f"resumed-{processes}.pt"))


if __name__ == "__main__":
    for processes in (1, 4):
        codes = forked(processes, resume, Path(sys.argv[1]), processes)
        assert codes == [0] * processes, codes
