"""Files and folders that somebody else made: nothing in them is run, printed raw, or followed out of the folder."""

import collections
import io
import pickle
import zipfile

import pytest
import torch
from helpers import ema, fit, seeded

from lightning_ema import Constant, Power, Snapshots
from lightning_ema.__main__ import main
from lightning_ema.checkpoint import sharded
from lightning_ema.checkpoint.snapshot import save
from lightning_ema.files.text import printable


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "file.ckpt"
    fit(seeded(), ema(decay=Constant(0.9)), max_epochs=1).save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    """A folder as a sharded run writes it, with nothing sharded of ours in it."""
    from torch.distributed.checkpoint import save

    path = tmp_path_factory.mktemp("shards") / "step=6.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    save({"state_dict": content.pop("state_dict"), "extra": {"note": b"bytes"}}, checkpoint_id=path, no_dist=True)
    torch.save(content, path / "meta.pt")
    return path


@pytest.fixture
def copied(folder, tmp_path):
    import shutil

    return shutil.copytree(folder, tmp_path / "folder.ckpt")


def out(tmp_path):
    return str(tmp_path / "out.pt")


COMMANDS = {
    "inspect": lambda file, tmp_path: ["inspect", file],
    "export": lambda file, tmp_path: ["export", file, out(tmp_path)],
    "import": lambda file, tmp_path: ["import", file, "--as", "weights", "--out", out(tmp_path)],
    "import like": lambda file, tmp_path: [
        "import", file, "--as", "weights", "--out", out(tmp_path), "--like", file, "--live", file
    ],
    "synthesize": lambda file, tmp_path: ["synthesize", file, out(tmp_path), "--sigma-rel", "0.1"],
}  # fmt: skip


def refused(arguments, capsys):
    assert main(arguments) != 0
    return capsys.readouterr().err


FILES = {
    "zip": lambda payload, path: torch.save({"state_dict": payload}, path),
    "legacy": lambda payload, path: torch.save({"state_dict": payload}, path, _use_new_zipfile_serialization=False),
    "pickle": lambda payload, path: path.write_bytes(pickle.dumps({"state_dict": payload})),
    "old pickle": lambda payload, path: path.write_bytes(pickle.dumps(payload, protocol=0)),
    "in a callback's state": lambda payload, path: torch.save({"callbacks": {"a": payload}, "state_dict": {}}, path),
}


@pytest.mark.parametrize("ending", ["ckpt", "pt", "pth", "bin"])
@pytest.mark.parametrize("how", FILES)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_file_runs_code(command, how, ending, tmp_path, capsys):
    marker, file = tmp_path / "ran", tmp_path / f"file.{ending}"
    FILES[how](Payload(marker), file)
    message = refused(COMMANDS[command](str(file), tmp_path), capsys)
    assert not marker.exists() and str(file) in message


def reindexed(folder, change):
    index = pickle.loads((folder / ".metadata").read_bytes())
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def in_metadata(folder, payload):
    (folder / ".metadata").write_bytes(pickle.dumps(payload))


def in_planner_data(folder, payload):
    reindexed(folder, lambda index: index.planner_data.update(more=payload))


def as_storage(folder, payload):
    reindexed(folder, lambda index: index.storage_data.update(more=payload))


def by_a_dotted_name(folder, payload):
    """What protocol 4 may look up: an attribute of an attribute of a module that is allowed."""
    reduce = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93\x8c\x04true\x85R."
    (folder / ".metadata").write_bytes(reduce)


def in_rest(folder, payload):
    content = torch.load(folder / "meta.pt", weights_only=True)
    torch.save({**content, "more": payload}, folder / "meta.pt")


IN_FOLDERS = [in_metadata, in_planner_data, as_storage, by_a_dotted_name, in_rest]


@pytest.mark.parametrize("where", IN_FOLDERS)
@pytest.mark.parametrize("command", ["inspect", "export"])
def test_no_file_of_a_folder_runs_code(command, where, copied, tmp_path, capsys):
    marker = tmp_path / "ran"
    where(copied, Payload(marker))
    message = refused(COMMANDS[command](str(copied), tmp_path), capsys)
    assert not marker.exists() and str(copied) in message


def test_a_shard_that_is_a_pickle_is_no_tensor(copied, tmp_path):
    """torch unpickles what is no tensor; of a slot only tensors are asked for."""
    with pytest.raises(ValueError, match=r"extra\.note are pickles, where tensors belong"):
        sharded._load({"extra": {"note": torch.zeros(1)}}, copied)


def test_a_folder_as_it_is_is_read(copied, tmp_path, capsys):
    assert main(["inspect", str(copied)]) == 0
    assert "steps 6, updates 6" in capsys.readouterr().out
    assert main(["export", str(copied), out(tmp_path)]) == 0


def rename_shard(name):
    def change(folder, outside):
        (shard,) = folder.glob("*.distcp")

        def point(index):
            for place in index.storage_data.values():
                place.relative_path = name(outside)

        shard.rename(outside)
        reindexed(folder, point)

    return change


def link(folder, outside):
    (shard,) = folder.glob("*.distcp")
    shard.rename(outside)
    shard.symlink_to(outside)


