"""heal: distil a model into its compressed copy with an ordinary optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from structlin.batches import Forward, check_several, evaluating, held_apart, progress_bar
from structlin.heal.losses import Loss, distillation_loss, find_blocks, objective
from structlin.heal.options import HealOptions, HealReport, Parameters
from structlin.heal.run import Run, Stream, requiring_gradients
from structlin.layers.factored import Factored
from structlin.layers.freeze import unfreeze_


def heal(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    options: HealOptions | None = None,
    *,
    validation: Iterable[Any] | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> HealReport:
    """Train a compressed model, in place, towards the model it was made from.

    No labels are needed: the loss compares the outputs of both models for the same batch. Both run in eval mode, so
    dropout is off and running statistics do not change. Training flags, `requires_grad` and gradients are restored at
    the end, also after an error. Unless time ends it, the result depends on the arguments and torch's generators only.

    Args:
        student: the model that learns; `freeze_` is undone. It may share parameters with the teacher only if they are
            not trained.
        teacher: the model it learns from; it is not changed.
        batches: mappings (called as `model(**batch)`), tuples or lists (`model(*batch)`) or tensors, which are moved to
            the student's device. Iterated once per epoch; an iterator ends the training when it is exhausted.
        options: the settings; keywords override them one by one, see `HealOptions`.
        validation: held-back batches. Their mean loss is measured at the start, every `every` steps and at the end, and
            the student gets the weights with the lowest: it never ends worse on them than it began. None holds back
            a share of `batches` where that is a list or tuple, see `HealOptions`.
        loss: a function of (student's output, teacher's output, batch) in place of `distillation_loss`; with
            mode="blocks" it is added to the distance of the blocks, which is otherwise the whole loss.
        forward: a function of (model, batch) that returns the output, if a batch is not what the model takes.
        progress: True shows a progress bar on stderr (needs tqdm), None shows it on a terminal only.
        settings: fields of `HealOptions`, such as steps=1000, lr=1e-3.
    Returns:
        Steps, time, the loss before and after, and its history.
    Raises:
        ValueError: if an argument is invalid, or the checkpoint damaged or of another healing. Student, optimizer and
            torch's generators are unchanged.
        OSError: if the checkpoint cannot be written, naming it: found before the first step, but for a disk that fills
            up later. The old file stays.
        TypeError: if a setting is unknown, or a batch, an output or a returned value is of the wrong kind.
        RuntimeError: if a loss or gradient is not finite. The student has the best weights so far: lowest validation
            loss or, without validation, lowest mean training loss.
        BaseException: what a loader, a loss or Ctrl-C raises. With a validation the student has the best weights so
            far, without one those of the last step.
    Example:
        >>> teacher = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16))
        >>> student = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16))
        >>> report = heal(student, teacher, [torch.randn(32, 8) for _ in range(10)], steps=20, lr=1e-2)
        >>> report.stopped, report.loss_after < report.loss_before
        ('steps', True)
    """
    options = _options(options, settings)
    check_several("batches", batches)
    check_several("validation", () if validation is None else validation)
    if validation is None and isinstance(batches, list | tuple) and (count := int(options.held_back * len(batches))):
        batches, validation = held_apart(batches, count)
    if options.patience is not None and validation is None:
        raise ValueError(f"patience={options.patience} counts measurements on validation; give validation= too")
    length = _schedule(batches, options)
    trained = _select(student, options.parameters)
    _check_pair(student, teacher, trained)
    names = find_blocks(student, teacher, options.blocks) if options.blocks else []
    optimizer = _optimizer(list(trained.values()), options)
    stream = Stream(batches, options.epochs, next(iter(trained.values())).device)
    if isinstance(validation, Iterator):
        validation = list(validation)
    if loss is None and not names:
        loss = distillation_loss
    unfreeze_(student)  # a validation without gradients must see the factors as they are
    with (
        evaluating(student, teacher),
        requiring_gradients(student, set(trained.values())),
        objective(student, teacher, names, loss, forward) as loss_of,
        torch.inference_mode(False),
        torch.enable_grad(),
        progress_bar("heal", "step", length, progress) as advance,
    ):
        return Run(student, loss_of, optimizer, trained, stream, validation, options, length).run(advance)


def _options(options: HealOptions | None, settings: Mapping[str, Any]) -> HealOptions:
    known = [field.name for field in fields(HealOptions)]
    for name in settings.keys() - known:
        near = get_close_matches(name, known, 1) or known
        raise TypeError(f"heal has no setting {name!r}; did you mean {', '.join(near)}?")
    return HealOptions(**settings) if options is None else replace(options, **settings)


def _schedule(batches: Any, options: HealOptions) -> int | None:
    """Return the number of steps over which the learning rate is spread, None if time sets the schedule."""
    limits = [] if options.steps is None else [options.steps]
    if options.epochs is not None:
        with suppress(TypeError):  # an iterator, or a DataLoader over an IterableDataset, has no length
            limits.append(max(options.epochs * len(batches), 1))
    if not limits and options.seconds is None:
        raise ValueError(f"epochs={options.epochs} needs batches with a length; give a list, or steps= or seconds= too")
    return min(limits, default=None)


def _select(student: nn.Module, parameters: Parameters) -> dict[str, nn.Parameter]:
    """Return the parameters to train by name: those chosen and not frozen."""
    # The scales of quantised factors are parameters of modules in the layer; a "PreNorm" may hold a whole block.
    factors = {
        parameter
        for module in student.modules()
        if isinstance(module, Factored) or "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=isinstance(module, Factored))
    }

    def choose(name: str, parameter: nn.Parameter) -> bool:
        if callable(parameters):
            return parameters(name, parameter)
        return parameters == "all" or parameter in factors or name.endswith("bias")

    trained = {name: p for name, p in student.named_parameters() if p.requires_grad and choose(name, p)}
    if not trained:
        raise ValueError(
            f"no parameter to train: {parameters!r} chooses only frozen ones; choose others, or unfreeze some"
        )
    if any(parameter.is_inference() for parameter in trained.values()):
        raise ValueError("the student was made under torch.inference_mode, and can never be trained; make it outside")
    return trained


def _check_pair(student: nn.Module, teacher: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
    """Refuse swapped models, models on two devices, and training parameters whose memory is the teacher's too."""
    structured = [any(isinstance(module, Factored) for module in model.modules()) for model in (student, teacher)]
    if structured == [False, True]:
        raise ValueError(
            "the teacher has structured layers and the student has none: they are swapped; call heal(compressed, dense)"
        )

    def memory(parameter: Tensor) -> tuple[torch.device, int]:
        # Tensors on the meta device all lie at address 0.
        return parameter.device, parameter.untyped_storage().data_ptr() or id(parameter)

    theirs = {memory(parameter): name for name, parameter in teacher.named_parameters()}
    for name, parameter in trained.items():
        if memory(parameter) in theirs:
            raise ValueError(
                f"the student's {name!r} is the teacher's {theirs[memory(parameter)]!r}, and training would change "
                "the teacher; compress copy.deepcopy(teacher), or exclude it by parameters="
            )
    devices = dict.fromkeys(str(p.device) for model in (student, teacher) for p in model.parameters())
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(f"parameters are on {', '.join(devices)}; move student and teacher to one device with memory")


def _optimizer(parameters: list[nn.Parameter], options: HealOptions) -> torch.optim.Optimizer:
    if options.optimizer is None:
        # In float16 the squares of gradients below 2e-4 are 0, and so is 1e-8: eps must keep those steps short.
        limits = [torch.finfo(parameter.dtype) for parameter in parameters]
        eps = max(1e-8, *(math.sqrt(limit.tiny * limit.eps) for limit in limits))
        return torch.optim.AdamW(parameters, lr=options.lr, eps=eps, weight_decay=0.0)
    made = options.optimizer(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer returned {type(made).__name__}; give one such as lambda p: torch.optim.SGD(p, lr=0.1)"
        )
    if not {p for group in made.param_groups for p in group["params"]} <= set(parameters):
        raise ValueError("the optimizer holds parameters that are not trained; give it those it is called with")
    return made
