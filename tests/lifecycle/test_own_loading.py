"""What of ours lies in a file goes into the module the way that the file's own state_dict goes."""

import pytest
import torch
from helpers import Regression, clones, ema, equal, fit, seeded
from lightning.pytorch import Callback
from taught import Taught
from torch import nn

from lightning_ema import Bema, Constant, EMACallback

SCALE = 3.0


class Plain(Regression):
    def __init__(self):
        super().__init__(norm=False)


class Rescales(Plain):
    def on_load_checkpoint(self, checkpoint):
        weights = checkpoint["state_dict"]
        weights["net.0.weight"] = weights["net.0.weight"] * SCALE
        self.seen = [*getattr(self, "seen", []), float(weights["net.0.weight"][0, 0])]


class Assigns(Plain):
    def on_load_checkpoint(self, checkpoint):
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {**weights, "net.0.weight": weights["net.0.weight"] * SCALE}


class Scaled(nn.Linear):
    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * SCALE
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class Versioned(Plain):
    def __init__(self):
        super().__init__()
        layer = self.net[0]
        self.net[0] = Scaled(4, 8)
        self.net[0].load_state_dict(layer.state_dict())


class PreHook(Plain):
    def __init__(self):
        super().__init__()
        self.net[0]._register_load_state_dict_pre_hook(self.scale)

    @staticmethod
    def scale(state_dict, prefix, *rest):
        state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * SCALE


class PublicPreHook(Plain):
    def __init__(self):
        super().__init__()
        self.net[0].register_load_state_dict_pre_hook(lambda module, *rest: PreHook.scale(*rest))


class Overrides(Plain):
    def load_state_dict(self, state_dict, strict=True, assign=False):
        changed = {**state_dict, "net.0.weight": state_dict["net.0.weight"] * SCALE}
        return super().load_state_dict(changed, strict=strict, assign=assign)


class ReturnsNothing(Overrides):
    def load_state_dict(self, state_dict, strict=True, assign=False):
        super().load_state_dict(state_dict, strict, assign)


class Keeps(Callback):
    """Live weights and averages when training goes on."""

    def __init__(self, callback):
        self.callback = callback

    def on_train_start(self, trainer, pl_module):
        self.live = clones(pl_module.named_parameters() if pl_module is not None else ())
        self.averages = [clones(each.named_tensors()) for each in self.callback.averages]
        self.origin = clones(self.callback.average.state_dict()["origin"])


def written(tmp_path, make, **settings):
    callback = EMACallback(**settings)
    path = tmp_path / "old.ckpt"
    with torch.random.fork_rng():
        this = fit(seeded(make), callback, max_epochs=1)
    this.save_checkpoint(path)
    keeps = Keeps(callback)
    keeps.on_train_start(
        None, type("M", (), {"named_parameters": lambda self: callback._holder.tracker.named_live()})()
    )
    return path, keeps


def settings_of_run(settings):
    return "32-true"


def resumed(make, path, **settings):
    callback = EMACallback(**settings)
    keeps, module = Keeps(callback), seeded(make)
    fit(module, callback, keeps, max_epochs=2, ckpt_path=path)
    return module, keeps


SETTINGS = {
    "average": {"decay": Constant(0.5)},
    "wider": {"decay": Constant(0.5), "dtype": torch.float64},
    "followed": {"decay": Constant(0.5), "evaluate": "live"},
    "several": {"decay": [Constant(0.5), Constant(0.9)]},
    "corrected": {"decay": Bema()},
}


def scaled(tensors):
    return {name: tensor * (SCALE if name == "net.0.weight" else 1) for name, tensor in tensors.items()}


