"""A teacher for a LightningModule: the frozen average of its student, kept by the engine of ``EMACallback``."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_ema.modules.named_tensors import without_wrappers
from lightning_ema.teacher.callback import TeacherCallback
from lightning_ema.teacher.config import MeanTeacherConfig
from lightning_ema.trainer.facts import in_training_step, trainer_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object  # so that it goes with pytorch_lightning's LightningModule as well

_STUDENT, _TEACHER = "student.", "teacher."


class MeanTeacherMixin(_Base):
    """Gives a LightningModule with a ``student`` a ``teacher``: the average of the student's weights, frozen.

    Example::

        class Classifier(MeanTeacherMixin, LightningModule):
            mean_teacher = MeanTeacherConfig(decay=0.999, consistency_weight=10.0, ramp_up_steps=1000)

            def __init__(self):
                super().__init__()
                self.student = make_network()

            def training_step(self, batch):
                images, labels = batch["labeled"]
                with self.teacher_view() as teacher:
                    targets = teacher(batch["unlabeled"].weak)
                unsupervised = consistency.mse(self.student(batch["unlabeled"].strong), targets)
                supervised = cross_entropy(self.student(images), labels)
                return supervised + self.consistency_weight() * unsupervised

            def configure_optimizers(self):
                return torch.optim.Adam(self.student.parameters())

    Assigning ``self.student``, in ``__init__`` or ``configure_model``, makes ``self.teacher`` as a copy of it; where a
    copy is not possible, assign a ``self.teacher`` of your own first, built like the student. Both are plain submodules
    with plain keys in the ``state_dict``. The teacher is set to the student once, when a fresh run starts, and follows
    it after each step, also where a network was replaced in training.

    Files without ``teacher.`` keys load the student into both; files of the bare network load into both, too. It makes
    no difference whether a network was or is wrapped by ``torch.compile``.

    Attributes:
        mean_teacher: the settings; an attribute of the class, an argument of the constructor, or assigned before
            training.
        student: the network that is trained.
        teacher: its average.

    Args:
        mean_teacher: the settings, in place of those of the class.
    """

    mean_teacher: MeanTeacherConfig = MeanTeacherConfig()
    left_out_of_averages: Sequence[str] = ("teacher.*",)
    """Patterns that an ``EMACallback`` beside leaves out."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if nn.Module in order and order.index(nn.Module) < order.index(MeanTeacherMixin):
            raise TypeError(
                f"{cls.__name__} names MeanTeacherMixin after its LightningModule, where it has no effect. Name it "
                f"first: class {cls.__name__}(MeanTeacherMixin, LightningModule)."
            )

    def __init__(self, *args: Any, mean_teacher: MeanTeacherConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if mean_teacher is not None:
            self.mean_teacher = mean_teacher
        self.teacher_callback = TeacherCallback()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("student", "teacher") and isinstance(value, nn.Module):
            _check_built(name, value)
        if name == "student" and isinstance(value, nn.Module) and "teacher" in self._modules:
            _check_apart(value, self.get_submodule("teacher"))
        super().__setattr__(name, value)
        if name == "student" and isinstance(value, nn.Module) and "teacher" not in self._modules:
            self.teacher = _copied(value)
        elif name == "teacher" and isinstance(value, nn.Module):
            _check_apart(getattr(self, "student", None), value)
            value.requires_grad_(False)
            value.train(self.mean_teacher.teacher_trains(self.training))

    def save_hyperparameters(
        self, *args: Any, ignore: Sequence[str] | str | None = None, frame: FrameType | None = None, logger: bool = True
    ) -> None:
        """As in Lightning, without ``mean_teacher``: settings of a training are no hyperparameters of the network.

        A file could not hold them as plain values. Give them to ``load_from_checkpoint(..., mean_teacher=...)``.
        """
        ignored = [ignore] if isinstance(ignore, str) else list(ignore or ())
        frame = frame or cast(FrameType, cast(FrameType, inspect.currentframe()).f_back)
        super().save_hyperparameters(*args, ignore=[*ignored, "mean_teacher"], frame=frame, logger=logger)

    # --- in training ------------------------------------------------------------------------------------------------

    @contextmanager
    def teacher_view(self) -> Iterator[nn.Module]:
        """The teacher, for the length of a ``with`` block: without gradients, in its mode, under the run's precision.

        Raises:
            RuntimeError: the module overrides ``configure_callbacks`` and leaves the teacher's callback out.
        """
        self._check_followed()
        teacher: nn.Module = self.teacher
        wanted = self.mean_teacher.teacher_trains(self.training)
        if teacher.training != wanted:
            teacher.train(wanted)
        trainer = trainer_of(self)
        precision = nullcontext() if trainer is None else trainer.precision_plugin.forward_context()
        with torch.no_grad(), precision:
            yield teacher

    def consistency_weight(self) -> float:
        """The weight of the unsupervised loss at this step: 0 in the burn-in, then rising along the ramp."""
        self._check_followed()
        return self.mean_teacher.weight(self.teacher_callback.num_steps)

    def train(self, mode: bool = True) -> Any:
        """Sets the mode of all submodules; the teacher is in train mode only where ``teacher_mode`` says so."""
        super().train(mode)
        if "teacher" in self._modules:
            self.teacher.train(self.mean_teacher.teacher_trains(mode))
        return self

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        self._check_followed()
        return super().on_train_batch_start(batch, batch_idx)

    def configure_callbacks(self) -> list[Callback]:
        """The teacher's callback. A module that overrides this adds its own to ``super().configure_callbacks()``."""
        others = super().configure_callbacks()
        return [*([others] if isinstance(others, Callback) else others), self.teacher_callback]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.teacher_callback.follow()  # for a weights-only file no hook of a callback is called
        super().on_save_checkpoint(checkpoint)

    # --- prediction and validation ----------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network says that ``predict_on`` names; ``predict_step`` calls this.

        Raises:
            RuntimeError: ``training_step`` asks the teacher with gradients enabled, as if it could be trained.
        """
        asked = self.mean_teacher.predict_on
        if asked == "teacher" and torch.is_grad_enabled() and in_training_step(self):
            raise RuntimeError(
                "self(...) in training_step asks the teacher, which is frozen: a loss on what it says trains nothing. "
                "Write self.student(...) for what is to be trained. For targets write `with self.teacher_view() as "
                "teacher:`, or call self(...) under torch.no_grad()."
            )
        return self.networks()[asked](*args, **kwargs)

    def networks(self) -> dict[str, nn.Module]:
        """Teacher and student by name."""
        return {"teacher": self.get_submodule("teacher"), "student": self.get_submodule("student")}

    def log_both(self, metrics: nn.ModuleDict, targets: Any, run: Callable[[nn.Module], Any]) -> None:
        """Updates the metrics of both networks with what each says of one batch, and logs them for the epoch.

        Example::

            self.scores = for_both(accuracy=MulticlassAccuracy(10))  # in __init__

            def validation_step(self, batch):
                images, labels = batch
                self.log_both(self.scores, labels, lambda network: network(images))

        Args:
            metrics: made by :func:`for_both`; logged as ``teacher/<metric>`` and ``student/<metric>``.
            targets: the second argument of the metrics.
            run: gives the first one from a network.
        """
        for name, network in self.networks().items():
            outputs = run(network)
            for metric_name, metric in cast(nn.ModuleDict, metrics[name]).items():
                metric = cast(Metric, metric)
                metric.update(outputs, targets)
                self.log(f"{name}/{metric_name}", metric, batch_size=1)

    # --- files ------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a file of this module, of a module with the student alone, or of the bare network."""
        return super().load_state_dict(_filled(state_dict, self.state_dict().keys()), strict, assign)

    def _check_followed(self) -> None:
        trainer = trainer_of(self)
        if trainer is None or trainer.state.fn != "fit" or self.teacher_callback.known:
            return
        raise RuntimeError(
            f"{type(self).__name__}.configure_callbacks leaves the teacher's callback out, so that the teacher would "
            "never follow. Write: return [*super().configure_callbacks(), ...]."
        )


def for_both(**metrics: Metric) -> nn.ModuleDict:
    """Metrics of their own for teacher and student, to be given to :meth:`MeanTeacherMixin.log_both`."""
    return nn.ModuleDict(
        {
            name: nn.ModuleDict({key: metric.clone() for key, metric in metrics.items()})
            for name in ("teacher", "student")
        }
    )


def _check_built(role: str, network: nn.Module) -> None:
    lazy = [name for name, tensor in network.state_dict(keep_vars=True).items() if is_lazy(tensor)]
    if lazy:
        raise ValueError(
            f"the {role} has lazy layers, whose {lazy[0]} has no shape yet. Run the network once on a batch of zeros "
            f"before assigning it: network(torch.zeros(...)); self.{role} = network."
        )


def _check_apart(student: nn.Module | None, teacher: nn.Module) -> None:
    of_student = {} if student is None else {id(p): name for name, p in student.named_parameters()}
    shared = [of_student[id(p)] for p in teacher.parameters() if id(p) in of_student]
    if shared:
        raise ValueError(
            f"the teacher shares {len(shared)} parameters with the student: {', '.join(shared[:4])}. Freezing it would "
            "freeze the student. Build it anew, or leave self.teacher out: it is made as a copy of the student."
        )


def _copied(student: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(student)
    except Exception as error:
        raise TypeError(
            f"the student, a {type(student).__name__}, cannot be copied ({error}). Build the teacher as you build the "
            "student, and assign it first: self.teacher = make_network(); self.student = make_network()."
        ) from error


def _filled(state_dict: Mapping[str, Any], own: Iterable[str]) -> Mapping[str, Any]:
    """The ``state_dict`` with what is missing of the teacher, or of both, filled in from what there is.

    Entries of the two networks get the wrapper prefixes (``_orig_mod.``) that their names have in the module.
    """
    names = {without_wrappers(key): key for key in own if key.startswith((_STUDENT, _TEACHER))}
    has_student, has_teacher = (any(key.startswith(prefix) for key in state_dict) for prefix in (_STUDENT, _TEACHER))
    filled: OrderedDict[str, Tensor] = OrderedDict()
    for key, value in state_dict.items():
        name = without_wrappers(key)
        if has_teacher or not (name.startswith(_STUDENT) if has_student else f"{_STUDENT}{name}" in names):
            filled[names.get(name, key)] = value
            continue
        name = name.removeprefix(_STUDENT) if has_student else name
        for prefix in (_STUDENT, _TEACHER):
            filled[names.get(f"{prefix}{name}", f"{prefix}{key.removeprefix(_STUDENT)}")] = value
    if hasattr(state_dict, "_metadata"):
        filled._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return filled
