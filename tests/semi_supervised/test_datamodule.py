"""The data module by itself, and under whole Trainer runs."""

import warnings

import lightning
import pytest
import torch
import yaml
from helpers import trainer
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from packaging.version import Version
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_ema.semi_supervised import SemiSupervisedDataModule, Views, split_by_class

OLD = Version(lightning.__version__) < Version("2.5")
LABELS = torch.tensor([0, 1, 2] * 10)
DATA = TensorDataset(torch.arange(30.0)[:, None].expand(30, 4).contiguous(), LABELS)  # the input tells the sample
BATCHES = 6  # 24 unlabeled, 4 in a batch


def noisy(batch):
    return batch + 0.1 * torch.rand(len(batch), 1)


def data(labeled=DATA, labels_per_class=2, **kwargs):
    settings = {"labeled_batch_size": 8, "unlabeled_batch_size": 4, "weak": noisy, "strong": noisy}
    return SemiSupervisedDataModule(labeled, labels_per_class, **{**settings, **kwargs})


def batches(module):
    return [batch for batch, _, _ in module.train_dataloader()]


def flat(batch):
    inputs, labels = batch["labeled"]
    weak, strong, _ = batch["unlabeled"]
    return torch.cat([inputs.flatten(), labels.float(), weak.flatten(), strong.flatten()])


