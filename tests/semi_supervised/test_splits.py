import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from lightning_ema.semi_supervised import split_by_class
from lightning_ema.semi_supervised.splits import labels_of

LABELS = [0, 1, 2] * 20


def test_each_class_keeps_its_share_and_the_rest_is_everything_else():
    kept, rest = split_by_class(LABELS, 4)
    assert [[LABELS[i] for i in kept].count(name) for name in range(3)] == [4, 4, 4]
    assert sorted(kept + rest) == list(range(60)) and kept == sorted(kept) and rest == sorted(rest)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 4), st.integers(0, 2**31))
def test_any_labels(labels, per_class, seed):
    if min(labels.count(name) for name in set(labels)) < per_class:
        with pytest.raises(ValueError, match="of each class"):
            split_by_class(labels, per_class, seed)
        return
    kept, rest = split_by_class(labels, per_class, seed)
    assert all([labels[i] for i in kept].count(name) == per_class for name in set(labels))
    assert sorted(kept + rest) == list(range(len(labels)))


def test_the_seed_decides_alone():
    torch.manual_seed(0)
    first = split_by_class(LABELS, 4, seed=1)
    before = torch.get_rng_state()
    assert split_by_class(torch.tensor(LABELS, dtype=torch.uint8), 4, seed=1) == first
    assert split_by_class(np.array(LABELS), 4, seed=1) == first
    assert split_by_class([np.int32(label) for label in LABELS], 4, seed=1) == first
    assert split_by_class([torch.tensor(label) for label in LABELS], 4, seed=1) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert len({str(split_by_class(LABELS, 4, seed)) for seed in range(8)}) == 8


def test_every_sample_can_be_drawn():
    drawn = [split_by_class([0] * 5 + [1], 1, seed)[0][0] for seed in range(200)]
    assert [20 < drawn.count(i) < 60 for i in range(5)] == [True] * 5  # 40 expected, 5.7 the standard deviation


def test_fewer_labels_are_a_part_of_more():
    assert set(split_by_class(LABELS, 3)[0]) < set(split_by_class(LABELS, 10)[0])


def test_a_whole_class_may_keep_its_labels():
    assert split_by_class([5, 7, 5, 7, 7], 2)[0][0] == 0 and len(split_by_class([5, 7, 5, 7, 7], 2)[1]) == 1
    assert split_by_class([3, 3], 2) == ([0, 1], [])


@pytest.mark.parametrize(
    ("labels", "per_class", "message"),
    [
        ([0, 0, 0, 1, 1, 2], 3, "class 1 has 2, class 2 has 1. Ask for at most 1"),
        ([0.0, 1.0], 1, "float32"),
        ([True, False], 1, "torch.bool"),
        (["a", "b"], 1, "cannot be read as numbers"),
        ([[0, 1], [1, 0]], 1, r"shape \[2, 2\]"),
        ([], 1, r"shape \[0\]"),
        ([0, -1], 1, "a label is -1.*`unlabeled`"),
        ([0, 1], 0, "per_class is 0"),
        ([0, 1], 1.5, "per_class is 1.5"),
    ],
)
def test_what_cannot_be_split_is_refused(labels, per_class, message):
    with pytest.raises((ValueError, TypeError), match=message):
        split_by_class(labels, per_class)


class Reads:
    def __init__(self, targets=None):
        self.read = []
        if targets is not None:
            self.targets = targets

    def __len__(self):
        return 3

    def __getitem__(self, index):
        self.read.append(index)
        return torch.zeros(2), torch.tensor(index % 2)


def test_labels_are_read_from_the_items_only_where_nothing_says_them():
    items, targets = Reads(), Reads([2, 1, 0])
    assert labels_of(items, None) == [0, 1, 0] and items.read == [0, 1, 2]
    assert labels_of(targets, None) == [2, 1, 0]
    assert labels_of(targets, [1, 1, 1]) == [1, 1, 1]
    assert targets.read == []


@pytest.mark.parametrize(
    ("dataset", "labels", "message"),
    [
        (Reads(), [0, 1], "2 labels, but 3 samples"),
        (Reads([0]), None, "1 labels, but 3 samples"),
        (TensorDataset(torch.zeros(3, 2)), None, "has 1 entries"),
        ([torch.zeros(2)], None, "is a Tensor"),
        ([(torch.zeros(2), 0.5)], None, "the label 0.5"),
        ([(torch.zeros(2), torch.tensor([0, 1]))], None, r"the label tensor\(\[0, 1\]\)"),
    ],
)
def test_labels_that_cannot_be_read(dataset, labels, message):
    with pytest.raises((ValueError, TypeError), match=message):
        labels_of(dataset, labels)
