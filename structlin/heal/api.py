"""heal: distil a model into its compressed copy with an ordinary optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structlin.heal.data import Forward, progress_bar
from structlin.heal.data import run as run_model
from structlin.heal.losses import distillation_loss
from structlin.heal.objective import Loss, Objective, find_blocks, recording
from structlin.heal.report import HealReport
from structlin.heal.run import Limits, Run
from structlin.heal.stream import Stream
from structlin.layers.linear import StructuredLinear

PROBE = 4  # training batches that stand for validation where there is none

Parameters = str | Callable[[str, nn.Parameter], bool]


def heal(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    mode: str = "end",
    blocks: Sequence[str] | str | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    epochs: int | None = None,
    lr: float = 1e-3,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    parameters: Parameters = "all",
    validation: Iterable[Any] | None = None,
    every: int = 50,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    clip: float | None = 1.0,
    progress: bool | None = None,
) -> HealReport:
    """Train a compressed model, in place, towards the model it was made from.

    No labels are needed: the loss compares what both models make of the same batch. Both run in eval mode, so that
    dropout is off and running statistics stay as they are. Training flags, `requires_grad` and gradients are restored
    at the end, also after an error. The result depends only on the arguments and the state of torch's generators,
    unless time decides.

    Args:
        student: the model that learns; it may share parameters with the teacher only where they are not trained.
        teacher: the model that it learns from; it is not changed.
        batches: a batch is a mapping (called `model(**batch)`), a tuple or list (`model(*batch)`) or a tensor; its
            tensors are moved to the student's device, where the teacher must be too. Iterated again and again, as a
            list or a DataLoader can be; an iterator ends the training when it runs out.
        mode: "end" compares the outputs; "blocks" compares the outputs of the named modules, each in its place in its
            model: the mean over the blocks of |student - teacher|^2 / |teacher|^2.
        blocks: for mode="blocks", globs on dotted names such as "encoder.layer.*"; `*` matches dots too, but of a
            glob's matches within one another only the outermost counts.
        loss: a function of (student's output, teacher's output, batch); in mode="blocks" it is added to the blocks'.
            None compares `logits` by KL(teacher || student), the mean over positions with the classes in the last axis;
            else `last_hidden_state`, or the output's first float tensor, by their relative squared error. Positions
            outside the batch's `attention_mask` do not count.
        forward: a function of (model, batch) that returns the output, where a batch is not what the model takes.
        steps: optimizer steps at most. Of steps, seconds and epochs give at least one; whichever comes first ends.
        seconds: time at most, measurements included. Given alone it is the measure of the schedule, and runs differ.
        epochs: passes over the batches at most.
        lr: peak learning rate of the default optimizer: linear warm-up over 5 %, then half a cosine to 0.
        optimizer: a function of the list of parameters that returns an optimizer in place of AdamW without weight
            decay, whose `step` needs no closure. Its learning rates are the peaks of the same schedule.
        parameters: "all"; "factors" for the parameters of structured layers, of norms, and biases; or a predicate of
            (name, parameter). What the caller froze is not trained.
        validation: held-back batches. Their mean loss is measured at the start, every `every` steps and at the end, and
            the student gets the weights of the lowest: it is never worse there than it was.
        every: steps between measurements and checkpoints.
        patience: measurements in a row without improvement on `validation` that end the training.
        checkpoint: a file, written every `every` steps and at the end, in place of the older one at once. If it exists
            the run resumes from it: on the CPU to the last bit as if uninterrupted, where batches and student are built
            as they were then. The batches consumed until then are read again and skipped, all passes, with the states
            of torch's generators that they were read with. `steps`, `lr` and the like may be changed; the optimizer's
            other options are those of the file. It stays when the run is done.
        clip: largest norm of the gradient, None for any.
        progress: show a progress bar on stderr (needs tqdm); None shows it on a terminal.
    Returns:
        The report: steps, time, loss before and after, history.
    Raises:
        ValueError: if an argument or the checkpoint is bad; the student is unchanged.
        TypeError: if a batch, an output or what a function returns is of the wrong kind.
        RuntimeError: if a loss or gradient is not finite; the student has the best weights so far: those of the lowest
            validation loss or, without validation, of the lowest mean training loss.
    Source: Hinton, Vinyals & Dean 2015; the blocks as the hidden-state loss of TinyBERT (Jiao et al. 2020), relative
        and without a learned map.
    Example:
        >>> teacher = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16))
        >>> student = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16))
        >>> report = heal(student, teacher, [torch.randn(32, 8) for _ in range(10)], steps=20, lr=1e-2)
        >>> report.stopped, report.loss_after < report.loss_before
        ('steps', True)
    """
    _check_kinds(batches, validation, mode, blocks, parameters, patience)
    counts = {"steps": steps, "epochs": epochs, "every": every, "patience": patience}
    _check_numbers(counts, {"seconds": seconds, "lr": lr, "clip": clip})
    limits = Limits(
        steps, seconds, _schedule(batches, steps, seconds, epochs), every, patience, math.inf if clip is None else clip
    )
    trained = _select(student, parameters)
    device = _check_pair(student, teacher, trained)
    names = find_blocks(student, teacher, blocks) if blocks is not None else ()
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists() and not path.is_file():
        raise ValueError(f"checkpoint={str(path)!r} is not a file; name a file, such as {str(path / 'heal')!r}")
    if isinstance(validation, Iterator):
        validation = list(validation)
    used = _optimizer(list(trained.values()), optimizer, lr)
    stream = Stream(batches, epochs, PROBE if validation is None else 0, device)
    about = {
        "mode": mode,
        "blocks": list(names),
        "device": device.type,
        "validated": validation is not None,
        "number of trained tensors": len(trained),
    }
    with ExitStack() as stack:
        stack.enter_context(_settings(student, teacher, trained))
        found, expected = (stack.enter_context(recording(model, names)) for model in (student, teacher))
        default = None if mode == "blocks" else distillation_loss
        run = Run(
            Objective(student, teacher, device, loss or default, forward or run_model, found, expected),
            used, trained, stream, validation, limits, path, about,
        )  # fmt: skip
        stack.enter_context(torch.enable_grad())
        return run.run(stack.enter_context(progress_bar("heal", "step", limits.length, progress)))


# What the caller gives -----------------------------------------------------------------------------------------------


def _check_kinds(
    batches: Any, validation: Any, mode: str, blocks: Any, parameters: Parameters, patience: int | None
) -> None:
    for name, value in (("batches", batches), ("validation", validation)):
        if isinstance(value, Tensor | Mapping | str) or not (value is None or isinstance(value, Iterable)):
            raise TypeError(f"{name} is a {type(value).__name__}; give an iterable of batches, for one batch [batch]")
    if batches is None:
        raise TypeError("batches is None; give an iterable of batches")
    if mode not in ("end", "blocks"):
        raise ValueError(f'mode={mode!r}; use "end" or "blocks"')
    if (mode == "blocks") != (blocks is not None):
        raise ValueError(f'mode={mode!r} with blocks={blocks!r}; give mode="blocks" and blocks= together')
    if not callable(parameters) and parameters not in ("all", "factors"):
        raise ValueError(f'parameters={parameters!r}; use "all", "factors" or a predicate of (name, parameter)')
    if patience is not None and validation is None:
        raise ValueError(f"patience={patience} counts measurements on validation; give validation= too")


def _check_numbers(counts: Mapping[str, int | None], amounts: Mapping[str, float | None]) -> None:
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"{name}={count}; whole numbers from 1, or None, are allowed")
    for name, amount in amounts.items():
        if amount is not None and not 0 < amount < math.inf:
            raise ValueError(f"{name}={amount}; give a positive finite number")
    if counts["every"] is None:
        raise ValueError("every=None; give the number of steps between measurements")


def _schedule(batches: Iterable[Any], steps: int | None, seconds: float | None, epochs: int | None) -> int | None:
    """Return the steps that the learning rate is spread over, None where time is the measure."""
    try:
        length = len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader over an IterableDataset
        length = None
    known = [] if steps is None else [steps]
    if epochs is not None and length is not None:
        known.append(epochs * length)
    if known or seconds is not None:
        return max(min(known), 1) if known else None
    if epochs is None:
        raise ValueError("nothing ends the training; give steps=, seconds= or epochs=")
    raise ValueError(f"epochs={epochs} needs batches with a length, such as a list; give steps= or seconds= too")


def _select(student: nn.Module, parameters: Parameters) -> dict[str, nn.Parameter]:
    """Choose the parameters to train among those that are not frozen."""
    if parameters == "factors":
        chosen = {
            id(parameter)
            for module in student.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if isinstance(module, StructuredLinear) or "norm" in type(module).__name__.lower() or name.endswith("bias")
        }
    else:
        chosen = {
            id(parameter)
            for name, parameter in student.named_parameters()
            if not callable(parameters) or parameters(name, parameter)
        }
    trained = {name: p for name, p in student.named_parameters() if id(p) in chosen and p.requires_grad}
    if not trained:
        raise ValueError(
            f"no parameter to train: parameters={parameters!r} chooses {len(chosen)}, all frozen; "
            "choose others, or call student.requires_grad_(True)"
        )
    return trained


def _check_pair(student: nn.Module, teacher: nn.Module, trained: Mapping[str, nn.Parameter]) -> torch.device:
    """Return the device; refuse models on two devices, and training what is the teacher's too."""
    theirs = {_memory(parameter): name for name, parameter in teacher.named_parameters()}
    for name, parameter in trained.items():
        if _memory(parameter) in theirs:
            raise ValueError(
                f"the student's {name!r} is the teacher's {theirs[_memory(parameter)]!r}, and training would change "
                "the teacher; compress copy.deepcopy(teacher), or leave it out of parameters="
            )
    devices = dict.fromkeys(p.device for model in (student, teacher) for p in model.parameters())
    if len(devices) > 1 or torch.device("meta") in devices:
        raise ValueError(
            f"parameters are on {', '.join(map(str, devices))}; move student and teacher to one device with memory"
        )
    return next(iter(devices))


