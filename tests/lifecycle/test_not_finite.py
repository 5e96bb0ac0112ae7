"""An average that is not finite any more is told of at first sight, once, with the step and the way out."""

import pytest
import torch
from helpers import BATCHES, Regression, ema, fit, seeded
from lightning.pytorch.loggers import CSVLogger
from taught import Taught

from lightning_ema import Constant, MeanTeacherConfig, Power

BROKEN = 3
"""The step whose weights are NaN; they are finite again at the next one."""


class Breaks:
    """Breaks one weight for the length of one step."""

    def on_before_zero_grad(self, optimizer):
        if self.global_step == BROKEN - 1:
            self.kept = next(self.parameters()).detach().clone()

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == BROKEN:
            with torch.no_grad():
                next(self.parameters()).copy_(self.kept)

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.global_step == BROKEN - 1:  # this one is not counted yet
            with torch.no_grad():
                next(self.parameters())[0, 0] = float("nan")


class Module(Breaks, Regression):
    pass


class Teaches(Breaks, Taught):
    pass


class TeachesSkipping(Teaches):
    mean_teacher = MeanTeacherConfig(decay=Constant(0.5), on_nonfinite="skip")


def told(recwarn):
    return [str(w.message) for w in recwarn if "not finite" in str(w.message)]


SEEN = {  # settings of callback and trainer, the step at which it is seen
    "at a logged step": ({}, {"limit_val_batches": 0, "log_every_n_steps": 1}, 3),
    "at a later logged step": ({}, {"limit_val_batches": 0, "log_every_n_steps": 5}, 5),
    "at a validation": ({}, {"logger": False}, BATCHES),
    "at a validation within an epoch": ({}, {"logger": False, "val_check_interval": 2}, 4),
    "of a further average": ({"decay": [Constant(0.9), Power(sigma_rel=0.1)]}, {"logger": False}, BATCHES),
    "where both are evaluated": ({"evaluate": "both"}, {"logger": False}, BATCHES),
    "where it is only followed": ({"evaluate": "live"}, {"limit_val_batches": 0, "log_every_n_steps": 1}, 3),
}


@pytest.mark.parametrize("case", SEEN)
def test_the_first_sight_is_a_warning_that_names_step_tensor_and_setting(case, tmp_path, recwarn):
    settings, of_trainer, step = SEEN[case]
    kwargs = {"logger": CSVLogger(tmp_path), "num_sanity_val_steps": 0, **of_trainer}
    fit(seeded(Module, norm=False), ema(**settings), **kwargs)
    (warning,) = told(recwarn)
    assert f"seen at step {step}: net.0.weight." in warning
    assert "EMACallback 'ema': " in warning and "write on_nonfinite='skip'" in warning


def test_a_finite_average_is_told_of_nowhere(recwarn):
    fit(seeded(norm=False), ema())
    assert told(recwarn) == []


def test_skipping_keeps_the_average_finite_and_counts(recwarn):
    callback = ema(on_nonfinite="skip", after_fit="live")
    fit(seeded(Module, norm=False), callback)
    assert callback.average.num_updates == 2 * BATCHES - 1
    assert all(tensor.isfinite().all() for _, tensor in callback.average.named_tensors())
    assert ["left out" in warning for warning in told(recwarn)] == [True]


@pytest.mark.parametrize(("logged", "step"), [(True, 3), (False, BATCHES)])
def test_a_teacher_tells_of_it_too(logged, step, tmp_path, recwarn):
    fit(seeded(Teaches), logger=logged and CSVLogger(tmp_path), log_every_n_steps=1, num_sanity_val_steps=0)
    (warning,) = told(recwarn)
    assert f"seen at step {step}: 0.weight" in warning
    assert "MeanTeacher: " in warning and "write on_nonfinite='skip'" in warning


def test_a_teacher_that_skips_stays_finite():
    module = seeded(TeachesSkipping)
    fit(module)
    assert module.teacher_callback.average.num_updates == 2 * BATCHES - 1
    assert all(tensor.isfinite().all() for tensor in module.teacher.state_dict().values())


@pytest.mark.parametrize("how", ["warn", None])
def test_a_teacher_refuses_what_is_no_such_setting(how):
    with pytest.raises(ValueError, match=r"on_nonfinite is .*; accepted are 'skip', 'raise', 'ignore'"):
        MeanTeacherConfig(on_nonfinite=how)


def test_a_teacher_that_raises_names_the_tensor():
    class Raises(Teaches):
        mean_teacher = MeanTeacherConfig(on_nonfinite="raise")

    with pytest.raises(FloatingPointError, match=r"0\.weight"):
        fit(seeded(Raises))
