import copy
import math

import pytest
import torch
from helpers import Regression, equal, fit, seeded, trainer
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ema import PseudoLabelAcceptance, PseudoLabelAccuracy, RelativeWeightDistance, TeacherStudentAgreement

ONE_HOT = torch.eye(3)
ACCEPTED = [torch.tensor(mask).bool() for mask in ([True, False, True], [False], [[True, True], [False, False]], [])]


def batches():
    """Updates of every metric, uneven batches and a last one that adds nothing, with the value over all of them."""
    labels, truth = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2, 2, -1])
    student = [torch.tensor([3.0, 4.0]), torch.zeros(2)]
    return {
        PseudoLabelAcceptance: ([(mask,) for mask in ACCEPTED], 4 / 8),
        PseudoLabelAccuracy: (
            [
                (labels, torch.tensor([True, True, False, True]), truth),  # right, wrong, not accepted, not known
                (labels[:1], torch.tensor([True]), truth[:1]),
                (labels, torch.zeros(4, dtype=torch.bool), truth),
            ],
            2 / 3,
        ),
        TeacherStudentAgreement: (
            [
                (ONE_HOT[[0, 1, 2, 2, 1]], ONE_HOT[[0, 1, 2, 2, 0]] * 9),
                (ONE_HOT[[0]], ONE_HOT[[1]]),
                (ONE_HOT[:0], ONE_HOT[:0]),
            ],
            4 / 6,
        ),
        RelativeWeightDistance: (
            [
                (student, [torch.tensor([3.0, 2.0]), torch.tensor([0.0, 1.0])]),  # 5 / 25
                ([torch.tensor([5.0])], [torch.tensor([0.0])]),  # 25 / 25
                ([], []),
            ],
            math.sqrt(30 / 50),
        ),
    }


CASES = [pytest.param(kind, *case, id=kind.__name__) for kind, case in batches().items()]
every_metric = pytest.mark.parametrize(("kind", "updates", "expected"), CASES)


def updated(kind, updates):
    metric = kind()
    for update in updates:
        metric.update(*update)
    return metric


@every_metric
def test_values_by_hand_over_uneven_batches(kind, updates, expected):
    assert updated(kind, updates).compute().item() == pytest.approx(expected)
    assert updated(kind, updates[::-1]).compute().item() == pytest.approx(expected)


@every_metric
def test_forward_gives_the_value_of_a_batch_and_keeps_the_sum(kind, updates, expected):
    metric = kind()
    values = [metric(*update).item() for update in updates]
    assert values == pytest.approx([updated(kind, [update]).compute().item() for update in updates])
    assert metric.compute().item() == pytest.approx(expected)
    metric.reset()
    assert metric(*updates[0]).item() == pytest.approx(values[0])
    assert metric.compute().item() == pytest.approx(values[0])


@every_metric
def test_processes_add_up(kind, updates, expected):
    """Two processes with uneven shares of the data, joined by what the metric says of each of its states."""
    first, second = updated(kind, updates[:1]), updated(kind, updates[1:])
    for state, reduce in first._reductions.items():
        setattr(first, state, reduce(torch.stack([getattr(first, state), getattr(second, state)])))
    first._computed = None
    assert first.compute().item() == pytest.approx(expected)


@every_metric
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_counted_gives_zero_and_not_nan(kind, updates, expected):
    assert kind().compute().item() == 0
    assert updated(kind, updates[-1:]).compute().item() == 0


@every_metric
def test_metrics_can_be_copied_cast_and_add_nothing_to_a_state_dict(kind, updates, expected):
    metric = updated(kind, updates[:1]).half()
    twin = copy.deepcopy(metric)
    for update in updates[1:]:
        twin.update(*update)
    assert twin.compute().item() == pytest.approx(expected)
    assert metric.compute().item() == pytest.approx(updated(kind, updates[:1]).compute().item())
    assert not metric.state_dict()


