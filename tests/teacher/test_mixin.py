"""The teacher of a LightningModule: when it is made, how it follows, what files give it, what is refused."""

import copy
import logging
import pickle
import warnings

import pytest
import torch
from helpers import BATCHES, clones, engine, equal, fit, loader, seeded, trainer
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from taught import Manual, Path, Taught, network, path
from torch import nn
from torchmetrics import MeanSquaredError

from lightning_ema import Bema, Constant, EMACallback, MeanTeacherConfig, MeanTeacherMixin, PerUpdate, Then, Warmup
from lightning_ema.teacher import for_both

pytestmark = pytest.mark.filterwarnings("ignore")


class TestIsMade:
    def test_by_assigning_the_student(self):
        module = seeded(Taught)
        assert equal(module.student.state_dict(), module.teacher.state_dict())
        assert all(a is not b for a, b in zip(module.student.parameters(), module.teacher.parameters(), strict=True))
        assert not any(p.requires_grad for p in module.teacher.parameters())
        assert all(p.requires_grad for p in module.student.parameters())

    def test_in_configure_model(self):
        class Late(Taught):
            def __init__(self):
                LightningModule.__init__(self)
                MeanTeacherMixin.__init__(self)

            def configure_model(self):
                if not hasattr(self, "student"):
                    self.student = network()

        module = seeded(Late)
        fit(module)
        assert module.teacher_callback.num_steps == 2 * BATCHES

    def test_unless_the_module_has_one(self):
        class Own(Taught):
            def __init__(self):
                super(Taught, self).__init__()
                self.teacher = network()
                self.own = self.teacher
                self.student = network()

        module = Own()
        assert module.teacher is module.own and not any(p.requires_grad for p in module.own.parameters())
        assert not equal(module.student.state_dict(), module.teacher.state_dict())
        fit(module, max_steps=1)

    @pytest.mark.parametrize("first", ["teacher", "student"])
    def test_a_teacher_that_shares_the_students_parameters_is_refused(self, first):
        class Shares(Taught):
            def __init__(self):
                super(Taught, self).__init__()
                net = network()
                other = nn.Sequential(net, nn.Identity())
                self.teacher, self.student = (net, other) if first == "teacher" else (network(), net)
                if first == "student":
                    self.teacher = other

        with pytest.raises(ValueError, match=r"the teacher shares 6 parameters with the student: .*Build it anew"):
            Shares()

    def test_a_student_that_cannot_be_copied_is_told_the_way(self):
        class Locked(nn.Linear):
            def __deepcopy__(self, memo):
                raise RuntimeError("holds a lock")

        class Holds(Taught):
            def __init__(self):
                super(Taught, self).__init__()
                self.student = Locked(4, 1)

        with pytest.raises(
            TypeError, match=r"a Locked, cannot be copied \(holds a lock\).*self.teacher = make_network"
        ):
            Holds()


@pytest.mark.parametrize(("mode", "in_training"), [("eval", False), ("train", True)])
def test_it_keeps_its_mode(mode, in_training):
    class Sees(Taught):
        mean_teacher = MeanTeacherConfig(teacher_mode=mode)
        modes = ()

        def training_step(self, batch, batch_idx):
            with self.teacher_view() as teacher:
                self.modes += (all(m.training for m in teacher.modules()) and torch.is_grad_enabled() is False,)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            assert not any(m.training for m in self.teacher.modules())
            super().validation_step(batch, batch_idx)

    module = seeded(Sees)
    assert module.teacher.training is in_training
    module.eval()
    assert not module.teacher.training
    module.train()
    assert module.teacher.training is in_training and module.student.training
    fit(module)
    assert module.modes == (in_training,) * 2 * BATCHES


