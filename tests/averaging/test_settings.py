import warnings

import pytest
import torch
from helpers import engine, settings_of
from tables import rows

from lightning_ema import (
    Constant,
    EMACallback,
    ExponentialAnnealing,
    HalfLife,
    PerUpdate,
    Recalibrate,
    Select,
    Then,
    Warmup,
    WeightAverage,
)
from lightning_ema.averaging.settings import label

BAD = [
    ({"decay": 1.5}, ValueError, r"decay is 1.5; it must lie in \[0, 1\]"),
    ({"decay": -0.1}, ValueError, r"decay is -0.1; it must lie in"),
    ({"decay": "0.9"}, TypeError, "decay is '0.9'; it must be a number in .*, a Schedule or a list"),
    ({"decay": True}, TypeError, "decay is True"),
    ({"decay": []}, ValueError, r"decay is empty; write a number, a Schedule or a list .*\[0.99, 0.999\]"),
    ({"decay": [0.9, 0.99, Warmup(0.9)]}, ValueError, r"decay holds Warmup\(0.9\) twice"),
    ({"decay": [0.9, 1.5]}, ValueError, r"decay is 1.5; it must lie in \[0, 1\]"),
    ({"decay": [0.9, [0.99]]}, TypeError, r"decay is \[0.99\]; it must be a number"),
    ({"every_n_steps": 0}, ValueError, "every_n_steps is 0; it must be at least 1"),
    ({"every_n_steps": -3}, ValueError, "every_n_steps is -3"),
    ({"every_n_steps": 2.0}, TypeError, "every_n_steps is 2.0; it must be a whole number"),
    ({"start_step": -1}, ValueError, "start_step is -1; it must be at least 0"),
    ({"include": "net.*"}, TypeError, r"include is the string 'net.\*'; it must be a list .*include=\['net"),
    ({"exclude": "net.*"}, TypeError, "exclude is the string"),
    ({"buffers": "ignore"}, ValueError, "buffers is 'ignore'; accepted are 'average', 'copy'"),
    ({"dtype": torch.bfloat16}, ValueError, "an average needs a real type of at least float32"),
    ({"dtype": torch.int64}, ValueError, "an average needs a real type of at least float32"),
    ({"dtype": "float32"}, TypeError, "dtype is 'float32'; it must be a torch dtype"),
    ({"dtype": torch.complex64}, ValueError, "an average needs a real type of at least float32"),
    ({"device": "meta"}, ValueError, "device is 'meta', where tensors hold no numbers"),
    ({"device": "foo"}, ValueError, "device is 'foo'; torch knows no such device"),
    ({"include": []}, ValueError, "include is empty, so that nothing would be averaged"),
    ({"include": [1]}, TypeError, r"include is \[1\]; it must be a list of patterns"),
    ({"include_frozen": "no"}, TypeError, "include_frozen is 'no'; it must be True or False"),
    ({"on_nonfinite": "warn"}, ValueError, "on_nonfinite is 'warn'; accepted are 'skip', 'raise', 'ignore'"),
]