class Student(LightningModule):
    """Sees batches, and trains on them."""

    def __init__(self):
        super().__init__()
        self.student = nn.Linear(4, 3)
        self.seen, self.evaluated = [], []

    def training_step(self, batch, batch_idx):
        inputs, labels = batch["labeled"]
        views = batch["unlabeled"]
        assert isinstance(views, Views) and isinstance(inputs, torch.Tensor)
        self.seen.append(flat(batch))
        consistency = (self.student(views.weak) - self.student(views.strong)).square().mean()
        return nn.functional.cross_entropy(self.student(inputs / 30), labels) + consistency

    def validation_step(self, batch, batch_idx):
        self.evaluated.append(batch)

    def test_step(self, batch, batch_idx):
        self.evaluated.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(module=None, made=None, *callbacks, ckpt_path=None, **kwargs):
    module = Student() if module is None else module
    this = trainer(*callbacks, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(isinstance|many workers|length of `list`)")
        this.fit(module, datamodule=data() if made is None else made, ckpt_path=ckpt_path)
    return module


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- the batches ------------------------------------------------------------------------------------------------------


def test_a_batch_holds_full_labeled_and_unlabeled_parts_that_do_not_mix():
    module = data(weak=None, strong=lambda batch: -batch, reveal_labels=True)
    kept, rest = split_by_class(LABELS.tolist(), 2, seed=0)
    assert module.split == (kept, rest) and module.num_unlabeled == 24
    epoch = batches(module)
    assert len(epoch) == BATCHES
    for batch in epoch:
        inputs, labels = batch["labeled"]
        assert inputs.shape == (8, 4) and set(inputs[:, 0].int().tolist()) <= set(kept)
        assert torch.equal(labels, LABELS[inputs[:, 0].long()])
        weak, strong, hidden = batch["unlabeled"]
        assert weak.shape == (4, 4) and torch.equal(strong, -weak) and torch.equal(hidden, LABELS[weak[:, 0].long()])
    assert sorted(int(i) for batch in epoch for i in batch["unlabeled"].weak[:, 0]) == rest
    labeled = [int(i) for batch in epoch for i in batch["labeled"][0][:, 0]]
    assert [labeled.count(i) for i in kept] == [8] * 6


@pytest.mark.parametrize(("view", "sign"), [("weak", 1), ("strong", -1)])
def test_the_view_of_the_labeled_inputs(view, sign):
    module = data(weak=None, strong=lambda batch: -batch, labeled_view=view)
    assert (sign * batches(module)[0]["labeled"][0]).sum() > 0


def test_hidden_labels_stay_hidden():
    assert all(batch["unlabeled"].labels is None for batch in batches(data()))


def test_further_unlabeled_samples():
    further = TensorDataset(torch.full((10, 4), 99.0))
    module = data(unlabeled=further, weak=None, reveal_labels=True)
    epoch = batches(module)
    assert module.num_unlabeled == 34 and len(epoch) == 9
    last = epoch[-1]["unlabeled"].weak
    assert last.shape == (4, 4)  # 2 of them come a second time
    labels = torch.cat([batch["unlabeled"].labels for batch in epoch])
    weak = torch.cat([batch["unlabeled"].weak[:, 0] for batch in epoch])
    assert torch.equal(labels == -1, weak == 99) and 10 <= int((labels == -1).sum()) <= 12


def test_all_may_keep_their_labels_where_there_are_others_without():
    module = data(labels_per_class=None, unlabeled=TensorDataset(torch.full((8, 4), 99.0)), weak=None)
    assert module.split == (list(range(30)), [])
    epoch = batches(module)
    assert len(epoch) == 2 and all((batch["unlabeled"].weak == 99).all() for batch in epoch)


def test_labels_need_not_be_read_from_the_items():
    class Unread(TensorDataset):
        def __getitem__(self, index):
            raise AssertionError("read")

    assert data(Unread(*DATA.tensors), labels=LABELS).split == data().split


def test_the_seed_decides_split_order_and_transforms():
    torch.manual_seed(0)
    first = batches(data(seed=1))
    torch.manual_seed(1)
    assert same(map_flat(first), map_flat(batches(data(seed=1))))
    assert not same(map_flat(first), map_flat(batches(data(seed=2))))


def map_flat(epoch):
    return [flat(batch) for batch in epoch]


# --- what is refused --------------------------------------------------------------------------------------------------


class Endless(IterableDataset):
    def __iter__(self):
        yield 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"labels_per_class": 0}, "labels_per_class is 0"),
        ({"labels_per_class": True}, "labels_per_class is True"),
        ({"labels_per_class": None}, "there is no `unlabeled`"),
        ({"labeled": Endless()}, "labeled is of type Endless"),
        ({"labeled": object()}, "labeled is of type object"),
        ({"unlabeled": Endless()}, "unlabeled is of type Endless"),
        ({"labeled_batch_size": 0}, "labeled_batch_size is 0"),
        ({"unlabeled_batch_size": 1.5}, "unlabeled_batch_size is 1.5"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"reveal_labels": 1}, "reveal_labels is 1"),
        ({"labeled_view": "both"}, "labeled_view is 'both'"),
        ({"weak": "shift"}, "weak is 'shift'"),
        ({"collate": 3}, "collate is 3"),
    ],
)
def test_arguments_are_checked_where_they_are_given(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        data(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"labels_per_class": 10}, "all 30 samples of `labeled` keep their labels"),
        ({"labels_per_class": 11}, "class 0 has 10, class 1 has 10, class 2 has 10"),
        ({"labeled": TensorDataset(DATA.tensors[0], torch.rand(30))}, "the label tensor"),
        ({"labels": [0, 1]}, "2 labels, but 30 samples"),
    ],
)
def test_data_that_cannot_be_split_stop_a_fit_before_it_starts(kwargs, message):
    module = Student()
    with pytest.raises((ValueError, TypeError), match=message):
        fit(module, data(**kwargs))
    assert not module.seen


# --- under a Trainer --------------------------------------------------------------------------------------------------


def test_a_fit_sees_each_unlabeled_sample_once_an_epoch():
    module = fit(max_epochs=3)
    assert len(module.seen) == 3 * BATCHES
    assert same(module.seen[:BATCHES], map_flat(batches(data())))
    assert not same(module.seen[:BATCHES], module.seen[BATCHES : 2 * BATCHES])


def test_no_validation_data_means_no_validation():
    made = data()
    module = fit(None, made, max_epochs=1)
    assert module.seen and not module.evaluated
    with pytest.raises(ValueError, match=r"no validation data. Give it some: SemiSupervisedDataModule\(validation="):
        trainer().validate(module, datamodule=made)
    with pytest.raises(ValueError, match="no test data"):
        trainer().test(module, datamodule=made)


