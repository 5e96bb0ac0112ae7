import threading

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


# --- a step that raises, and steps in several threads: what was really taken counts -----------------------------------


def failing():
    raise ZeroDivisionError


def fails(optimizer):
    with pytest.raises(ZeroDivisionError):
        optimizer.step(failing)


def retried(first):
    fails(first), first.step()
    return 1


def retried_twice(first):
    fails(first), fails(first), first.step()
    return 1


def retried_through_a_wrapper(first):
    fails(first), Lookahead(first).step()
    return 1


def retried_and_stepped_again(first):
    fails(first), first.step(), first.step()
    return 2


def a_side_optimizer_fails_before(first):
    fails(optimizer()), first.step()
    return 1


def a_side_optimizer_fails_within(first):
    first.step(lambda: fails(optimizer()))
    return 1


def a_side_optimizer_steps_and_fails_within(first):
    side = optimizer()
    first.step(lambda: (side.step(), fails(side), side.step()))
    return 2  # of the side optimizer, which trains other parameters


def the_same_parameters_fail_within(first):
    other = torch.optim.SGD(first.param_groups[0]["params"], 0.1)
    first.step(lambda: fails(other))
    return 1


def a_wrapper_fails_after_its_inner_step(first):
    class Fails(Lookahead):
        def step(self, closure=None):
            self.inner.step(), failing()

    fails(Fails(first))
    return 1  # the inner step was taken


def in_another_thread(first):
    thread = threading.Thread(target=first.step)
    thread.start(), thread.join()
    return 1


def in_another_thread_within_a_step(first):
    side = optimizer()
    first.step(lambda: (in_another_thread(side), in_another_thread(side)))
    return 2


def begun_in_one_thread_while_another_steps(first):
    second, begun, done = optimizer(), threading.Event(), threading.Event()
    thread = threading.Thread(target=second.step, args=(lambda: (begun.set(), done.wait()),))
    thread.start(), begun.wait()
    first.step(), first.step()
    done.set(), thread.join()
    return 2


SITUATIONS = [
    retried,
    retried_twice,
    retried_through_a_wrapper,
    retried_and_stepped_again,
    a_side_optimizer_fails_before,
    a_side_optimizer_fails_within,
    a_side_optimizer_steps_and_fails_within,
    the_same_parameters_fail_within,
    a_wrapper_fails_after_its_inner_step,
    in_another_thread,
    in_another_thread_within_a_step,
    begun_in_one_thread_while_another_steps,
]


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
def test_steps_that_were_taken_count(counter, situation):
    for _ in range(2):  # what one batch leaves behind does not reach the next
        counter.open()
        steps = situation(optimizer())
        counter.close()
        assert counter.take() == steps


def test_what_is_taken_within_a_step_is_not_taken_again_at_its_end(counter):
    inner, taken = optimizer(), []
    outer = torch.optim.SGD(inner.param_groups[0]["params"], 0.1)
    outer.step(lambda: (inner.step(), taken.append(counter.take())))
    assert (taken, counter.take()) == ([1], 0)


def test_two_counters_in_two_threads_lose_nothing():
    steps, counted, together = 300, [], threading.Barrier(2)

    def run():
        mine, counter = optimizer(), StepCounter()
        counter.hold(lambda optimizer: optimizer is mine)
        together.wait()
        for _ in range(steps):
            counter.open(), mine.step(), counter.close()
        counted.append(counter.take())
        together.wait()
        counter.release()

    threads = [threading.Thread(target=run) for _ in range(2)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert counted == [steps, steps]