class TestFollows:
    @pytest.mark.parametrize("buffers", ["ignore", "copy", "average"])
    def test_by_hand(self, buffers):
        module, seen = path(MeanTeacherConfig(decay=Constant(0.75), buffers=buffers))
        teacher = seen.students[0]
        assert equal(seen.teachers[0], teacher)
        for student, found in zip(seen.students[1:], seen.teachers[1:], strict=True):
            teacher = {
                name: 0.75 * teacher[name] + 0.25 * value if self.averaged(name, value, buffers) else
                (teacher[name] if buffers == "ignore" else value)
                for name, value in student.items()
            }  # fmt: skip
            for name, value in teacher.items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)
        assert module.teacher_callback.num_steps == 2 * BATCHES

    @staticmethod
    def averaged(name, value, buffers):
        buffer = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        return value.is_floating_point() and (not buffer or buffers == "average")

    def test_a_burn_in_copies_and_has_no_unsupervised_loss(self):
        weights = []

        class Weighs(Taught):
            def training_step(self, batch, batch_idx):
                weights.append(self.consistency_weight())
                return super().training_step(batch, batch_idx)

        config = MeanTeacherConfig(decay=Constant(0.5), burn_in_steps=3, consistency_weight=4.0, ramp_up_steps=4,
                                   ramp="linear")  # fmt: skip
        _, seen = path(config, Weighs)
        for step in range(4):
            assert equal(seen.teachers[step], seen.students[step])
        assert not equal(seen.teachers[4], seen.students[4])
        assert weights == [0, 0, 0, 0, 1, 2, 3, 4, 4, 4, 4, 4]

    def test_every_n_steps_and_accumulation_count_steps(self):
        config = MeanTeacherConfig(decay=Constant(0.5), every_n_steps=2)
        module, seen = path(config, accumulate_grad_batches=2, max_epochs=1)
        assert module.teacher_callback.num_steps == 3
        assert module.teacher_callback.average.num_updates == 1
        expected = 0.25 * seen.students[0]["0.weight"] + 0.75 * seen.students[4]["0.weight"]
        torch.testing.assert_close(seen.teachers[-1]["0.weight"], expected)

    def test_manual_optimization_with_two_optimizers(self):
        module, _ = path(MeanTeacherConfig(), Manual)
        assert module.teacher_callback.num_steps == 2 * BATCHES

    def test_no_memory_but_the_teachers(self):
        module, _ = path(MeanTeacherConfig())
        teachers = {t.data_ptr() for t in module.teacher.state_dict().values()}
        assert {t.data_ptr() for _, t in module.teacher_callback.average.named_tensors()} <= teachers

    def test_layers_frozen_at_the_start_are_the_students(self):
        class Freezes(Taught):
            def __init__(self):
                super().__init__()
                self.student[0].requires_grad_(False)

            def on_train_start(self):
                super().on_train_start()
                assert torch.equal(self.student[0].weight, self.teacher[0].weight)

        module = seeded(Freezes)
        with torch.no_grad():
            module.student[0].weight.add_(1)
        fit(module, max_epochs=1)
        assert torch.equal(module.student[0].weight, module.teacher[0].weight)


def test_a_part_of_the_student_keeps_its_mode():
    class Modes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert pl_module.student[0].training
            assert not pl_module.student[1].training

    module = seeded(Taught)
    module.student[1].eval()  # frozen statistics: Lightning begins a fit with the modes as they are
    fit(module, Modes())


def test_a_module_unfrozen_as_a_whole_leaves_the_teacher_frozen():
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.requires_grad_(True)

    module = seeded(Taught)
    fit(module, Unfreeze())
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())


def test_a_student_compiled_later():
    module = seeded(Taught)
    student = module.student
    module.student = torch.compile(student, backend="eager")
    fit(module, max_epochs=1)
    assert torch.equal(module.teacher[1].num_batches_tracked, student[1].num_batches_tracked)


