"""Heal with transformers' Trainer: its loop, devices, logging and checkpoints, and our distance as the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from structlin.heal import distillation_loss


class HealTrainer(Trainer):
    """Train a compressed model towards the dense one, by Trainer: so accelerate, DDP and FSDP2 come with it.

    Labels are not needed, and not passed on. Evaluation reports the same distance as `eval_loss`, on which
    `load_best_model_at_end` and `EarlyStoppingCallback` can rest. Under FSDP2 the teacher is sharded as the student.
    `structlin.heal` needs no Trainer, for one process; both minimise the same loss.

    Args:
        *args: of Trainer, the student first.
        teacher: the dense model; it takes the student's inputs, and is never trained.
        loss: (student output, teacher output, batch) -> scalar, in place of `structlin.distillation_loss`.
        **kwargs: of Trainer.
    Example:
        trainer = structlin.hf.HealTrainer(student, arguments, teacher=dense, train_dataset=data)
        trainer.train()
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module,
        loss: Callable[[Any, Any, Any], Tensor] = distillation_loss,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.distance = loss
        self.model_accepts_loss_kwargs = False  # the loss is a mean: average it over accumulated batches
        self.teacher = self._placed(teacher.eval())

    def _placed(self, teacher: nn.Module) -> nn.Module:
        """Move the teacher to this process's device, or shard it where the student is going to be."""
        if getattr(self.accelerator, "is_fsdp2", False):
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model  # noqa: PLC0415 (there where FSDP is)

            sharded: nn.Module = fsdp2_prepare_model(self.accelerator, teacher)
            return sharded
        return teacher.to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the distance of the student's outputs from the teacher's."""
        batch = {key: value for key, value in inputs.items() if key not in self.label_names}
        with torch.no_grad():
            expected = self.teacher(**batch)
        outputs = model(**batch)
        loss = self.distance(outputs, expected, batch)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Return the distance alone: Trainer would ask for labels."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, batch).detach(), None, None
