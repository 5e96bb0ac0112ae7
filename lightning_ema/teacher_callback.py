"""Lightning's hooks that keep a teacher: when it starts, follows its student and is resumed. No arithmetic."""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_ema import trainer_facts
from lightning_ema.advice import other_settings
from lightning_ema.average import WeightAverage
from lightning_ema.checkpoint import changes
from lightning_ema.recalibration import statistics_of
from lightning_ema.selection import Survey, without_wrappers
from lightning_ema.shards import same_cut
from lightning_ema.steps import StepCounter
from lightning_ema.teacher_config import MeanTeacherConfig

_NOT_STARTED = sys.maxsize
_OF_TENSORS = ("average", "others", "origin")


@trainer_facts.known_to_pytorch_lightning
class TeacherCallback(Callback):
    """Keeps ``pl_module.teacher`` the average of ``pl_module.student``. The mixin brings it in by itself.

    It derives from ``Callback`` alone: Lightning drops callbacks of the trainer that are of a superclass's type.
    """

    def __init__(self) -> None:
        self._average: WeightAverage | None = None
        self._loaded: dict[str, Any] | None = None
        self._steps = StepCounter()
        self._steps_before = 0
        self._buffers = "average"
        self._teacher = nn.Module()
        self.known = False
        """Whether a trainer had this callback at some time. A tuner sets all callbacks aside for a while."""

    @property
    def state_key(self) -> str:
        return "MeanTeacher"

    @property
    def average(self) -> WeightAverage | None:
        """The engine, which writes into the teacher's own tensors; None until training starts."""
        return self._average

    @property
    def num_steps(self) -> int:
        """Steps of the student since the start."""
        if self._average is not None:
            return self._average.num_steps
        return 0 if self._loaded is None else int(self._loaded["num_steps"])

    # --- a fit ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer_facts.check_strategy(trainer)
        self.known = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_optimizers(trainer, pl_module)
        student, teacher = networks(pl_module)
        teacher.requires_grad_(False)
        _check_shards(student, teacher)
        config: MeanTeacherConfig = pl_module.mean_teacher  # type: ignore[assignment]
        if config.buffers == "ignore" and config.teacher_mode == "eval" and statistics_of(teacher):
            rank_zero_warn(
                "MeanTeacher: with buffers='ignore' and teacher_mode='eval' the teacher's BatchNorm statistics stay "
                "what they are now, while its weights move on. Write buffers='average', or teacher_mode='train'."
            )
        _check_recalibration(trainer, teacher)
        self._teacher, self._buffers = teacher, config.buffers
        if trainer.ckpt_path is None:
            self._loaded = None  # of a file that was only tested or validated
        begins = trainer_facts.begins(trainer) and self._loaded is None
        if not begins and self._loaded is None and self._average is not None and self._average.module is student:
            self._loaded = self.state_dict()  # the teacher, its tensors or the settings may have been replaced
        self._average = _average(student, teacher, config)
        if begins:
            self._average.start_at(0)
            with torch.no_grad():
                _copy_frozen(student, teacher, self._average)
            self._copy_buffers()
        else:
            self._go_on(self._average)
        self._steps.hold(self._average.owns)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average = self._require()
        config: MeanTeacherConfig = pl_module.mean_teacher  # type: ignore[assignment]
        self._teacher.train(config.teacher_trains(pl_module.training))  # may be assigned late
        if not average.module.training:
            rank_zero_warn(
                "MeanTeacher: the student is in eval mode, so its dropout and BatchNorm do not train. Call "
                "self.student.train() if that is not meant."
            )
        if trainer_facts.begins(trainer):
            self._steps_before = average.num_steps
        average.bind(trainer_facts.plan(trainer).after(-self._steps_before).after(average.start_step))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_optimizers(trainer, pl_module)  # again: what is unfrozen in training is added to an optimizer
        self._teacher.requires_grad_(False)  # again: the whole module may have been unfrozen

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._require().refresh()
        self._steps.open()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._steps.close()
        if self.absorb() and trainer_facts.logs_this_step(trainer):
            average = self._require()
            values = {"mean_teacher/decay": average.decay, "mean_teacher/distance": average.distance()}
            pl_module.log_dict(values, on_step=True, on_epoch=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.absorb()
        self._steps.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:
            self.absorb()
        except RuntimeError as error:  # the exception under way matters more
            rank_zero_warn(str(error))
        finally:
            self._steps.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._steps.release()

    def absorb(self) -> bool:
        """Lets the teacher follow the steps taken since the last time; gives whether there were any."""
        steps = self._steps.take()
        if self._average is None or not steps:
            return False
        if self._average.step(steps):
            self._copy_buffers()
        return True

    def _copy_buffers(self) -> None:
        if self._average is not None and self._buffers != "ignore":
            with torch.no_grad():
                _copy_buffers(self._average.module, self._teacher, self._average)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.absorb()  # into tensors that the file's state_dict refers to

    def state_dict(self) -> dict[str, Any]:
        self.absorb()
        if self._average is None:
            return {} if self._loaded is None else self._loaded
        state = {name: value for name, value in self._average.state_dict().items() if name not in _OF_TENSORS}
        names = [name for name, _ in self._average.named_tensors()]
        return {**state, "names": names, "steps_before": self._steps_before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict) or None
        if self._steps.held and self._average is not None:  # a tuner restores in the middle of a fit
            self._go_on(self._average)

    def _go_on(self, average: WeightAverage) -> None:
        """Goes on from the teacher's tensors as they are, with the counters of a file where there is one."""
        state, self._loaded = self._loaded, None
        if state is None:
            names = [name for name, _ in average.named_tensors()]
            state = {**average.state_dict(), "started": True, "start_step": 0, "names": names}
        elif changed := changes(state, average.settings.describe()):
            rank_zero_warn(f"MeanTeacher: {other_settings(changed)}")
        self._steps_before = state.get("steps_before", 0)
        tensors = Survey(self._teacher).tensors
        average.load_state_dict({**state, "average": {name: tensors[name] for name in state["names"]}})

    def _require(self) -> WeightAverage:
        if self._average is None:
            raise RuntimeError("the teacher is not kept yet: its callback's on_fit_start did not run.")
        return self._average


def networks(pl_module: LightningModule) -> tuple[nn.Module, nn.Module]:
    """The student and the teacher of a module.

    Raises:
        ValueError: there is none yet.
    """
    student, teacher = getattr(pl_module, "student", None), getattr(pl_module, "teacher", None)
    if not isinstance(student, nn.Module) or not isinstance(teacher, nn.Module):
        raise ValueError(
            f"{type(pl_module).__name__} has no student: assign the network to train, self.student = ..., in __init__ "
            "or configure_model. The teacher is made from it."
        )
    return student, teacher


def _check_optimizers(trainer: Trainer, pl_module: LightningModule) -> None:
    _, teacher = networks(pl_module)
    names = {id(parameter): name for name, parameter in teacher.named_parameters()}
    parameters = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
    found = [f"teacher.{names[id(p)]}" for p in parameters if id(p) in names]
    if found:
        raise ValueError(
            f"an optimizer holds {len(found)} parameters of the teacher: {', '.join(found[:4])}"
            f"{', ...' if len(found) > 4 else ''}. The teacher only follows. In configure_optimizers write "
            "self.student.parameters() instead of self.parameters()."
        )


def _check_shards(student: nn.Module, teacher: nn.Module) -> None:
    of_teacher = Survey(teacher).tensors
    for name, tensor in Survey(student).tensors.items():
        if name in of_teacher and not same_cut(tensor, of_teacher[name]):
            raise ValueError(
                f"student.{name} and teacher.{name} are not sharded alike. In configure_model apply the same "
                "fully_shard and parallelize_module calls to self.student and to self.teacher, after the student was "
                "assigned."
            )


def _check_recalibration(trainer: Trainer, teacher: nn.Module) -> None:
    recalibrating = any(getattr(callback, "recalibrate_batches", 0) for callback in trainer_facts.callbacks(trainer))
    if recalibrating and statistics_of(teacher):
        raise ValueError(
            "buffers='recalibrate' of an EMACallback empties the BatchNorm statistics of the whole module, the "
            "teacher's too, and they are not filled again. Write EMACallback(buffers='average') beside a teacher."
        )


def _average(student: nn.Module, teacher: nn.Module, config: MeanTeacherConfig) -> WeightAverage:
    narrow = [
        name for name, p in teacher.named_parameters() if p.is_floating_point() and torch.finfo(p.dtype).bits < 32
    ]
    if narrow:
        raise ValueError(
            f"the teacher's {narrow[0]} has 16 bits, in which an average stops moving. Train with "
            "precision='bf16-mixed' or '16-mixed' instead, which keep the weights in float32."
        )
    return WeightAverage(
        student,
        config.schedule,
        every_n_steps=config.every_n_steps,
        start_step=_NOT_STARTED,
        decay_per=config.decay_per,
        buffers="average" if config.buffers == "average" else "copy",
        into=teacher,
    )


def _copy_frozen(student: nn.Module, teacher: nn.Module, average: WeightAverage) -> None:
    held = {name for name, _ in average.named_tensors()}
    tensors = Survey(teacher).tensors
    for name, tensor in Survey(student).tensors.items():
        if name not in held and isinstance(tensor, nn.Parameter):
            tensors[name].copy_(tensor)


def _copy_buffers(student: nn.Module, teacher: nn.Module, average: WeightAverage) -> None:
    """Copies the buffers that are not averaged."""
    held = {name for name, _ in average.named_tensors()}
    of_teacher = {without_wrappers(name): buffer for name, buffer in teacher.named_buffers()}
    for name, buffer in student.named_buffers():
        if (name := without_wrappers(name)) not in held:
            of_teacher[name].copy_(buffer)
