import pytest
import torch

from lightning_ema.trainer.step_counter import StepCounter


def optimizer(kind=torch.optim.SGD, **kwargs):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    return kind([weight], lr=0.1, **kwargs)


@pytest.fixture
def counter():
    counter = StepCounter()
    counter.hold(lambda optimizer: True)
    counter.open()
    yield counter
    counter.release()


class CallsSuper(torch.optim.Adam):
    def step(self, closure=None):
        return super().step(closure)


class Lookahead(torch.optim.Optimizer):
    """Wraps another optimizer and steps it twice."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        self.inner.step()
        self.inner.step()


class Duck:
    """Not an Optimizer itself, but steps one."""

    def __init__(self, inner):
        self.inner = inner

    def step(self):
        self.inner.step()


def test_each_step_counts_and_is_taken_once(counter):
    sgd = optimizer()
    sgd.step(), sgd.step()
    assert counter.take() == 2
    assert counter.take() == 0


def test_several_optimizers_count_as_the_one_with_the_most_steps(counter):
    first, second = optimizer(), optimizer(torch.optim.Adam)
    first.step(), second.step(), second.step()
    assert counter.take() == 2


@pytest.mark.parametrize("prime", [False, True])
def test_a_step_that_calls_its_parents_counts_once(counter, prime):
    if prime:
        optimizer(torch.optim.Adam)  # torch hooks a class when it is first constructed
    optimizer(CallsSuper).step()
    assert counter.take() == 1


def test_a_wrapper_counts_once_though_it_steps_twice_within(counter):
    Lookahead(optimizer()).step()
    assert counter.take() == 1


def test_a_wrapper_that_is_no_optimizer_counts_by_what_it_steps(counter):
    Duck(optimizer()).step()
    assert counter.take() == 1


def test_a_closure_that_evaluates_several_times_is_one_step(counter):
    lbfgs = optimizer(torch.optim.LBFGS)
    lbfgs.step(lambda: lbfgs.param_groups[0]["params"][0].sum())
    assert counter.take() == 1


def test_only_owned_optimizers_count():
    mine, other = optimizer(), optimizer()
    counter = StepCounter()
    counter.hold(lambda optimizer: optimizer is mine)
    counter.open()
    other.step(), other.step(), mine.step()
    assert counter.take() == 1
    counter.release()


def test_steps_outside_a_batch_do_not_count(counter):
    counter.close()
    optimizer().step()
    assert counter.take() == 0


def test_a_step_that_raised_does_not_hide_the_next(counter):
    sgd = optimizer()
    with pytest.raises(ZeroDivisionError):
        sgd.step(lambda: 1 / 0)
    counter.open()
    sgd.step()
    assert counter.take() == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_loss_scaler_skips_does_not_count(counter, fused):
    adam = optimizer(torch.optim.Adam, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    counted = []
    for gradient in (1.0, float("inf"), 1.0):
        adam.param_groups[0]["params"][0].grad = torch.full((2,), gradient)
        scaler.scale(torch.zeros(()))
        scaler.step(adam)
        scaler.update()
        counted.append(counter.take())
    assert counted == [1, 0, 1]


def test_released_hooks_are_gone(counter):
    from torch.optim import optimizer as torch_optimizer

    hung = len(torch_optimizer._global_optimizer_post_hooks)
    counter.release()
    assert len(torch_optimizer._global_optimizer_post_hooks) == hung - 1
    optimizer().step()
    assert counter.take() == 0