OUTSIDE = {
    "up": rename_shard(lambda outside: f"../{outside.name}"),
    "absolute": rename_shard(str),
    "through a folder": rename_shard(lambda outside: f"x/../../{outside.name}"),
    "linked": link,
}


@pytest.mark.parametrize("how", OUTSIDE)
@pytest.mark.parametrize("command", ["inspect", "export"])
def test_no_shard_outside_of_the_folder_is_read(command, how, copied, tmp_path, capsys):
    OUTSIDE[how](copied, tmp_path / "secret")
    assert "which is not in the folder" in refused(COMMANDS[command](str(copied), tmp_path), capsys)


def test_an_index_that_promises_more_than_there_is_takes_no_memory(copied, tmp_path, capsys):
    def grow(index):
        for stored in index.state_dict_metadata.values():
            if hasattr(stored, "size"):
                stored.size = torch.Size([1 << 40])

    reindexed(copied, grow)
    assert "lists tensors of" in refused(["inspect", str(copied)], capsys)


@pytest.mark.parametrize("command", ["inspect", "export", "import", "synthesize"])
def test_a_compressed_file_is_not_unpacked(command, checkpoint, tmp_path, capsys):
    bomb = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(checkpoint) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record.filename))
    assert "compressed records" in refused(COMMANDS[command](str(bomb), tmp_path), capsys)


NAMES = ["\x1b[2J\x1b[H", "\x1b]0;title\x07", "a\rb", "\x9b31m", "\u202egnp.exe", "\x00", "\x7f"]


@pytest.mark.parametrize("name", NAMES)
def test_names_from_files_do_not_steer_a_terminal(name, checkpoint, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    (key,) = (key for key in content["callbacks"] if key.startswith("EMACallback"))
    content["callbacks"][key]["config"]["decay"] = name
    content["callbacks"][key]["live"][name] = content["callbacks"][key]["live"].pop("net.0.bias")
    content["callbacks"][name] = {}
    for number, changed in enumerate((content, {"model": {name: 1}}, {"model_ema": {name: torch.ones(1)}})):
        file = tmp_path / f"{number}.ckpt"
        torch.save(changed, file)
        for command in ("inspect", "export", "import", "synthesize"):
            main(COMMANDS[command](str(file), tmp_path))
            shown = capsys.readouterr()
            assert all(sign.isprintable() or sign == "\n" for sign in shown.out + shown.err)


def test_signs_that_show_are_left_as_they_are():
    assert printable("größe 9 µm, 層.weight\n") == "größe 9 µm, 層.weight\n"


# --- what is written ------------------------------------------------------------------------------------------------

WRITERS = {
    "export": lambda checkpoint, snapshots, target: main(["export", str(checkpoint), str(target)]),
    "synthesize": lambda checkpoint, snapshots, target: main(
        ["synthesize", str(snapshots), str(target), "--sigma-rel", "0.08"]
    ),
}


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    path = tmp_path_factory.mktemp("snapshots")
    fit(
        seeded(),
        ema(decay=[Power(sigma_rel=0.05), Power(sigma_rel=0.1)], snapshots=Snapshots(every_n_steps=2, dirpath=path)),
    )
    return path


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "os.replace"])
@pytest.mark.parametrize("command", ["export", "synthesize"])
def test_on_a_full_disk_the_good_file_stays(
    command, moment, suffix, checkpoint, snapshots, tmp_path, monkeypatch, capsys
):
    target = tmp_path / f"good{suffix}"
    target.write_bytes(b"good")
    if moment == "torch.save" and suffix == ".safetensors":
        moment = "safetensors.torch.save_file"
    monkeypatch.setattr(moment, full)
    assert WRITERS[command](checkpoint, snapshots, target) != 0
    assert "No space left on device" in capsys.readouterr().err
    assert target.read_bytes() == b"good" and list(tmp_path.iterdir()) == [target]


def test_a_snapshot_too(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save({"a": 1}, tmp_path / "made.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("obstacle", ["a file", "a file above"])
def test_a_folder_that_cannot_be_written_is_told_before_training(obstacle, tmp_path):
    (tmp_path / "file").write_text("here")
    place = tmp_path / "file" if obstacle == "a file" else tmp_path / "file" / "snapshots"
    module = seeded()
    module.training_step = lambda *args: pytest.fail("training has begun")
    with pytest.raises(ValueError, match=r"EMACallback 'ema': snapshots cannot be written to .*file"):
        fit(module, ema(snapshots=Snapshots(every_n_steps=2, dirpath=place)))


def test_records_of_an_index_are_not_more_than_records():
    from lightning_ema.checkpoint.shard_files import _Inert

    for harmless in (torch.Size([2]), torch.float32, collections.OrderedDict(a=1)):
        assert _Inert(io.BytesIO(pickle.dumps(harmless))).load() == harmless
    for other in (print, io.BytesIO, collections.Counter, torch.nn.Linear, torch.load):
        with pytest.raises(pickle.UnpicklingError):
            _Inert(io.BytesIO(pickle.dumps(other))).load()
