"""Count the memory of a run on torch's meta device, which has shapes and no values."""

import os
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30


def memory_of(device: torch.device) -> int:
    """Return the total memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def empty(*shape: int) -> Tensor:
    """Return a tensor on the meta device."""
    return torch.empty(shape, device="meta")


class FusedAttention(TorchFunctionMode):
    """Replace attention on the meta device by one that keeps what a fused kernel keeps, and never all the weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            rest = (kwargs[name] for name in ("query", "key", "value")[len(args) :])
            return _FusedAttention.apply(*args[:3], *rest)
        return func(*args, **kwargs)


class _FusedAttention(torch.autograd.Function):
    """Keep for the backward pass the inputs, the output and one sum for each row, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class PeakMemory(TorchDispatchMode):
    """Count the bytes of all tensors made while this mode is on, those that autograd makes included.

    `peak` is the maximum at any moment; `total` is the maximum together with the bytes passed to `hold`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.held = self.total = 0
        self._seen: set[int] = set()

    def hold(self, size: int) -> None:
        """Count `size` bytes more (or fewer, if negative) from now on, of memory that no tensor here stands for."""
        self.held += size
        self.total = max(self.total, self.now + self.held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {leaf.untyped_storage()._cdata for leaf in inputs}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf, known)
        return result

    def _count(self, tensor: Tensor, known: set[int]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in known or storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        self.hold(0)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