def close(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=0)


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize(
    "make", [Plain, Rescales, Assigns, Versioned, PreHook, PublicPreHook, Overrides, ReturnsNothing]
)
def test_live_weights_averages_and_origin_are_migrated_alike(make, case, tmp_path):
    path, before = written(tmp_path, Plain, **SETTINGS[case])
    migrated = clones if make is Plain else scaled
    _, after = resumed(make, path, **SETTINGS[case])
    close(after.live, migrated(before.live))
    close(after.origin, migrated(before.origin))
    if case != "corrected":  # of which the average is what is read, with the weights of that moment
        for first, second in zip(after.averages, before.averages, strict=True):
            close(first, migrated(second))


def test_what_a_hook_sets_on_the_module_is_that_of_the_files_own_call(tmp_path):
    path, _ = written(tmp_path, Plain, decay=Constant(0.5))
    module, _ = resumed(Rescales, path, decay=Constant(0.5))
    file = torch.load(path, weights_only=True)
    assert module.seen == [pytest.approx(float(file["state_dict"]["net.0.weight"][0, 0]) * SCALE)]


class Old(Plain):
    """As the network was called, and with its units in another order."""

    def __init__(self):
        super().__init__()
        self.network = self.net
        del self.net

    def loss(self, batch):
        return nn.functional.mse_loss(self.network(batch[0]), batch[1])


class New(Plain):
    def on_load_checkpoint(self, checkpoint):
        weights = checkpoint["state_dict"]
        for key in [key for key in weights if key.startswith("network.")]:
            weights[key.replace("network.", "net.")] = weights.pop(key)
        for key in ("net.0.weight", "net.0.bias"):
            weights[key] = weights[key].flip(0)
        weights["net.4.weight"] = weights["net.4.weight"].flip(1)


def renamed(tensors):
    new = {name.replace("network.", "net."): tensor for name, tensor in tensors.items()}
    dims = {"net.0.weight": 0, "net.0.bias": 0, "net.4.weight": 1}
    return {name: tensor.flip(dims[name]) if name in dims else tensor for name, tensor in new.items()}


@pytest.mark.parametrize("case", SETTINGS)
def test_names_and_order_are_migrated_alike(case, tmp_path):
    path, before = written(tmp_path, Old, **SETTINGS[case])
    _, after = resumed(New, path, **SETTINGS[case])
    close(after.live, renamed(before.live))
    if case != "corrected":
        for first, second in zip(after.averages, before.averages, strict=True):
            close(first, renamed(second))


def test_weight_norm_of_old_becomes_a_parametrization(tmp_path):
    class Normed(Plain):
        norm = staticmethod(torch.nn.utils.parametrizations.weight_norm)

        def __init__(self):
            super().__init__()
            self.norm(self.net[0])

    class OldNormed(Normed):
        norm = staticmethod(torch.nn.utils.weight_norm)

    with pytest.warns(FutureWarning, match="weight_norm"):
        path, before = written(tmp_path, OldNormed, decay=Constant(0.5))
    _, after = resumed(Normed, path, decay=Constant(0.5))
    names = {"net.0.weight_g": "net.0.parametrizations.weight.original0"}
    names |= {"net.0.weight_v": "net.0.parametrizations.weight.original1"}
    close(after.live, {names.get(name, name): tensor for name, tensor in before.live.items()})
    close(after.averages[0], {names.get(name, name): tensor for name, tensor in before.averages[0].items()})


def test_a_teacher_and_its_student_are_migrated_by_the_module(tmp_path):
    class Migrates(Taught):
        def on_load_checkpoint(self, checkpoint):
            for network in ("student", "teacher"):
                checkpoint["state_dict"][f"{network}.0.weight"] = (
                    checkpoint["state_dict"][f"{network}.0.weight"] * SCALE
                )

    this = fit(seeded(Taught), max_epochs=1)
    this.save_checkpoint(tmp_path / "file.ckpt")
    module, seen = seeded(Migrates), {}
    looks = Callback()
    looks.on_train_start = lambda trainer, m: seen.update(clones(m.state_dict()))
    fit(module, looks, max_epochs=2, ckpt_path=tmp_path / "file.ckpt")
    file = torch.load(tmp_path / "file.ckpt", weights_only=True)["state_dict"]
    for network in ("student", "teacher"):
        assert torch.equal(seen[f"{network}.0.weight"], file[f"{network}.0.weight"] * SCALE)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("evaluate", ["average", "live"])
