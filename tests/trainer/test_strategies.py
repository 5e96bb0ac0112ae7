"""Each row of the table in words: what an average does under a strategy, and what it is refused."""

from types import SimpleNamespace

import pytest
from lightning.pytorch import strategies as lightnings

from lightning_ema.trainer.strategies import (
    STRATEGIES,
    check_extra_pass,
    check_shard,
    check_strategy,
    overwrites_weights,
    row_of,
    spawns,
    sync_buffers,
    writes_folders,
)


def trainer(kind, world_size=2, fn="validate", **attributes):
    """Stands for a trainer under a strategy that cannot be built here; of a strategy a string is the class's name."""
    kind = type(kind, (), {}) if isinstance(kind, str) else kind
    strategy = object.__new__(kind)
    vars(strategy).update({"_ddp_kwargs": {}, **attributes})
    return SimpleNamespace(strategy=strategy, world_size=world_size, state=SimpleNamespace(fn=fn))


def refusal(check, *arguments):
    try:
        check(*arguments)
    except ValueError as error:
        return str(error)
    return ""


# strategy: (refused, shard=True, extra pass, buffers, weights are overwritten, folders)
WORDS = {
    "SingleDeviceStrategy": ("", False, True, "mean", False, False),
    "DDPStrategy": ("", True, True, "first", True, False),
    "ModelParallelStrategy": ("", False, True, "mean", False, True),
    "FSDPStrategy": ("FSDPStrategy: it cuts flattened parameters", False, False, "mean", False, False),
    "DeepSpeedStrategy": ("DeepSpeedStrategy: it keeps the weights in partitions", False, False, "mean", False, False),
    "OfAThirdParty": ("", False, False, "mean", False, False),
}


def test_every_row_is_told_of_here():
    assert STRATEGIES.keys() == WORDS.keys() - {"OfAThirdParty"}


@pytest.mark.parametrize("name", WORDS)
def test_a_strategy_in_two_processes(name):
    refused, shard, extra_pass, buffers, overwrites, folders = WORDS[name]
    this = trainer(name, _save_distributed_checkpoint=True)
    said = refusal(check_strategy, this)
    assert bool(said) == bool(refused)
    if refused:
        assert f"does not work with {refused}" in said
        assert said.endswith("Use ModelParallelStrategy with fully_shard (FSDP2), or strategy='ddp'.")
    said = refusal(check_shard, this)
    assert said == "" if shard else f"shard=True does not go with {name}: it is for strategy='ddp'" in said
    said = refusal(check_extra_pass, this, "select")
    assert said == "" if extra_pass else f"select does not work with {name}: a second pass" in said
    assert sync_buffers(this) == buffers
    assert overwrites_weights(this) == overwrites
    assert writes_folders(this) == folders


@pytest.mark.parametrize("name", WORDS)
def test_one_process_has_nothing_to_agree_on_and_shard_changes_nothing(name):
    this = trainer(name, world_size=1)
    assert sync_buffers(this) is None and not overwrites_weights(this)
    check_shard(this)


def test_lightnings_own_classes_have_these_names():
    assert [name for name in STRATEGIES if not hasattr(lightnings, name)] == []
    assert row_of(trainer(lightnings.DeepSpeedStrategy)) is STRATEGIES["DeepSpeedStrategy"]  # which derives from DDP
    assert row_of(trainer(lightnings.XLAStrategy)) is STRATEGIES["DDPStrategy"]


def test_a_subclass_has_the_row_of_its_nearest_parent():
    mine = type("Mine", (lightnings.DDPStrategy,), {})
    assert row_of(trainer(mine)) is STRATEGIES["DDPStrategy"]
    of_zero = type("Mine", (lightnings.DeepSpeedStrategy,), {})
    with pytest.raises(ValueError, match="does not work with DeepSpeedStrategy"):
        check_strategy(trainer(of_zero))


def test_ddp_that_does_not_broadcast_buffers_has_their_mean():
    assert sync_buffers(trainer("DDPStrategy", _ddp_kwargs={"broadcast_buffers": True})) == "first"
    assert sync_buffers(trainer("DDPStrategy", _ddp_kwargs={"broadcast_buffers": False})) == "mean"


def test_in_a_fit_the_weights_are_already_the_same():
    assert not overwrites_weights(trainer("DDPStrategy", fn="fit"))


def test_one_file_where_the_strategy_is_asked_for_one():
    assert not writes_folders(trainer("ModelParallelStrategy", _save_distributed_checkpoint=False))


@pytest.mark.parametrize(("method", "expected"), [("spawn", True), ("fork", True), (None, False)])
def test_launchers_that_spawn(method, expected):
    launcher = SimpleNamespace(_start_method=method) if method else None
    this = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    assert spawns(this) == expected


def test_the_table_cannot_be_written_to():
    with pytest.raises(TypeError, match="does not support item assignment"):
        STRATEGIES["Mine"] = STRATEGIES["DDPStrategy"]
