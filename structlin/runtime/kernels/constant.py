"""Mark functions that torch.compile shall call, not trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """Have torch.compile call a function while it traces, and take the result for a constant.

    This is `torch.compiler.assume_constant_result` without its import of the whole compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