def test_validation_and_test_data():
    other = DataLoader(DATA, batch_size=30)
    made = data(validation=TensorDataset(*DATA.tensors), test=other, eval_batch_size=12)
    module = fit(made=made, max_epochs=1, num_sanity_val_steps=0)
    assert [len(labels) for _, labels in module.evaluated] == [12, 12, 6]
    assert torch.equal(torch.cat([inputs for inputs, _ in module.evaluated]), DATA.tensors[0])
    module.evaluated.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer().test(module, datamodule=made)
    assert [len(labels) for _, labels in module.evaluated] == [30]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_change_nothing(num_workers):
    assert same(fit(made=data(num_workers=num_workers), max_epochs=3).seen, fit(max_epochs=3).seen)


def test_neither_does_accumulation_nor_a_shorter_epoch():
    whole = fit(max_epochs=2).seen
    assert same(fit(max_epochs=2, accumulate_grad_batches=4).seen, whole)
    assert same(fit(max_epochs=3, limit_train_batches=4).seen, whole)  # no sample is left out for good
    assert same(fit(max_epochs=4, limit_train_batches=0.5).seen, whole)
    assert same(fit(max_epochs=2, reload_dataloaders_every_n_epochs=1).seen, whole)
    assert same(fit(fast_dev_run=2).seen, whole[:2])


def test_overfit_batches_are_the_same_in_every_epoch():
    assert same(fit(max_epochs=3, overfit_batches=2).seen, 3 * fit(max_epochs=1).seen[:2])


def test_the_length_of_the_run_is_known_before_it_starts():
    class Plans(Student):
        def configure_optimizers(self):
            self.steps = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    module = Plans()
    fit(module, max_epochs=3, accumulate_grad_batches=2)
    assert module.steps == 9


def test_a_second_fit_of_the_same_trainer_goes_on():
    whole, module, made = fit(max_epochs=4).seen, Student(), data()
    this = trainer(max_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        this.fit(module, datamodule=made)
        this.fit_loop.max_epochs = 4
        this.fit(module, datamodule=made)
    assert same(module.seen, whole)


class Saves(Callback):
    """Saves once in one hook, after so many batches at the earliest."""

    def __init__(self, hook, path, after):
        self.path, self.after = path, after
        setattr(self, hook, self.save)

    def save(self, trainer, pl_module, *_):
        if len(pl_module.seen) >= self.after and not self.path.exists():
            self.steps = len(pl_module.seen)
            trainer.save_checkpoint(self.path)


def resumes(tmp_path, hook, after, num_workers=0, **limits):
    saves, limits = Saves(hook, tmp_path / "a.ckpt", after), {"val_check_interval": 3, **limits}
    whole = fit(None, data(validation=DATA, num_workers=num_workers), saves, **limits).seen
    resumed = fit(None, data(validation=DATA, num_workers=num_workers), ckpt_path=saves.path, **limits).seen
    assert len(whole) == 3 * BATCHES
    if OLD and hook == "on_train_batch_end" and limits["max_epochs"] == 3:
        resumed.pop()  # Lightning 2.4 counts the batch it saved in as still to come
    return same(resumed, whole[saves.steps :])


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 3 * BATCHES}])
@pytest.mark.parametrize(
    ("hook", "after"),
    [
        *(("on_train_batch_end", after) for after in (1, 5, 6, 7, 11)),
        ("on_train_epoch_end", 1),
        ("on_train_epoch_end", 7),
        ("on_validation_end", 1),
        ("on_validation_end", 4),
    ],
)
def test_a_resumed_run_goes_on_with_the_next_batch(hook, after, limits, tmp_path):
    assert resumes(tmp_path, hook, after, **limits)


def test_a_resumed_run_with_workers_goes_on_with_the_next_batch(tmp_path):
    assert resumes(tmp_path, "on_train_batch_end", 8, num_workers=1, max_epochs=3)


