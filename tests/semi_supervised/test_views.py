import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_ema.semi_supervised import PerSample
from lightning_ema.semi_supervised.streams import Draw
from lightning_ema.semi_supervised.views import LabeledBatches, UnlabeledBatches, default_collate

X = torch.arange(12.0).view(6, 2)
PAIRS = TensorDataset(X, torch.tensor([0, 1, 2, 0, 1, 2]))
FURTHER = [torch.tensor([100.0, 101.0]), (torch.tensor([200.0, 201.0]), "ignored")]


def noisy(batch):
    return batch + torch.rand(len(batch), 1)


def unlabeled(dataset=PAIRS, rest=(1, 4, 5), further=None, collate=default_collate, reveal=False, **views):
    return UnlabeledBatches(dataset, rest, further, collate, views.get("weak"), views.get("strong"), reveal)


def test_labeled_batches_are_views_of_the_kept_samples():
    made = LabeledBatches(PAIRS, [1, 3, 5], default_collate, lambda batch: -batch)
    inputs, labels = made[Draw([2, 0, 2], 0)]
    assert torch.equal(inputs, -X[[5, 1, 5]])
    assert labels.tolist() == [2, 1, 2] and labels.dtype == torch.int64


def test_two_views_of_the_same_samples():
    made = unlabeled(weak=lambda batch: batch + 0.5, strong=lambda batch: -batch)
    weak, strong, labels = made[Draw([2, 0], 0)]
    assert torch.equal(weak, X[[5, 1]] + 0.5) and torch.equal(strong, -X[[5, 1]])
    assert labels is None


def test_views_without_transforms_do_not_share_memory():
    made = unlabeled(strong=lambda batch: batch.zero_())[Draw([0, 1], 0)]
    assert torch.equal(made.weak, X[[1, 4]]) and not made.strong.any()


def test_the_draws_seed_decides_what_is_random():
    made = unlabeled(weak=noisy, strong=noisy)
    torch.manual_seed(0)
    first, before = made[Draw([0, 1], 5)], torch.get_rng_state()
    again, other = made[Draw([0, 1], 5)], made[Draw([0, 1], 6)]
    assert torch.equal(first.weak, again.weak) and torch.equal(first.strong, again.strong)
    assert not torch.equal(first.weak, other.weak) and not torch.equal(first.weak, first.strong)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(first.weak, X[[1, 4]] + torch.rand(2, 1))


def test_further_samples_follow_the_rest_and_have_no_label():
    made = unlabeled(further=FURTHER, reveal=True)[Draw([4, 1, 3, 1], 0)]
    assert made.weak.tolist() == [[200, 201], [8, 9], [100, 101], [8, 9]]
    assert made.labels.tolist() == [-1, 1, -1, 1]
    alone = unlabeled(rest=[], further=FURTHER, reveal=True)[Draw([0, 1], 0)]
    assert alone.strong.tolist() == [[100, 101], [200, 201]] and alone.labels.tolist() == [-1, -1]


def test_labels_are_not_looked_at_unless_asked_for():
    strange = [(torch.zeros(2), None), torch.ones(2)]
    assert unlabeled(strange, [0, 1])[Draw([1, 0], 0)].weak.tolist() == [[1, 1], [0, 0]]
    with pytest.raises(TypeError, match="it must be a pair"):
        unlabeled(strange, [0, 1], reveal=True)[Draw([1], 0)]
    with pytest.raises(TypeError, match=r"the label 1\.5"):
        LabeledBatches([(torch.zeros(2), 1.5)], [0], default_collate, None)[Draw([0], 0)]


def test_samples_of_different_sizes_reach_a_transform_as_a_list():
    pictures = [(np.full((n, n), float(n)), n) for n in range(1, 7)]
    made = unlabeled(pictures, collate=list, weak=PerSample(lambda p: p[:1, 0]), strong=PerSample(np.sum))
    weak, strong, _ = made[Draw([2, 0], 0)]
    assert weak.tolist() == [[6.0], [2.0]] and strong.tolist() == [6.0**3, 2.0**3]


def test_a_dataset_that_gives_many_at_once_is_asked_for_many_at_once():
    class Many:
        def __init__(self):
            self.asked = []

        def __getitems__(self, indices):
            self.asked.append(indices)
            return [PAIRS[index] for index in indices]

    many = Many()
    assert torch.equal(unlabeled(many, [1, 4, 5])[Draw([2, 0], 0)].weak, X[[5, 1]])
    assert many.asked == [[5, 1]]
