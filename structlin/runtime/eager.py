"""Whether the kernel may run in place of torch: every private name of torch that the package uses stands here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import (
    _AutoDispatchBelowADInplaceOrView,
    _get_function_stack_at,
    _is_any_autocast_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

TENSORS = (Tensor, torch.nn.Parameter)  # exact types: subclasses may compute differently
DTYPES = (torch.float32, torch.bfloat16)  # that the native kernel takes

below_autograd = _AutoDispatchBelowADInplaceOrView  # a context in which operators run without autograd

F = TypeVar("F", bound=Callable[..., Any])


def plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether all are tensors or parameters, none of a subclass."""
    return all(type(tensor) in TENSORS for tensor in tensors)


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor is more than a shape: neither on the meta device nor made under FakeTensorMode."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def suits(tensors: Sequence[Tensor]) -> bool:
    """Return whether the native kernel takes these plain tensors: on the CPU, all of one dtype of DTYPES."""
    dtype = tensors[0].dtype
    return dtype in DTYPES and all(tensor.dtype is dtype and tensor.is_cpu for tensor in tensors)


def unobserved() -> bool:
    """Return whether nothing intercepts operations on tensors: no mode, transform, tracer or autocast.

    `unobserved` in kernels/calls.cpp asks the same in C++; change both together.
    """
    return (
        not _is_any_autocast_enabled()
        and _len_torch_dispatch_stack() == 0  # modes for operators, such as FakeTensorMode
        and not transformed()
        and forward_ad._current_level < 0
        and not _is_tracing()  # torch.jit.trace
        and (_len_torch_function_stack() == 0 or _only_devices())
    )


def transformed() -> bool:
    """Return whether a transform of torch.func runs: vmap, grad, jvp."""
    return peek_interpreter_stack() is not None


def undispatched() -> bool:
    """Return whether no mode intercepts operators: what is computed under FakeTensorMode must not be kept."""
    return bool(_len_torch_dispatch_stack() == 0)


def _only_devices() -> bool:
    """Return whether all modes for functions are torch.set_default_device's, which changes nothing here."""
    return all(type(_get_function_stack_at(k)) is DeviceContext for k in range(_len_torch_function_stack()))


def constant(function: F) -> F:
    """Make torch.compile call a function while it traces and treat the result as a constant.

    This is `torch.compiler.assume_constant_result` without its import of the whole compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