class TestStart:
    def test_the_teacher_is_set_to_the_student_once(self):
        module = seeded(Taught)
        with torch.no_grad():
            module.teacher[0].weight.fill_(7.0)
        seen = Path()
        this = fit(module, seen, max_epochs=1)
        assert equal(seen.teachers[0], seen.students[0])
        before = clones(module.teacher.state_dict())
        this.fit_loop.max_epochs = 2
        again = Path()
        this.callbacks.append(again)
        this.fit(module, loader(), loader(2))
        assert equal(again.teachers[0], before)  # a further fit goes on
        assert module.teacher_callback.num_steps == 2 * BATCHES

    @pytest.mark.parametrize("replaced", ["teacher", "tensors", "settings"])
    def test_a_further_fit_takes_what_was_replaced(self, replaced):
        module = seeded(Taught)
        this = fit(module, max_epochs=1)
        if replaced == "teacher":
            module.teacher = copy.deepcopy(module.teacher)
        elif replaced == "tensors":
            module.load_state_dict(clones(module.state_dict()), assign=True)
        else:
            module.mean_teacher = MeanTeacherConfig(decay=Constant(0.0))
        before = clones(module.teacher.state_dict())
        this.fit_loop.max_epochs = 2
        this.fit(module, loader(), loader(2))
        assert not torch.equal(module.teacher[0].weight, before["0.weight"])
        assert module.teacher_callback.num_steps == 2 * BATCHES
        if replaced == "settings":
            assert equal(module.teacher.named_parameters(), module.student.named_parameters())

    @pytest.mark.parametrize("tune", ["lr_find", "scale_batch_size"])
    def test_after_a_tuner_training_is_the_same(self, tune, tmp_path):
        class Tuned(Taught):
            lr = 0.02
            batch_size = 8

            def train_dataloader(self):
                return loader(batch_size=self.batch_size)

            def val_dataloader(self):
                return loader(2)

        module, untouched = seeded(Tuned), seeded(Tuned)
        arguments = {"num_training": 4, "update_attr": False} if tune == "lr_find" else {"max_trials": 1}
        getattr(Tuner(trainer(default_root_dir=tmp_path)), tune)(module, **arguments)
        fit(module)
        fit(untouched)
        assert equal(module.state_dict(), untouched.state_dict())
        assert module.teacher_callback.num_steps == 2 * BATCHES

    def test_a_new_trainer_is_a_fresh_run(self):
        module = seeded(Taught)
        fit(module, max_epochs=1)
        seen = Path()
        fit(module, seen, max_epochs=1)
        assert equal(seen.teachers[0], seen.students[0])
        assert module.teacher_callback.num_steps == BATCHES

    def test_a_file_that_is_only_validated_is_not_resumed(self, tmp_path):
        module = seeded(Taught)
        fit(module, max_epochs=1).save_checkpoint(tmp_path / "x.ckpt")
        trainer().validate(module, loader(2), ckpt_path=tmp_path / "x.ckpt", verbose=False)
        seen = Path()
        fit(module, seen, max_epochs=1)
        assert equal(seen.teachers[0], seen.students[0])
        assert module.teacher_callback.num_steps == BATCHES

    def test_resuming_never_sets_it(self, tmp_path):
        fit(seeded(Taught), max_epochs=1).save_checkpoint(tmp_path / "x.ckpt")
        saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
        seen, module = Path(), seeded(Taught)
        fit(module, seen, max_epochs=2, ckpt_path=tmp_path / "x.ckpt")
        assert equal({f"teacher.{n}": v for n, v in seen.teachers[0].items()},
                     {n: v for n, v in saved.items() if n.startswith("teacher.")})  # fmt: skip
        assert not equal(seen.teachers[0], seen.students[0])

    def test_resuming_from_a_file_without_a_teacher_begins_its_count(self, tmp_path):
        class Plain(Taught):
            def configure_callbacks(self):
                return []

            def training_step(self, batch, batch_idx):
                return nn.functional.mse_loss(self.student(batch[0]), batch[1])

            def on_train_batch_start(self, batch, batch_idx):
                return None

        fit(seeded(Plain), max_epochs=1).save_checkpoint(tmp_path / "x.ckpt")
        module = seeded(Taught)
        fit(module, max_epochs=2, ckpt_path=tmp_path / "x.ckpt")
        assert module.teacher_callback.num_steps == BATCHES


