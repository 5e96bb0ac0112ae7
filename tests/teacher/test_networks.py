"""Student and teacher as two networks: files of wrapped ones, other architectures, parts replaced in training."""

import copy

import pytest
import torch
from helpers import BATCHES, clones, equal, fit, loader, seeded, trainer
from lightning.pytorch import Callback
from taught import Path, Taught, network
from torch import nn

from lightning_ema import Constant, Cosine, MeanTeacherConfig

pytestmark = pytest.mark.filterwarnings("ignore")


def compiled():
    return torch.compile(network(), backend="eager")


def holding(make_student, make_teacher=None, **settings):
    """A module with the networks that these functions make."""

    class Holds(Taught):
        def __init__(self):
            super(Taught, self).__init__(mean_teacher=MeanTeacherConfig(**{"decay": Constant(0.5), **settings}))
            if make_teacher is not None:
                self.teacher = make_teacher()
            self.student = make_student()

        def configure_optimizers(self):
            return torch.optim.SGD(self.student.parameters(), 0.1)

    return seeded(Holds)


def unwrapped(state_dict):
    return {name.replace("_orig_mod.", ""): value for name, value in state_dict.items()}


class TestWrappedNetworks:
    @pytest.mark.parametrize("make", [network, compiled])
    @pytest.mark.parametrize("prefix", ["", "student.", "_orig_mod.", "student._orig_mod."])
    def test_a_file_of_the_student_alone_loads_into_both(self, prefix, make):
        weights, module = network().state_dict(), holding(make)
        module.load_state_dict({prefix + name: value for name, value in weights.items()})
        assert equal(unwrapped(module.student.state_dict()), weights)
        assert equal(unwrapped(module.teacher.state_dict()), weights)

    @pytest.mark.parametrize("make", [network, compiled])
    @pytest.mark.parametrize("made", [network, compiled])
    def test_a_file_of_both_keeps_them_apart(self, made, make):
        trained, module = holding(made), holding(make)
        fit(trained, max_epochs=1)
        module.load_state_dict(trained.state_dict())
        assert equal(unwrapped(module.state_dict()), unwrapped(trained.state_dict()))
        assert not equal(unwrapped(module.student.state_dict()), unwrapped(module.teacher.state_dict()))

    def test_where_the_student_alone_is_wrapped(self):
        weights, module = network().state_dict(), holding(network)
        module.student = torch.compile(module.student, backend="eager")
        module.load_state_dict(weights)
        assert equal(unwrapped(module.student.state_dict()), weights) and equal(module.teacher.state_dict(), weights)

    def test_what_does_not_fit_is_told_under_the_files_own_names(self):
        with pytest.raises(RuntimeError, match=r"Unexpected key.*: \"_orig_mod.other\""):
            holding(network).load_state_dict({**network().state_dict(), "_orig_mod.other": torch.zeros(1)})
        weights = {f"student.{name}": value for name, value in network().state_dict().items()}
        with pytest.raises(RuntimeError, match=r"Unexpected key.*: \"student.other\", \"teacher.other\""):
            holding(network).load_state_dict({**weights, "student.other": torch.zeros(1)})


def wider():
    return nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 1))


def deeper():
    return nn.Sequential(*network(), nn.Linear(1, 1))


def without_statistics():
    net = network()
    net[1] = nn.BatchNorm1d(8, track_running_stats=False)
    return net


class TestAnotherArchitecture:
    def test_all_differences_are_listed(self):
        with pytest.raises(ValueError, match="the teacher is not built like the student") as told:
            fit(holding(network, wider))
        message = str(told.value)
        assert "\n  0.weight: shape (8, 4) in the student, (9, 4) in the teacher" in message
        assert "\n  4.weight: the teacher has no such tensor" in message
        assert "self.teacher = make_network(); self.student = make_network()" in message
        assert "into" not in message and "exclude" not in message

    def test_a_parameter_that_would_never_follow(self):
        with pytest.raises(ValueError, match=r"5.weight: the student has no such parameter\n  5.bias: the student"):
            fit(holding(network, deeper))

    @pytest.mark.parametrize("buffers", ["average", "copy"])
    def test_buffers(self, buffers):
        with pytest.raises(ValueError, match=r"1.running_mean: the teacher has no such tensor") as told:
            fit(holding(network, without_statistics, buffers=buffers))
        assert "MeanTeacherConfig(buffers='ignore')" in str(told.value) and "weight" not in str(told.value)

    def test_the_teachers_own_buffers_may_differ(self):
        module = holding(network, without_statistics, buffers="ignore", teacher_mode="train")
        fit(module, max_epochs=1)
        assert module.teacher_callback.num_steps == BATCHES

        def with_center():
            net = network()
            net.register_buffer("center", torch.zeros(3))
            return net

        module = holding(network, with_center)
        fit(module, max_epochs=1)
        assert module.teacher_callback.num_steps == BATCHES and torch.equal(module.teacher.center, torch.zeros(3))

    @pytest.mark.parametrize("role", ["student", "teacher"])
    def test_lazy_layers(self, role):
        make_teacher = nn.LazyLinear if role == "teacher" else None
        with pytest.raises(ValueError, match=f"the {role} has lazy layers, whose weight has no shape yet. Run the"):
            holding(lambda: nn.LazyLinear(1), make_teacher and (lambda: make_teacher(1)))


