"""A few labeled and many unlabeled samples in every training batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_ema.checks import check_count, check_flag, check_one_of
from lightning_ema.semi_supervised.splits import check_map_style, labels_of, len_of, split_by_class
from lightning_ema.semi_supervised.streams import Draws, Stream
from lightning_ema.semi_supervised.views import Collate, LabeledBatches, Transform, UnlabeledBatches
from lightning_ema.trainer.facts import batches_done, is_fitting, process_of

LabeledView = Literal["weak", "strong"]


class SemiSupervisedDataModule(LightningDataModule):
    """Training batches of labeled and of unlabeled samples, side by side.

    A batch is ``{"labeled": (inputs, labels), "unlabeled": Views(weak, strong, labels)}``::

        data = SemiSupervisedDataModule(train_set, labels_per_class=10, weak=shifted, strong=distorted)

        def training_step(self, batch, batch_idx):
            inputs, labels = batch["labeled"]
            targets = self.teacher(batch["unlabeled"].weak)

    All batches are full: once all samples of a part have come, they come again in a new order, across the ends of
    epochs. An epoch has as many batches as the unlabeled samples fill.

    Which samples a batch holds, and what is random in its transforms (drawn from torch's CPU generator), depends on
    ``seed``, on the place of the batch in the run and on the process; not on the number of workers, on the global
    random state or on whether the run was resumed, in the middle of an epoch for instance. The processes of a
    distributed run share the samples without a sampler of Lightning's, whatever ``use_distributed_sampler`` says.

    Args:
        labeled: items are pairs ``(input, label)``, the label a whole number from 0.
        labels_per_class: how many samples of each class keep their labels; the others join the unlabeled ones. None:
            all keep them, and ``unlabeled`` is needed.
        unlabeled: further samples without labels. Of an item that is a tuple or list the first entry is taken.
        validation: a ``torch.utils.data.Dataset``, or a loader as it is. None: no validation.
        test: likewise.
        labels: the labels of ``labeled``, for the split. None: its ``targets`` where it has them, as torchvision's
            datasets do; otherwise all items are read once.
        weak: transform of a whole batch of inputs, as ``collate`` made it: for tensors ``[N, ...]`` to ``[N, ...]``.
            None: none. For a transform of one sample write ``PerSample(transform)``.
        strong: likewise.
        labeled_view: the transform that the labeled inputs get.
        labeled_batch_size: of one process.
        unlabeled_batch_size: of one process. It decides how many batches an epoch has.
        eval_batch_size: where ``validation`` or ``test`` is a dataset.
        seed: decides the split, the order and the transforms.
        reveal_labels: give the labels that the split took away as ``batch["unlabeled"].labels``, for metrics.
        collate: makes a batch of a list of inputs. None: ``default_collate``, which stacks tensors. ``list`` leaves
            inputs of different sizes to the transforms.
        num_workers: of each loader, as in ``DataLoader``.
        pin_memory: as in ``DataLoader``.

    Raises:
        ValueError, TypeError: an argument is out of range (here), or the data do not allow the split (``setup``).
    """

    def __init__(
        self,
        labeled: Dataset,  # type: ignore[type-arg]  # jsonargparse takes subclasses of the bare classes only
        labels_per_class: int | None,
        *,
        unlabeled: Dataset | None = None,  # type: ignore[type-arg]
        validation: Dataset | DataLoader | None = None,  # type: ignore[type-arg]
        test: Dataset | DataLoader | None = None,  # type: ignore[type-arg]
        labels: Sequence[int] | Tensor | None = None,
        weak: Transform | None = None,
        strong: Transform | None = None,
        labeled_view: LabeledView = "weak",
        labeled_batch_size: int = 32,
        unlabeled_batch_size: int = 96,
        eval_batch_size: int = 256,
        seed: int = 0,
        reveal_labels: bool = False,
        collate: Collate | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        if labels_per_class is not None:
            check_count(labels_per_class, "labels_per_class", at_least=1)
        elif unlabeled is None:
            raise ValueError(
                "labels_per_class is None, so that all of `labeled` keeps its labels, and there is no `unlabeled` "
                "dataset. Give one, or write labels_per_class=10 to take the labels of all but 10 samples a class."
            )
        check_one_of(labeled_view, "labeled_view", get_args(LabeledView))
        check_count(labeled_batch_size, "labeled_batch_size", at_least=1)
        check_count(unlabeled_batch_size, "unlabeled_batch_size", at_least=1)
        check_count(eval_batch_size, "eval_batch_size", at_least=1)
        check_count(num_workers, "num_workers", at_least=0)
        check_count(seed, "seed", at_least=0)
        check_flag(reveal_labels, "reveal_labels")
        for name, given in (("weak", weak), ("strong", strong), ("collate", collate)):
            if given is not None and not callable(given):
                raise TypeError(f"{name} is {given!r}; it must be a function of one batch, or None.")
        check_map_style(labeled, "labeled")
        if unlabeled is not None:
            check_map_style(unlabeled, "unlabeled")
        self.labeled = labeled
        self.labels_per_class = labels_per_class
        self.unlabeled = unlabeled
        self.validation = validation
        self.test = test
        self.labels = labels
        self.weak = weak
        self.strong = strong
        self.labeled_view = labeled_view
        self.labeled_batch_size = labeled_batch_size
        self.unlabeled_batch_size = unlabeled_batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.reveal_labels = reveal_labels
        self.collate = default_collate if collate is None else collate
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._split: tuple[list[int], list[int]] | None = None

    @property
    def split(self) -> tuple[list[int], list[int]]:
        """The indices, into ``labeled``, of the samples that keep their labels and of those that do not.

        Raises:
            ValueError, TypeError: as :func:`~lightning_ema.split_by_class`.
        """
        if self._split is None:
            if self.labels_per_class is None:
                self._split = list(range(len_of(self.labeled))), []
            else:
                self._split = split_by_class(labels_of(self.labeled, self.labels), self.labels_per_class, self.seed)
        return self._split

    @property
    def num_unlabeled(self) -> int:
        """The number of samples without labels, those of ``unlabeled`` included."""
        return len(self.split[1]) + (0 if self.unlabeled is None else len_of(self.unlabeled))

    def setup(self, stage: str) -> None:
        """Draws the split, where a fit needs it.

        Raises:
            ValueError, TypeError: as :func:`~lightning_ema.split_by_class`, or no sample is without a label.
        """
        if stage == "fit" and not self.num_unlabeled:
            raise ValueError(
                f"all {len(self.split[0])} samples of `labeled` keep their labels, so none is unlabeled. Ask for fewer "
                "labels_per_class, or give an `unlabeled` dataset."
            )

    def train_dataloader(self) -> CombinedLoader:
        """Two streams of equal length, which Lightning's default mode, ``min_size``, ends at the same batch."""
        kept, rest = self.split
        view = self.weak if self.labeled_view == "weak" else self.strong
        labeled = LabeledBatches(self.labeled, kept, self.collate, view)
        unlabeled = UnlabeledBatches(
            self.labeled, rest, self.unlabeled, self.collate, self.weak, self.strong, self.reveal_labels
        )
        streams = {
            "labeled": self._stream("labeled", labeled, len(kept), self.labeled_batch_size),
            "unlabeled": self._stream("unlabeled", unlabeled, self.num_unlabeled, self.unlabeled_batch_size),
        }
        return CombinedLoader(streams, "min_size")

    def _stream(self, part: str, batches: Dataset[Any], size: int, batch_size: int) -> Stream:
        rank, world_size = process_of(self.trainer)
        num_batches = math.ceil(self.num_unlabeled / (self.unlabeled_batch_size * world_size))
        draws = Draws(size, batch_size, num_batches, f"{self.seed}/{part}", rank, world_size)
        place = None if self.trainer is None else partial(batches_done, self.trainer)
        return Stream(batches, draws, place, self.num_workers, self.pin_memory)

    def val_dataloader(self) -> Any:
        """The validation data; an empty list, which means none to Lightning, for a fit without.

        Raises:
            ValueError: there are none, and they are asked for by ``trainer.validate``.
        """
        if self.validation is None and self.trainer is not None and is_fitting(self.trainer):
            return []
        return self._evaluating("validation", self.validation)

    def test_dataloader(self) -> Any:
        """The test data.

        Raises:
            ValueError: there are none.
        """
        return self._evaluating("test", self.test)

    def _evaluating(self, name: str, data: Any) -> Any:
        if data is None:
            raise ValueError(f"the data module has no {name} data. Give it some: {type(self).__name__}({name}=...).")
        if not isinstance(data, Dataset):
            return data
        return DataLoader(
            data,
            self.eval_batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin_memory,
        )

    def state_dict(self) -> dict[str, Any]:
        """What decides the split, for a checkpoint."""
        return {"labels_per_class": self.labels_per_class, "seed": self.seed, "size": len_of(self.labeled)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compares the split of a checkpoint that training resumes from with this one.

        Raises:
            ValueError: they differ, so that samples would change sides in the middle of the training.
        """
        if (self.trainer is None or is_fitting(self.trainer)) and state_dict != self.state_dict():
            raise ValueError(
                f"the checkpoint was trained with the split {state_dict}, and this data module has "
                f"{self.state_dict()}. Resume with the same, or load the weights alone and start a new run."
            )