class TestFiles:
    def test_keys_are_plain(self):
        keys = set(Taught().state_dict())
        assert keys == {f"{role}.{name}" for role in ("student", "teacher") for name in network().state_dict()}

    @pytest.mark.parametrize("prefix", ["", "student."])
    def test_a_file_of_the_student_alone_loads_into_both(self, prefix, tmp_path):
        weights = network().state_dict()
        file = {"state_dict": {prefix + n: v for n, v in weights.items()}, "pytorch-lightning_version": "2.4.0"}
        torch.save(file, tmp_path / "x.ckpt")
        module = Taught.load_from_checkpoint(tmp_path / "x.ckpt")
        assert equal(module.student.state_dict(), weights) and equal(module.teacher.state_dict(), weights)

    def test_a_file_of_both_keeps_them_apart(self, tmp_path):
        module = seeded(Taught)
        fit(module).save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
        loaded = Taught.load_from_checkpoint(tmp_path / "x.ckpt")
        assert equal(loaded.state_dict(), module.state_dict())
        assert not equal(loaded.student.state_dict(), loaded.teacher.state_dict())

    def test_what_really_is_missing_is_still_told(self):
        weights = network().state_dict()
        del weights["4.bias"]
        with pytest.raises(RuntimeError, match=r"Missing key.*student.4.bias.*teacher.4.bias"):
            Taught().load_state_dict(weights)
        with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
            Taught().load_state_dict({**network().state_dict(), "other": torch.zeros(1)})

    def test_a_module_can_be_copied_and_pickled(self):
        module = seeded(Taught)
        fit(module)
        module.trainer = None
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert equal(twin.state_dict(), module.state_dict())
            fit(twin, max_epochs=1)
            assert not equal(twin.teacher.state_dict(), module.teacher.state_dict())
            assert engine(module.teacher_callback.average).module is module.student


class Saves(Taught):
    def __init__(self, width: int = 8, mean_teacher: MeanTeacherConfig | None = None):
        super().__init__(mean_teacher=mean_teacher)
        self.save_hyperparameters()


def test_settings_are_no_hyperparameters(tmp_path):
    module = Saves(width=5, mean_teacher=MeanTeacherConfig(decay=Constant(0.25)))
    assert dict(module.hparams) == {"width": 5}
    this = fit(module, logger=CSVLogger(tmp_path), max_epochs=1)
    this.save_checkpoint(tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"] == {"width": 5}
    loaded = Saves.load_from_checkpoint(tmp_path / "x.ckpt", mean_teacher=MeanTeacherConfig(predict_on="student"))
    assert loaded.hparams.width == 5 and loaded.mean_teacher.predict_on == "student"
    assert equal(loaded.state_dict(), module.state_dict())


class TestPrediction:
    @pytest.mark.parametrize("network_name", ["teacher", "student"])
    def test_forward_and_predict(self, network_name):
        module = seeded(Taught)
        module.mean_teacher = MeanTeacherConfig(predict_on=network_name)
        this = fit(module)
        chosen = getattr(module, network_name).eval()
        batches = this.predict(module, loader(1))
        with torch.no_grad():
            assert torch.equal(batches[0], chosen(next(iter(loader(1)))[0]))

    def test_both_are_scored_in_one_pass(self):
        seen = []

        class Scores(Taught):
            def __init__(self):
                super().__init__()
                self.scores = for_both(mse=MeanSquaredError())

            def validation_step(self, batch, batch_idx):
                seen.append(batch_idx)
                self.log_both(self.scores, batch[1], lambda network: network(batch[0]))

        module = seeded(Scores)
        this = fit(module, max_epochs=1, num_sanity_val_steps=0)
        assert seen == [0, 1]
        x, y = (torch.cat(parts) for parts in zip(*loader(2), strict=True))
        module.eval()
        for name in ("teacher", "student"):
            with torch.no_grad():
                expected = nn.functional.mse_loss(getattr(module, name)(x), y)
            assert this.callback_metrics[f"{name}/mse"] == pytest.approx(expected.item())
        assert this.callback_metrics["teacher/mse"] != this.callback_metrics["student/mse"]


class Calls(Taught):
    """What most modules write: the module itself is called in the training step."""

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])


