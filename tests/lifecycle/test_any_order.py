"""Promises 1 to 5 after any sequence of fit, exception, evaluation, save, resume, tested file and user's edit.

The reference is kept beside the callback by hand: the live weights as training left them, and the average computed from
them one step at a time.
"""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import Regression, clones, ema, engine, equal, loader, trainer
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lightning.pytorch import Callback

from lightning_ema import Constant

DECAY = 0.7


class ByHand(Callback):
    """The live weights and the average, step by step; raises where it is told to."""

    def __init__(self, average, raises_in=None):
        self.average, self.raises_in, self.steps = average, raises_in, 0

    def on_train_start(self, trainer, pl_module):
        self.start = clones(pl_module.state_dict())
        if self.average is None:
            self.average = clones(pl_module.state_dict())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.live = clones(pl_module.state_dict())
        self.steps += 1
        for name, live in self.live.items():
            if live.is_floating_point():
                self.average[name].lerp_(live, 1 - DECAY)
            else:
                self.average[name] = live.clone()
        self.act("train")

    def on_validation_batch_start(self, trainer, pl_module, *_):
        if not trainer.sanity_checking:
            self.seen = clones(pl_module.state_dict())
            self.act("validate")

    on_test_batch_start = on_validation_batch_start

    def act(self, place):
        if self.raises_in == place:
            raise ZeroDivisionError


class AnyOrder(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())

    def teardown(self):
        shutil.rmtree(self.folder)

    @initialize(after_fit=st.sampled_from(["average", "live"]), buffers=st.sampled_from(["average", "copy"]))
    def begin(self, after_fit, buffers):
        self.after_fit, self.buffers = after_fit, buffers
        self.module, self.callback = Regression(lr=0.01), self.make_callback()
        self.live = clones(self.module.state_dict())
        self.average = None
        self.steps = 0
        self.holds = self.live  # what the module must hold
        self.last_trainer = None
        self.saved = None

    def make_callback(self):
        return ema(decay=Constant(DECAY), after_fit=self.after_fit, buffers=self.buffers)

    def averaged(self, average):
        """What the module looks like carrying the average: copied buffers are live."""
        if self.buffers == "average":
            return {name: self.live[name] if not t.is_floating_point() else t for name, t in average.items()}
        return {name: self.live[name] if "running" in name or "tracked" in name else t for name, t in average.items()}

    def take_over(self, by_hand, applied):
        if by_hand.steps:
            self.live, self.average = by_hand.live, by_hand.average
            self.steps += by_hand.steps
        applies = applied and self.after_fit == "average" and self.average is not None
        self.holds = self.averaged(self.average) if applies else self.live

    @rule(raises_in=st.sampled_from([None, None, "train", "validate"]))
    def fit(self, raises_in):
        by_hand = ByHand(self.average, raises_in)
        this = trainer(self.callback, by_hand, max_epochs=1)
        if raises_in is None:
            this.fit(self.module, loader(), loader(1))
            assert close(by_hand.seen, self.averaged_of(by_hand))
        else:
            with pytest.raises(ZeroDivisionError):
                this.fit(self.module, loader(), loader(1))
        assert equal(by_hand.start, self.live)
        self.take_over(by_hand, applied=raises_in is None)
        self.last_trainer = this

    def averaged_of(self, by_hand):
        kept, self.live = self.live, by_hand.live
        try:
            return self.averaged(by_hand.average)
        finally:
            self.live = kept

    @precondition(lambda self: self.last_trainer is not None)
    @rule(raises=st.booleans())
    def validate(self, raises):
        watch = ByHand(None, "validate" if raises else None)
        this = trainer(self.callback, watch)
        if raises:
            with pytest.raises(ZeroDivisionError):
                this.validate(self.module, loader(1), verbose=False)
        else:
            this.validate(self.module, loader(1), verbose=False)
        file_is_in = self.holds is not self.live and self.after_fit == "live"
        if self.average is None or file_is_in or self.holds is getattr(self, "file", None):
            assert close(watch.seen, self.holds)
        else:
            assert close(watch.seen, self.averaged(self.average))

    @precondition(lambda self: self.average is not None and self.holds is not getattr(self, "file", None))
    @rule(weights_only=st.booleans())
    def save(self, weights_only):
        path = self.folder / ("weights.ckpt" if weights_only else "full.ckpt")
        self.last_trainer.save_checkpoint(path, weights_only)
        file = torch.load(path, weights_only=True)
        assert close(file["state_dict"], self.averaged(self.average))
        if not weights_only:
            entry = file["callbacks"][self.callback.state_key]
            assert entry["num_steps"] == self.steps
            assert all(torch.equal(entry["live"][name], self.live[name]) for name in entry["live"])
            self.saved = (path, self.live, clones(self.average), self.steps, self.last_trainer.current_epoch)

    @precondition(lambda self: self.saved is not None)
    @rule()
    def resume(self):
        path, self.live, self.average, self.steps, epoch = self.saved
        self.average = clones(self.average)
        self.module, self.callback = Regression(lr=0.01), self.make_callback()
        by_hand = ByHand(self.average)
        this = trainer(self.callback, by_hand, max_epochs=epoch + 1)
        this.fit(self.module, loader(), loader(1), ckpt_path=path)
        if by_hand.steps:
            assert equal(by_hand.start, self.live)
        self.take_over(by_hand, applied=True)
        self.last_trainer = this

    @precondition(lambda self: self.saved is not None and self.average is not None)
    @rule()
    def test_a_file(self):
        watch = ByHand(None)
        trainer(self.callback, watch).test(self.module, loader(1), ckpt_path=self.saved[0], verbose=False)
        self.file = torch.load(self.saved[0], weights_only=True)["state_dict"]
        assert equal(watch.seen, self.file)
        self.holds = self.file

    @rule()
    def edit(self):
        self.module.load_state_dict(Regression().state_dict())
        self.live = self.holds = clones(self.module.state_dict())
        self.average, self.steps = None, 0

    @invariant()
    def promises(self):
        if not hasattr(self, "module"):
            return
        assert close(clones(self.module.state_dict()), self.holds)
        if self.average is not None:
            average = self.callback.average
            held = engine(average).weights.held
            assert len(held) <= 1 and all(each.applied and not each.paused for each in held)
            assert average.num_steps == average.num_updates == self.steps
            assert close(dict(average.named_tensors()), {n: self.average[n] for n, _ in average.named_tensors()})


def close(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-6)
    return True


AnyOrder.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestAnyOrder = pytest.mark.filterwarnings("ignore")(AnyOrder.TestCase)
