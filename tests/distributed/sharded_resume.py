"""Run by test_sharded_run in 1 and in 4 processes: resumes what 2 processes wrote, from both formats.

The first process writes what was loaded and how it ended to ``<folder>/<format>/resumed-<processes>.pt``.
"""

import sys
from pathlib import Path

import torch
from sharded import Sharded, averaging, fit, quiet, whole_of
from sharded_run import Look

if __name__ == "__main__":
    quiet()
    processes = int(sys.argv[2])
    for name in ("file", "folder"):
        folder, callback, loaded = Path(sys.argv[1], name), averaging(), []
        this = fit(
            Sharded(),
            callback,
            Look(callback, loaded),
            processes=processes,
            folders=name == "folder",
            epochs=3,
            ckpt_path=folder / "x.ckpt",
        )
        assert this.world_size == processes
        end = whole_of(callback.average.named_tensors()), whole_of(callback.average.named_live())
        if this.is_global_zero:
            torch.save((*loaded[:2], *end), folder / f"resumed-{processes}.pt")
    torch.distributed.destroy_process_group()