class TestTheModuleCalledInTraining:
    @pytest.mark.parametrize("consistent", [False, True])
    def test_a_loss_on_the_teacher_is_refused(self, consistent):
        class Mixed(Calls):
            def training_step(self, batch, batch_idx):  # nothing else would be said: the sum has a gradient
                loss = super().training_step(batch, batch_idx)
                return loss + self.student(batch[0]).mean() if consistent else loss

        module = seeded(Mixed)
        with pytest.raises(RuntimeError, match=r"self\(...\) in training_step asks the teacher.* self.student\(...\)"):
            fit(module, num_sanity_val_steps=0)
        assert module(next(iter(loader(1)))[0]).shape == (8, 1)  # after the exception it is called as before

    def test_two_optimizers_under_manual_optimization_too(self):
        class ByHand(Manual):
            def training_step(self, batch, batch_idx):
                self.manual_backward(self(batch[0]).sum())

        with pytest.raises(RuntimeError, match="asks the teacher, which is frozen"):
            fit(seeded(ByHand))

    def test_the_student_on_request_trains(self):
        module = seeded(Calls)
        module.mean_teacher = MeanTeacherConfig(decay=Constant(0.5), predict_on="student")
        before = clones(module.student.named_parameters())
        fit(module, max_epochs=1)
        assert not any(torch.equal(p, before[name]) for name, p in module.student.named_parameters())

    def test_a_forward_of_the_modules_own_is_left_to_it(self):
        class Own(Calls):
            def forward(self, x):
                return self.student(x)

        module = seeded(Own)
        fit(module, max_epochs=1)
        assert module.teacher_callback.num_steps == BATCHES

    def test_targets_without_gradients_and_calls_from_elsewhere(self, tmp_path):
        class Elsewhere(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                assert torch.is_grad_enabled()
                seen.append(pl_module(batch[0]))

        class Graph(CSVLogger):
            def log_graph(self, model, input_array=None):  # as TensorBoardLogger's does, with gradients enabled
                assert torch.is_grad_enabled()
                seen.append(model(model.example_input_array))

        class Targets(Taught):
            def __init__(self):
                super().__init__()
                self.example_input_array = torch.zeros(2, 4)

            def training_step(self, batch, batch_idx):
                with torch.no_grad():
                    targets = self(batch[0])
                return nn.functional.mse_loss(self.student(batch[0]), targets + batch[1])

            def validation_step(self, batch, batch_idx):
                with torch.enable_grad():
                    seen.append(self(batch[0]))

        seen, module = [], seeded(Targets)
        this = fit(module, Elsewhere(), logger=Graph(tmp_path), enable_model_summary=True, inference_mode=False)
        this.predict(module, loader(1))
        assert module.teacher_callback.num_steps == 2 * BATCHES
        validations, graphs = 2 + 2 * 2, 2  # the sanity check's too; predict draws the graph again
        assert len(seen) == 2 * BATCHES + validations + graphs


class TestRefusals:
    @pytest.mark.parametrize("resumed", [False, True])
    def test_a_teacher_in_an_optimizer(self, resumed, tmp_path):
        class Mistaken(Taught):
            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), 0.02)

        fit(seeded(Taught), max_epochs=1).save_checkpoint(tmp_path / "x.ckpt")
        message = r"holds 6 parameters of the teacher: teacher.0.weight, .* write self.student.parameters\(\)"
        with pytest.raises(ValueError, match=message):
            fit(seeded(Mistaken), ckpt_path=tmp_path / "x.ckpt" if resumed else None)

    def test_the_mixin_named_last(self):
        with pytest.raises(TypeError, match=r"Name it first: class Last\(MeanTeacherMixin, LightningModule\)"):

            class Last(LightningModule, MeanTeacherMixin):
                pass

    def test_callbacks_without_super(self):
        class Forgets(Taught):
            def configure_callbacks(self):
                return [ModelCheckpoint()]

        with pytest.raises(RuntimeError, match=r"Forgets.configure_callbacks leaves the teacher's callback out"):
            fit(seeded(Forgets))

    def test_callbacks_with_super(self):
        class Adds(Taught):
            def configure_callbacks(self):
                return [*super().configure_callbacks(), ModelCheckpoint(save_top_k=0)]

        module = seeded(Adds)
        fit(module, enable_checkpointing=True)
        assert module.teacher_callback.num_steps == 2 * BATCHES

    def test_no_student(self):
        class Empty(Taught):
            def __init__(self):
                super(Taught, self).__init__()
                self.net = nn.Linear(4, 1)

            def configure_optimizers(self):
                return torch.optim.SGD(self.net.parameters(), 0.1)

        with pytest.raises(ValueError, match=r"Empty has no student: assign the network to train, self.student = "):
            fit(Empty())

    def test_16_bits(self):
        with pytest.raises(ValueError, match=r"teacher's 0.weight has 16 bits.*precision='bf16-mixed'"):
            fit(seeded(Taught), precision="bf16-true")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"decay": 1.5}, r"decay is 1.5; it must lie in \[0, 1\]"),
            ({"decay": [0.9, 0.99]}, "a teacher is one average"),
            ({"decay": Bema()}, "a teacher is one average"),
            ({"decay": PerUpdate(Bema())}, "a teacher is one average"),
            ({"every_n_steps": 0}, "every_n_steps is 0"),
            ({"burn_in_steps": -1}, "burn_in_steps is -1"),
            ({"buffers": "average "}, "buffers is 'average '; accepted are 'ignore', 'copy', 'average'"),
            ({"teacher_mode": "test"}, "teacher_mode is 'test'; accepted are 'eval', 'train'"),
            ({"predict_on": "both"}, "predict_on is 'both'; accepted are 'teacher', 'student'"),
            ({"consistency_weight": -1.0}, "consistency_weight is -1.0; it must be a finite number of at least 0"),
            ({"ramp_up_steps": -5}, "ramp_up_steps is -5"),
            ({"ramp": "steep"}, "ramp is 'steep'; accepted are 'sigmoid', 'linear', 'cosine'"),
        ],
    )
    def test_settings(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            MeanTeacherConfig(**arguments)


def test_modes_within_the_student_are_left_alone_and_an_evaluating_student_is_told():
    class Frozen(Taught):
        def training_step(self, batch, batch_idx):
            assert not self.student[1].training
            return super().training_step(batch, batch_idx)

    module = seeded(Frozen)
    module.student[1].eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*student is in eval mode")
        trainer(max_steps=2).fit(module, loader())
    module = seeded(Taught)
    module.student.eval()
    with pytest.warns(UserWarning, match=r"the student is in eval mode, .* Call self.student.train\(\)"):
        trainer(max_steps=1).fit(module, loader())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"buffers": "ignore"}, True),
        ({"buffers": "ignore", "teacher_mode": "train"}, False),
        ({"buffers": "copy"}, False),
    ],
)
def test_statistics_that_would_never_move_are_told(settings, told):
    module = seeded(Taught)
    module.mean_teacher = MeanTeacherConfig(**settings)
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        trainer(max_steps=1).fit(module, loader())
    assert any("BatchNorm statistics stay what they are" in str(w.message) for w in messages) is told


