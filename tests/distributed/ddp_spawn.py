"""Run by test_ddp_spawn: the main process hands module and callback to processes that it spawns, or forks.

It writes what it saw to <folder>/<start method>.json.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from ddp_runs import Net, averaging, ddp, equal, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint


def fit(start_method, path, callback, ckpt_path=None, epochs=1):
    module = Net()
    keep = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
    settings = {"devices": 2, "max_epochs": epochs, "num_sanity_val_steps": 0, "enable_checkpointing": True}
    this = trainer(callback, keep, strategy=ddp(start_method=start_method), **settings)
    this.fit(module, loader(6, 4), loader(2, 4), ckpt_path=ckpt_path)
    return this, module


def main(folder, start_method):
    torch.set_num_threads(1)
    path, callback = Path(folder) / start_method, averaging(shard=True)
    this, module = fit(start_method, path, callback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        this.save_checkpoint(path / "main.ckpt")
        said = [str(warning.message) for warning in caught]
    first = torch.load(path / "epoch=0.ckpt", weights_only=True)
    main = torch.load(path / "main.ckpt", weights_only=True)
    files = [first]
    if start_method == "fork":  # spawned processes import everything anew, which takes most of the time
        fit(start_method, path, averaging(shard=True), ckpt_path=path / "epoch=0.ckpt", epochs=2)
        files.append(torch.load(path / "epoch=1.ckpt", weights_only=True))
    entries = [file["callbacks"][callback.state_key] for file in files]
    seen = {
        "the module holds the average": equal(module.state_dict(), first["state_dict"]),
        "and not the live weights": not torch.equal(module.net[0].weight, entries[0]["live"]["net.0.weight"]),
        "said": [each for each in said if "EMACallback" in each],
        "saved": equal(main["state_dict"], first["state_dict"]),
        "no average in it": callback.state_key not in main["callbacks"] and callback.average is None,
        "steps": [entry["num_steps"] for entry in entries],
    }
    (Path(folder) / f"{start_method}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