def test_files_say_in_which_versions_their_layers_were(evaluate, weights_only, tmp_path):
    this = fit(seeded(Versioned), ema(evaluate=evaluate), max_epochs=1)
    this.save_checkpoint(tmp_path / "file.ckpt", weights_only=weights_only)
    metadata = torch.load(tmp_path / "file.ckpt", weights_only=True)["state_dict"]._metadata
    assert metadata["net.0"] == {"version": 2}
    module = Versioned()  # which scales what has no version
    module.load_state_dict(torch.load(tmp_path / "file.ckpt", weights_only=True)["state_dict"])
    again = Versioned.load_from_checkpoint(tmp_path / "file.ckpt")
    assert equal(module.state_dict(), again.state_dict())


class Grown(Plain):
    strict_loading = False

    def __init__(self):
        super().__init__()
        self.strict_loading = False
        self.more = nn.Linear(1, 1)
        del self.net[4].bias
        self.net[4].register_parameter("bias", None)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


class Small(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def test_without_strict_loading_new_tensors_begin_live_and_leftovers_are_dropped_with_one_warning(tmp_path):
    path, before = written(tmp_path, Small, decay=Constant(0.5))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["optimizer_states"][0]["param_groups"][0]["params"] = [0, 1, 2, 3, 4]
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="the checkpoint is of other averages") as caught:
        _, after = resumed(Grown, path, decay=Constant(0.5))
    (text,) = [str(w.message) for w in caught if "of other averages" in str(w.message)]
    assert "more.weight, more.bias: not in the file, begins with the live value" in text
    assert "net.4.bias: in the file and not in the module, left out" in text
    assert torch.equal(after.averages[0]["more.weight"], after.live["more.weight"])
    kept = {name: tensor for name, tensor in before.averages[0].items() if name != "net.4.bias"}
    close({name: after.averages[0][name] for name in kept}, kept)


DECAYS = {  # then, now, from which of the file's averages each goes on (None: live), what is said
    "one more": ([0.5], [0.5, 0.9], [0, None], "Constant(0.9): not in the file, begins with the live weights"),
    "one more in front": ([0.5], [0.9, 0.5], [None, 0], "Constant(0.9): not in the file, begins with the live weights"),
    "one fewer": ([0.5, 0.9], [0.5], [0], "Constant(0.9): in the file, dropped"),
    "the first dropped": ([0.5, 0.9], [0.9], [1], "Constant(0.5): in the file, dropped"),
    "turned round": ([0.5, 0.9], [0.9, 0.5], [1, 0], None),
    "one changed": ([0.5, 0.9], [0.5, 0.8], [0, 1], None),
    "all changed, and fewer": ([0.5, 0.9], [0.8], [0], "Constant(0.9): in the file, dropped"),
    "one of three kept": ([0.5, 0.8, 0.9], [0.9, 0.7], [2, 1], "Constant(0.5): in the file, dropped"),
}


@pytest.mark.parametrize("case", DECAYS)
def test_decays_may_be_added_and_dropped(case, tmp_path, recwarn):
    then, now, places, said = DECAYS[case]
    path, before = written(tmp_path, Plain, decay=[Constant(each) for each in then])
    _, after = resumed(Plain, path, decay=[Constant(each) for each in now])
    for average, place in zip(after.averages, places, strict=True):
        close(average, before.live if place is None else before.averages[place])
    told = [str(w.message) for w in recwarn if "the checkpoint is of other averages" in str(w.message)]
    assert len(told) == (said is not None) and all(said in each for each in told)


def test_nobody_is_told_to_build_the_module_as_it_was():
    from pathlib import Path

    package = Path(__file__).parents[2] / "lightning_ema"
    assert [path for path in package.rglob("*.py") if "Build the module as it was" in path.read_text()] == []