def test_many_small_shares_are_counted_exactly():
    """A mean of float32 would lose the ones against the millions."""
    metric = PseudoLabelAcceptance()
    metric.total += 2**24
    for _ in range(3):
        metric.update(torch.tensor([True]))
    assert (metric.hits.item(), metric.total.item()) == (3, 2**24 + 3)


def test_pixels_count_one_by_one():
    labels = torch.tensor([[[0, 1], [2, 255]]])
    truth = torch.tensor([[[0, 2], [2, 255]]])
    accuracy = PseudoLabelAccuracy()
    accuracy.update(labels, torch.ones(1, 2, 2, dtype=torch.bool) & (truth != 255), truth)
    assert accuracy.compute().item() == pytest.approx(2 / 3)
    agreement = TeacherStudentAgreement()
    student = ONE_HOT[torch.tensor([[0, 1, 2, 0]])].transpose(1, 2)
    agreement.update(student, student.roll(1, dims=2))  # classes 0 1 2 0 against 0 0 1 2
    assert student.shape == (1, 3, 4) and agreement.compute().item() == 0.25


def test_agreement_over_the_last_dimension():
    agreement = TeacherStudentAgreement(dim=-1)
    agreement.update(ONE_HOT[torch.tensor([[0, 1], [2, 2]])], ONE_HOT[torch.tensor([[0, 2], [2, 2]])])
    assert agreement.compute().item() == 0.75


def test_distance_of_modules_is_over_parameters_by_name():
    student = Regression()
    teacher = copy.deepcopy(student)
    metric = RelativeWeightDistance()
    metric.update(student, teacher)
    assert metric.compute().item() == 0
    metric.reset()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(2.0)
        for parameter in teacher.parameters():
            parameter.fill_(1.0)
        teacher.net[1].running_mean.fill_(100)  # statistics are no weights
    metric.update(student, teacher)
    assert metric.compute().item() == pytest.approx(0.5)
    assert not metric.compute().requires_grad


def test_distance_sees_through_wrappers_and_counts_tied_weights_once():
    student = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    student[1].weight = student[0].weight
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        student[0].weight.fill_(1.0)
        student[2].weight.fill_(1.0)
        teacher[0].weight.fill_(2.0)
        teacher[2].weight.fill_(1.0)
    metric = RelativeWeightDistance()
    metric.update(torch.compile(student, backend="eager"), teacher)
    assert metric.compute().item() == pytest.approx(math.sqrt(4 / 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distance_of_half_weights_is_taken_in_float32(dtype):
    student = [torch.full((4096,), 300.0, dtype=dtype)]  # the squares overflow float16
    teacher = [torch.full((4096,), 300.0) * (1 + 2**-12)]  # and the difference is below its precision
    metric = RelativeWeightDistance()
    metric.update(student, teacher)
    assert metric.compute().item() == pytest.approx(2**-12, rel=1e-4)


def test_distance_takes_generators_and_complex_numbers():
    metric = RelativeWeightDistance()
    metric.update((t for t in [torch.tensor([3 + 4j])]), (t for t in [torch.tensor([3 + 0j])]))
    assert metric.compute().item() == pytest.approx(4 / 5)


def test_equal_replicas_give_the_value_of_one():
    student, teacher = [torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 4.0])]
    metric = RelativeWeightDistance()
    for _ in range(8):
        metric.update(student, teacher)
    assert metric.compute().item() == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (nn.Linear(2, 2), nn.Linear(2, 2, bias=False), ValueError, "1 parameters are not in both.*: bias. Pass"),
        (nn.Linear(2, 2), nn.Linear(3, 2), ValueError, r"weight: \[2, 2\] in the student, \[2, 3\] in the teacher"),
        (nn.Linear(2, 2), [torch.zeros(2)], TypeError, "student is a Linear and teacher a list"),
        (torch.zeros(2), torch.zeros(2), TypeError, "student is a Tensor and teacher a Tensor; pass two modules"),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2)}, TypeError, "student is a dict"),
        ([torch.zeros(2)], [], ValueError, "the student has 1 tensors, the teacher 0"),
        ([torch.tensor(3)], [torch.tensor(3)], TypeError, "tensor 0 is a tensor of int64.*Leave others out"),
        (["a"], ["a"], TypeError, "tensor 0 is 'a'"),
    ],
)
def test_weights_that_cannot_be_compared_are_refused(student, teacher, error, message):
    with pytest.raises(error, match=message):
        RelativeWeightDistance().update(student, teacher)