class Remembers(nn.Module):
    """A network with a buffer that a training step may let grow."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.register_buffer("memory", torch.zeros(2, dtype=dtype))
        self.net = network()

    def forward(self, x):
        return self.net(x)


class Acts(Callback):
    """Does something to the module before the fourth batch, or within it."""

    def __init__(self, act, hook="on_train_batch_start"):
        self.calls = 0

        def call(trainer, pl_module, *_):
            self.calls += 1
            if self.calls == 4:
                act(pl_module)

        setattr(self, hook, call)


class TestShapesThatChangeInTraining:
    @pytest.mark.parametrize("size", [1, 3])  # 1 would be broadcast
    @pytest.mark.parametrize(
        ("how", "buffers", "dtype"),
        [
            ("assigned", "average", torch.float32),
            ("assigned", "copy", torch.float32),
            ("assigned", "average", torch.int64),
            ("assigned", "copy", torch.int64),
            ("resized", "copy", torch.float32),
            ("resized", "average", torch.int64),
        ],
    )
    def test_a_buffer_is_named(self, dtype, buffers, how, size):
        def change(module):
            if how == "assigned":
                module.student.memory = torch.zeros(size, dtype=dtype)
            else:
                module.student.memory.resize_(size).zero_()

        message = rf"memory: shape \({size},\) in the student, \(2,\) in the teacher\n.*buffers='ignore'"
        with pytest.raises(ValueError, match=message):
            fit(holding(lambda: Remembers(dtype), buffers=buffers), Acts(change))

    @pytest.mark.parametrize("size", [1, 3])
    def test_an_averaged_buffer_that_is_resized_in_place_is_followed(self, size):
        module = holding(Remembers, buffers="average")
        fit(module, Acts(lambda module: module.student.memory.resize_(size).fill_(4.0)))
        assert torch.equal(module.teacher.memory, torch.full((size,), 4.0))

    def test_a_new_buffer_is_named(self):
        with pytest.raises(ValueError, match="late: the teacher has no such tensor"):
            fit(holding(network), Acts(lambda module: module.student.register_buffer("late", torch.zeros(1))))

    def test_buffers_that_are_ignored_may_change(self):
        module = holding(Remembers, buffers="ignore")
        fit(module, Acts(lambda module: setattr(module.student, "memory", torch.zeros(3))))
        assert module.teacher_callback.num_steps == 2 * BATCHES

    def test_a_parameter_is_named(self):
        def grow(module):
            layer = nn.Linear(8, 1, bias=False)
            layer.weight = nn.Parameter(torch.zeros(2, 8))
            module.student[4].weight = layer.weight

        module = holding(lambda: nn.Sequential(*network()[:4], nn.Linear(8, 1, bias=False)))
        with pytest.raises(ValueError, match=r"4.weight: shape \(2, 8\) in the student, \(1, 8\) in the teacher"):
            fit(module, Acts(grow))

    def test_the_exception_under_way_matters_more(self):
        def change_and_fail(module):
            module.student.memory = torch.zeros(3)
            raise ArithmeticError("mine")

        with pytest.raises(ArithmeticError, match="mine"), pytest.warns(UserWarning, match="memory: shape"):
            fit(holding(Remembers), Acts(change_and_fail, "on_train_batch_end"))


def replace_student(module):
    module.student = network()


def replace_teacher(module):
    module.teacher = copy.deepcopy(module.teacher)


def replace_layer(module):
    module.teacher[0] = copy.deepcopy(module.teacher[0])


def replace_parameter(module):
    module.teacher[0].weight = nn.Parameter(module.teacher[0].weight.detach().clone())


def replace_data(module):
    module.teacher[0].weight.data = module.teacher[0].weight.detach().clone()


def replace_all_tensors(module):
    module.load_state_dict(clones(module.state_dict()), assign=True)


def replace_buffer(module):
    module.teacher[1].running_mean = module.teacher[1].running_mean.clone()


def compile_student(module):
    module.student = torch.compile(module.student, backend="eager")


def last(module, *callbacks):
    seen = Path()
    fit(module, *callbacks, seen)
    return {name.replace("_orig_mod.", ""): value for name, value in seen.teachers[-1].items()}


class TestReplacedInTraining:
    @pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"])
    @pytest.mark.parametrize(
        "replace",
        [replace_teacher, replace_layer, replace_parameter, replace_data, replace_buffer, compile_student],
    )
    def test_by_a_copy_nothing_changes(self, replace, hook):
        """The schedule goes on as well: under another step count, a cosine would give other decays."""
        whole, module = (holding(network, decay=Cosine(0.3, 1.0), every_n_steps=2) for _ in range(2))
        expected = last(whole)
        assert equal(last(module, Acts(replace, hook)), expected)
        assert module.teacher_callback.num_steps == 2 * BATCHES
        assert module.teacher_callback.average.num_updates == BATCHES
        assert not any(parameter.requires_grad for parameter in module.teacher.parameters())

    def test_it_goes_on_from_what_the_new_teacher_holds(self):
        def replace(module):
            module.teacher = copy.deepcopy(module.teacher)
            with torch.no_grad():
                module.teacher[0].weight.fill_(7.0)

        module, seen = holding(network), Path()
        fit(module, Acts(replace), seen, max_epochs=1)
        expected = torch.full((8, 4), 7.0)
        for student in seen.students[4:]:
            expected = 0.5 * expected + 0.5 * student["0.weight"]
        torch.testing.assert_close(module.teacher[0].weight, expected)

    def test_another_architecture_is_refused(self):
        with pytest.raises(ValueError, match="the teacher is not built like the student"):
            fit(holding(network), Acts(lambda module: setattr(module, "teacher", wider())))

    @pytest.mark.parametrize("replace", [replace_student, replace_all_tensors])
    @pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step"])
    def test_a_student_that_no_optimizer_trains_is_refused(self, hook, replace):
        with pytest.raises(ValueError, match="were replaced in training, and no optimizer holds the new ones"):
            fit(holding(network), Acts(replace, hook))

    def test_a_student_that_the_optimizer_was_given_is_followed(self):
        def replace(module):
            module.student = copy.deepcopy(module.student)
            module.optimizers().optimizer.param_groups[0]["params"] = list(module.student.parameters())

        whole, module = holding(network), holding(network)
        expected = last(whole)
        assert equal(last(module, Acts(replace)), expected)

    def test_saved_before_the_teachers_turn(self, tmp_path):
        class Saves(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if batch_idx == 3:
                    replace_layer(pl_module)
                    trainer.save_checkpoint(tmp_path / "x.ckpt")

        module = holding(network)
        trainer(Saves(), max_steps=4, max_epochs=1).fit(module, loader())
        file = torch.load(tmp_path / "x.ckpt", weights_only=True)
        assert equal(file["state_dict"], module.state_dict())


class Tied(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        if tied == "as one object":
            self.b.weight = self.a.weight
        elif tied == "in memory":
            self.b.weight = nn.Parameter(self.a.weight.data)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


class TestTies:
    @pytest.mark.parametrize("alone", ["student", "teacher"])
    def test_in_one_network_alone_are_refused(self, alone):
        ties = {"student": "", "teacher": "", alone: "as one object"}
        message = rf"a.weight and b.weight: one parameter in the {alone}, several in the other network\nTie the same"
        with pytest.raises(ValueError, match=message):
            fit(holding(lambda: Tied(ties["student"]), lambda: Tied(ties["teacher"])))

    @pytest.mark.parametrize("of_teacher", ["a copy", "as one object", "in memory"])
    def test_in_both_are_followed(self, of_teacher):
        module = holding(lambda: Tied("as one object"), None if of_teacher == "a copy" else lambda: Tied(of_teacher))
        seen = Path()
        fit(module, seen, max_epochs=1)
        expected = seen.students[0]["a.weight"]
        for student in seen.students[1:]:
            expected = 0.5 * expected + 0.5 * student["a.weight"]
        torch.testing.assert_close(module.teacher.a.weight, expected)
        assert torch.equal(module.teacher.a.weight, module.teacher.b.weight)

    def test_a_tie_that_a_copy_loses_is_refused(self):
        with pytest.raises(ValueError, match=r"a.weight and b.weight: one parameter in the student"):
            fit(holding(lambda: Tied("in memory")))