@rows("make", [EMACallback, lambda **kw: WeightAverage(torch.nn.Linear(1, 1), **kw)])
@rows(("arguments", "error", "message"), BAD)
def test_bad_arguments_are_refused_at_construction(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


@rows(
    ("arguments", "message"),
    [
        ({"evaluate": "ema"}, "evaluate is 'ema'; accepted are 'average', 'live', 'both', 'all' and Select"),
        ({"after_fit": "both"}, "after_fit is 'both'; accepted are 'average', 'live'"),
        ({"start_epoch": -1}, "start_epoch is -1; it must be at least 0"),
        (
            {"start_epoch": 1.5},
            "start_epoch is 1.5; it must be a whole number of epochs, or a share .* for instance 0.8",
        ),
        ({"start_epoch": -0.5}, "start_epoch is -0.5; it must be a whole number of epochs, or a share"),
        ({"start_epoch": float("nan")}, "start_epoch is nan; it must be a whole number of epochs, or a share"),
        ({"name": ""}, "name is ''; it must be a word"),
    ],
)
def test_the_callbacks_own_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EMACallback(**arguments)


def test_an_object_that_is_an_argument_checks_its_own():
    with pytest.raises(ValueError, match="Recalibrate: batches is 0; it must be at least 1"):
        Recalibrate(batches=0)
    with pytest.raises(TypeError, match=r"Recalibrate: batches is 2\.5; it must be a whole number"):
        Recalibrate(batches=2.5)
    with pytest.raises(ValueError, match="Select: mode is 'least'; accepted are 'min', 'max'"):
        Select("val_loss", mode="least")
    with pytest.raises(ValueError, match="Select: every is 0; it must be at least 1"):
        Select("val_loss", every=0)
    with pytest.raises(TypeError, match="Select: live is 'yes'; it must be True or False"):
        Select("val_loss", live="yes")


@pytest.mark.parametrize("gone", ["others", "select", "evaluate_every", "recalibrate_batches", "switch_every"])
def test_what_is_said_by_an_object_now_is_no_argument_any_more(gone):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{gone}'"):
        EMACallback(**{gone: None})


def test_a_number_is_warmed_up_and_a_schedule_is_taken_as_it_is():
    assert settings_of(EMACallback(0.99)).decay == Warmup(0.99)
    assert settings_of(EMACallback(Constant(0.99))).decay == Constant(0.99)


def test_an_interval_beyond_a_tenth_of_the_horizon_warns_with_what_would_fit():
    with pytest.warns(
        UserWarning, match=r"every_n_steps=20 is more than a tenth of the horizon .* = 100 steps.* every_n_steps=10"
    ):
        EMACallback(0.99, every_n_steps=20)


@rows(("decay", "every_n_steps"), [(0.99, 10), (0.9, 1), (Constant(1.0), 10**6), (PerUpdate(Warmup(0.9)), 10**6)])
def test_an_interval_within_a_tenth_of_the_horizon_does_not(decay, every_n_steps):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EMACallback(decay, every_n_steps=every_n_steps)


def test_settings_come_back_from_their_own_arguments():
    average = WeightAverage(torch.nn.Linear(1, 1), 0.9, start_step=3, exclude=["bias"], dtype=torch.float64)
    again = WeightAverage(engine(average).module, **engine(average).settings.as_arguments())
    assert engine(again).settings == engine(average).settings


@rows(
    ("one", "other", "name"),
    [
        (HalfLife(epochs=1), HalfLife(epochs=1.0), "HalfLife_epochs_1"),
        (
            Then(1, at=3, second=ExponentialAnnealing(0.99, gamma=20)),
            Then(1.0, at=3, second=ExponentialAnnealing(0.99, gamma=20.0)),
            "Then_1_3_ExponentialAnnealing_0.99_20",
        ),
        (Then(0.5, at=3, second=Constant(0.99)), Then(0.5, 3, Constant(0.99)), "Then_0.5_3_Constant_0.99"),
        (Warmup(0.9, offset=20), Warmup(0.9, offset=20.0), "Warmup_0.9_offset_20"),
        (Warmup(1), Warmup(1.0), "1.0"),
        (HalfLife(epochs=10.05), HalfLife(epochs=10.05), "HalfLife_epochs_10.05"),
    ],
)
def test_equal_schedules_have_one_name(one, other, name):
    assert one == other
    assert label(one) == label(other) == name


@pytest.mark.parametrize("buffers", ["recalibrate", Recalibrate(batches=3)])
def test_the_engine_alone_has_no_batches_to_recalibrate_from(buffers):
    message = r"EMACallback takes from its Trainer.*buffers='copy'.*`with average\.swapped\(\):` call .*update_bn"
    with pytest.raises(ValueError, match=message):
        WeightAverage(torch.nn.Linear(1, 1), buffers=buffers)