class TestBesideAnEMACallback:
    @pytest.mark.parametrize("include_frozen", [False, True])
    def test_it_leaves_the_teacher_out(self, include_frozen, tmp_path):
        ema = EMACallback(0.9, include_frozen=include_frozen)
        module = seeded(Taught)
        this = fit(module, ema)
        names = {name for name, _ in ema.average.named_tensors()}
        assert names and all(name.startswith("student.") for name in names)
        this.save_checkpoint(tmp_path / "x.ckpt")
        again, other = EMACallback(0.9, include_frozen=include_frozen), seeded(Taught)
        fit(other, again, max_epochs=3, ckpt_path=tmp_path / "x.ckpt")
        whole, module = EMACallback(0.9, include_frozen=include_frozen), seeded(Taught)
        fit(module, whole, max_epochs=3)
        assert again.average.num_steps == whole.average.num_steps == module.teacher_callback.num_steps

    def test_recalibration_would_empty_the_teachers_statistics(self):
        with pytest.raises(ValueError, match="buffers='recalibrate' of an EMACallback empties the BatchNorm"):
            fit(seeded(Taught), EMACallback(0.9, buffers="recalibrate"))

    def test_the_teachers_callback_is_no_superclass_of_others(self):
        ema = EMACallback(0.9)
        this = fit(seeded(Taught), ema)
        assert ema in this.callbacks


