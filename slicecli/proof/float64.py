"""Running models of transformers in float64 throughout.

Most norms, and some softmaxes, compute in float32 whatever the model's dtype, which hides differences below 1e-7. To
prove that two models compute the same, every such narrowing is left out while the models run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["Float64Throughout"]


class Float64Throughout(TorchFunctionMode):
    """While it is active, float64 tensors stay float64 where a model asks for float32.

    Example:
        >>> with Float64Throughout():
        ...     torch.ones(1, dtype=torch.float64).float().dtype
        torch.float64
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, or answer for it where it would narrow."""
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.dtype == torch.float64:
            if func is torch.Tensor.float:
                return first
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        return func(*args, **kwargs)
