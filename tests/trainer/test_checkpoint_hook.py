import copy
import gc
import pickle

import pytest
from helpers import Regression

from lightning_ema.trainer.checkpoint_hook import ModuleHook


class Notes(Regression):
    def on_save_checkpoint(self, checkpoint):
        checkpoint.setdefault("notes", []).append("own")


class Owner:
    def around(self, module, checkpoint, own):
        checkpoint.setdefault("notes", []).append("before")
        own(checkpoint)
        checkpoint["notes"].append("after")


def notes(module):
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    return checkpoint["notes"]


@pytest.fixture
def hung():
    module, owner = Notes(), Owner()
    ModuleHook.install(module, "on_save_checkpoint", owner.around)
    return module, owner


def test_it_stands_around_the_modules_own_hook(hung):
    assert notes(hung[0]) == ["before", "own", "after"]


def test_hanging_it_twice_hangs_it_once(hung):
    module, owner = hung
    ModuleHook.install(module, "on_save_checkpoint", owner.around)
    assert notes(module) == ["before", "own", "after"]


def test_below_that_of_another_owner_it_is_not_hung_again(hung):
    module, owner = hung
    other = Owner()
    for each in (other, owner, other, owner):
        ModuleHook.install(module, "on_save_checkpoint", each.around)
    assert notes(module) == ["before", "before", "own", "after", "after"]


def test_wrapped_by_a_user_and_hung_again_it_acts_once(hung):
    module, owner = hung
    wrapped = module.on_save_checkpoint
    module.on_save_checkpoint = lambda checkpoint: wrapped(checkpoint)
    ModuleHook.install(module, "on_save_checkpoint", owner.around)
    assert notes(module) == ["before", "own", "after"]


def test_taken_down_it_leaves_no_trace(hung):
    module, owner = hung
    ModuleHook.remove(module, "on_save_checkpoint", Owner().around)  # another owner's
    assert notes(module) == ["before", "own", "after"]
    ModuleHook.remove(module, "on_save_checkpoint", owner.around)
    assert "on_save_checkpoint" not in vars(module)
    assert notes(module) == ["own"]


def test_a_hook_that_hung_there_before_comes_back():
    module, owner = Notes(), Owner()
    module.on_save_checkpoint = lambda checkpoint: checkpoint.update(notes=["mine"])
    ModuleHook.install(module, "on_save_checkpoint", owner.around)
    ModuleHook.remove(module, "on_save_checkpoint", owner.around)
    assert notes(module) == ["mine"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_has_its_own_hook_only(hung, duplicate):
    twin = duplicate(hung[0])
    assert notes(twin) == ["own"]
    assert twin.on_save_checkpoint.__self__ is twin


def test_it_keeps_neither_owner_nor_module_alive(hung):
    module, owner = hung
    hook = vars(module)["on_save_checkpoint"]
    del owner, hung
    gc.collect()
    assert notes(module)[-1] == "own" or notes(module) == ["before", "own", "after"]
    assert hook._module() is module