def test_the_schedule_counts_after_the_burn_in():
    config = MeanTeacherConfig(decay=0.99, burn_in_steps=10)
    assert config.schedule == Then(0.0, at=10, second=Warmup(0.99))
    assert MeanTeacherConfig(decay=Constant(0.9)).schedule == Constant(0.9)
    config = MeanTeacherConfig(decay=PerUpdate(0.99), burn_in_steps=10)
    assert config.schedule == PerUpdate(Then(0.0, at=10, second=0.99))
    assert MeanTeacherConfig(decay=PerUpdate(0.9)).schedule == PerUpdate(0.9)


class TestReport:
    def test_after_a_fit_the_log_says_what_the_teacher_is(self, caplog):
        with caplog.at_level(logging.INFO):
            fit(seeded(Taught))
        (said,) = (r.message for r in caplog.records if r.message.startswith("MeanTeacher: "))
        assert said.startswith("MeanTeacher: 12 steps, 12 updates with Constant(0.5). The decay ends at 0.5, a horizon")

    @pytest.mark.parametrize("run", [{"fast_dev_run": 2}, {"max_steps": 0}])
    def test_there_is_nothing_to_say_of_a_trial_or_of_no_step(self, run, caplog):
        with caplog.at_level(logging.INFO):
            fit(seeded(Taught), **run)
        assert not [r for r in caplog.records if r.message.startswith("MeanTeacher: ")]

    def test_a_teacher_that_never_moved_is_told(self):
        module = seeded(Taught)
        module.mean_teacher = MeanTeacherConfig(decay=0.999, every_n_steps=13)
        with pytest.warns(UserWarning, match=r"not updated in 12 steps .* every_n_steps=13 is longer"):
            fit(module)


def test_a_view_outside_of_a_trainer():
    module = seeded(Taught)
    with module.teacher_view() as teacher:
        assert teacher is module.teacher and not torch.is_grad_enabled() and not teacher.training
    assert torch.is_grad_enabled()


def test_the_view_has_the_trainers_precision():
    dtypes = []

    class Casts(Taught):
        def training_step(self, batch, batch_idx):
            with self.teacher_view() as teacher:
                dtypes.append(teacher(batch[0]).dtype)
            return super().training_step(batch, batch_idx)

    fit(seeded(Casts), precision="bf16-mixed", max_steps=1, limit_val_batches=0)
    assert dtypes == [torch.bfloat16]