def test_a_batch_whose_step_failed_comes_again(tmp_path):
    class Fails(Student):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if len(self.seen) == 9:
                raise KeyError("out of luck")
            return loss

    path = tmp_path / "a.ckpt"
    with pytest.raises(KeyError):
        fit(Fails(), None, Saves("on_exception", path, 0), max_epochs=3)
    assert same(fit(ckpt_path=path, max_epochs=3).seen, fit(max_epochs=3).seen[8:])


def test_resuming_with_another_split_is_refused(tmp_path):
    saves = Saves("on_train_epoch_end", tmp_path / "a.ckpt", 1)
    module = fit(None, data(seed=1), saves, max_epochs=1)
    for other in (data(seed=2), data(seed=1, labels_per_class=3)):
        with pytest.raises(ValueError, match=r"'labels_per_class': 2, 'seed': 1, 'size': 30.*Resume with the same"):
            fit(None, other, ckpt_path=saves.path, max_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer().test(module, datamodule=data(seed=2, test=DATA), ckpt_path=saves.path)
    assert module.evaluated


def test_batches_move_as_a_whole():
    this = Student()
    fit(this, max_epochs=1)
    batch = batches(data(reveal_labels=True))[0]
    moved = this.trainer.strategy.batch_to_device(batch, torch.device("meta"))
    assert isinstance(moved["unlabeled"], Views) and {t.device.type for t in moved["unlabeled"]} == {"meta"}
    assert isinstance(moved["labeled"], tuple) and {t.device.type for t in moved["labeled"]} == {"meta"}
    assert this.trainer.strategy.batch_to_device(batches(data())[0], torch.device("meta"))["unlabeled"].labels is None


def negated(batch):
    return -batch


def test_from_yaml(tmp_path):
    config = {
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False},
        "data": {
            "class_path": "lightning_ema.semi_supervised.SemiSupervisedDataModule",
            "init_args": {
                "labeled": {"class_path": f"{__name__}.Numbers", "init_args": {"size": 30}},
                "labels_per_class": 2,
                "validation": {"class_path": f"{__name__}.Numbers", "init_args": {"size": 6}},
                "strong": f"{__name__}.negated",
                "weak": {
                    "class_path": "lightning_ema.semi_supervised.PerSample",
                    "init_args": {"transform": f"{__name__}.negated"},
                },
                "labeled_view": "strong",
                "unlabeled_batch_size": 4,
                "seed": 3,
            },
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    made = LightningCLI(
        Student, LightningDataModule, subclass_mode_data=True, save_config_callback=None,
        args=["fit", f"--config={tmp_path / 'config.yaml'}"],
    )  # fmt: skip
    assert made.datamodule.split == split_by_class(LABELS.tolist(), 2, seed=3)
    assert len(made.model.seen) == BATCHES
    assert made.model.seen[0].shape == (32 * 4 + 32 + 2 * 4 * 4,) and (made.model.seen[0][:128] <= 0).all()


class Numbers(TensorDataset):
    def __init__(self, size: int):
        super().__init__(*DATA[:size])


class Shared(Student):
    """Writes what each process saw."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        torch.save(self.seen, self.folder / f"{self.trainer.global_rank}.pt")


@pytest.mark.parametrize("use_distributed_sampler", [True, False])
def test_two_processes_share_the_samples(use_distributed_sampler, tmp_path):
    made = data(weak=None, strong=None)
    fit(Shared(tmp_path), made, max_epochs=2, strategy="ddp_fork", devices=2, num_nodes=1,
        use_distributed_sampler=use_distributed_sampler)  # fmt: skip
    seen = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [len(batches) for batches in seen] == [6, 6]  # two epochs of three
    first = [int(i) for batches in seen for batch in batches[:3] for i in batch[-16::4]]
    assert sorted(first) == made.split[1]
    labeled = [int(i) for batches in seen for batch in batches for i in batch[:32:4]]
    assert [labeled.count(i) for i in made.split[0]] == [16] * 6
