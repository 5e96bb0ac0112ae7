"""Run by test_sharded_run: resumes in another number of processes what 2 processes wrote to the folder.

The first process writes what was loaded and how it ended to ``<folder>/resumed-<processes>.pt``. "in two dimensions"
4 processes train sharded and tensor parallel instead, and write to ``<folder>/2d-<rank>.json`` how that ended.
"""

import os
import sys
from pathlib import Path

from helpers import engine
from sharded import (
    Sharded,
    averaging,
    data,
    ended,
    fit,
    forked,
    fully_shard,
    same,
    strategy,
    trainer_of,
    whole_of,
    write,
)
from sharded_options import Parallel
from sharded_run import Look, rank_zero


def resume(folder, processes):
    path, callback, loaded = folder / "x.ckpt", averaging(), []
    look = Look(callback, loaded)
    kwargs = {"processes": processes, "folders": folder.name == "folder", "epochs": 3, "ckpt_path": path}
    this = fit(Sharded(), callback, look, **kwargs)
    assert this.world_size == processes
    end = whole_of(callback.average.named_tensors()), whole_of(engine(callback.average).named_live())
    rank_zero(this, (*loaded[:2], *end), path.with_name(f"resumed-{processes}.pt"))


class InTwoDimensions(Parallel):
    def configure_model(self):
        super().configure_model()
        for part in (self.net[0], self.net[2], self):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def two_dimensional(root):
    def run(folders, epochs=2, ckpt_path=None):
        callback = averaging(on_nonfinite="raise")
        over = strategy(4, folders, tensor_parallel=2)
        this = trainer_of(callback, processes=4, strategy=over, epochs=epochs)
        this.fit(InTwoDimensions(), *data(2), ckpt_path=ckpt_path)
        return this, callback.average

    for folders in (True, False):
        path = root / f"2d-{folders}.ckpt"
        this, average = run(folders)
        this.save_checkpoint(path)
        rank_zero(this, (whole_of(average.named_tensors()), whole_of(engine(average).named_live())), root / "2d.pt")
        _, entire = run(folders, 3)
        _, again = run(folders, 3, path)
        same(entire.named_tensors(), again.named_tensors())
        same(engine(entire).named_live(), engine(again).named_live())


def in_two_dimensions(root):
    write(root, f"2d-{os.environ['RANK']}", ended({"2d": two_dimensional}, root))


if __name__ == "__main__":
    folder, processes = Path(sys.argv[1]), sys.argv[2]
    if processes == "in two dimensions":
        codes = forked(4, in_two_dimensions, folder)
    else:
        codes = forked(int(processes), resume, folder, int(processes))
    assert set(codes) == {0}, codes