def _memory(parameter: Tensor) -> tuple[torch.device, int]:
    return parameter.device, parameter.untyped_storage().data_ptr() or id(parameter)


def _optimizer(
    parameters: list[nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None, lr: float
) -> torch.optim.Optimizer:
    if make is None:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    made = make(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer returned {type(made).__name__}; it is a function of the parameters that returns a "
            "torch.optim.Optimizer, such as lambda p: torch.optim.SGD(p, lr=0.1)"
        )
    ours = set(map(id, parameters))
    if any(id(parameter) not in ours for group in made.param_groups for parameter in group["params"]):
        raise ValueError("the optimizer holds parameters that are not trained; give it those it is called with")
    return made


# Around the training -------------------------------------------------------------------------------------------------


@contextmanager
def _settings(student: nn.Module, teacher: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Set eval mode and what needs gradients, and put all of it back at the end."""
    flags = {module: module.training for model in (student, teacher) for module in model.modules()}
    gradients = {parameter: (parameter.requires_grad, parameter.grad) for parameter in student.parameters()}
    chosen = set(map(id, trained.values()))
    try:
        student.eval()
        teacher.eval()
        for parameter in gradients:
            parameter.requires_grad_(id(parameter) in chosen)
            parameter.grad = None
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
        for parameter, (requires_grad, gradient) in gradients.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