def test_bad_batches_are_refused():
    labels, mask = torch.tensor([0, 1]), torch.tensor([True, False])
    for kind, update, error, message in [
        (PseudoLabelAcceptance, (mask.float(),), TypeError, "mask is a tensor of float32.*must be a tensor of bool"),
        (PseudoLabelAccuracy, (labels, mask.float(), labels), TypeError, "mask is a tensor of float32"),
        (PseudoLabelAccuracy, (labels.float(), mask, labels), TypeError, "^labels is a tensor of float32"),
        (PseudoLabelAccuracy, (labels, mask, mask), TypeError, "true_labels is a tensor of bool"),
        (PseudoLabelAccuracy, (labels, mask, labels[:1]), ValueError, r"true_labels has the shape \[1\], mask \[2\]"),
        (TeacherStudentAgreement, (labels, labels), TypeError, "student_logits is a tensor of int64"),
        (TeacherStudentAgreement, (torch.zeros(2, 3), torch.zeros(2, 2)), ValueError, "they must be the same"),
        (TeacherStudentAgreement, (torch.zeros(2, 1), torch.zeros(2, 1)), ValueError, "1 class in dim=1"),
    ]:
        with pytest.raises(error, match=message):
            kind().update(*update)


class Logs(LightningModule):
    """Hands batches of pseudo-labels, masks and true labels on to metrics; trains one weight."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.rate, self.accuracy = PseudoLabelAcceptance(), PseudoLabelAccuracy()
        self.agreement, self.distance = TeacherStudentAgreement(), RelativeWeightDistance()

    def training_step(self, batch, batch_idx):
        labels, mask, truth = batch
        self.rate(mask)
        self.accuracy.update(labels, mask, truth)
        self.log("rate", self.rate, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return self.net(mask.float().unsqueeze(1)).square().mean()

    def on_train_epoch_end(self):
        self.distance.update([torch.tensor([2.0])], [torch.tensor([1.0])])
        self.log("distance", self.distance)

    def validation_step(self, batch, batch_idx):
        labels, _, truth = batch
        self.agreement.update(ONE_HOT[labels], ONE_HOT[truth])
        self.log("agreement", self.agreement)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_self_log_takes_them_and_starts_anew_in_every_epoch():
    labels, truth = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 1, 0, 1, 1])
    mask = torch.tensor([True, True, True, False, False])
    data = DataLoader(TensorDataset(labels, mask, truth), batch_size=3)
    module = Logs()
    this = trainer(max_epochs=3, log_every_n_steps=1, num_sanity_val_steps=1)
    this.fit(module, data, data)
    logged = {name: value.item() for name, value in this.logged_metrics.items()}
    assert logged["rate_epoch"] == pytest.approx(3 / 5)  # the mean of the batches' rates is 1 / 2
    assert logged["rate_step"] == 0
    assert logged["accuracy"] == pytest.approx(2 / 3)
    assert logged["agreement"] == pytest.approx(3 / 5)
    assert logged["distance"] == pytest.approx(1 / 2)
    assert set(module.state_dict()) == {"net.weight", "net.bias"}


def test_metrics_leave_the_training_as_it_was():
    class Watched(Regression):
        def __init__(self):
            super().__init__()
            self.distance, self.agreement = RelativeWeightDistance(), TeacherStudentAgreement()

        def on_train_batch_end(self, *args):
            self.distance.update(self.net, copy.deepcopy(self.net))
            self.log("distance", self.distance, on_step=False, on_epoch=True)

    plain, watched = seeded(), seeded(Watched)
    fit(plain)
    fit(watched)
    assert equal(plain.state_dict(), watched.state_dict())
