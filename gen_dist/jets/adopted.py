"""Tensors that the program makes itself and then writes moving values into, such as `torch.zeros(...)`."""

from __future__ import annotations

import torch
from torch import Tensor

from gen_dist.jets.jet import Jet, UnsupportedOperation
from gen_dist.torch_private import base_of

__all__ = ["Adopted"]


class Adopted:
    """Plain tensors for which jets stand from the first write of a moving value on.

    The jet has memory of its own, so that the plain tensor keeps its contents. All views of a plain tensor, those taken
    before the write too, become views of its jet.
    """

    def __init__(self) -> None:
        self._jets: dict[int, tuple[Tensor, Jet]] = {}  # by address; the tensors stay alive, and so do the addresses

    def __bool__(self) -> bool:
        return bool(self._jets)

    def adopt(self, target: Tensor) -> Jet:
        """Return the jet that stands for the tensor from now on. It does not move yet."""
        if target.layout is not torch.strided:
            raise UnsupportedOperation(f"a write to a tensor of layout {target.layout}", "cannot be followed")
        if not target.numel():
            return Jet(target)
        whole = base_of(target)
        if _address(whole) not in self._jets:
            memory = torch.empty_strided(whole.shape, whole.stride(), dtype=whole.dtype, device=whole.device)
            self._jets[_address(whole)] = whole, Jet(memory.copy_(whole.detach()))
        found = self.find(target)
        assert found is not None
        return found

    def find(self, tensor: Tensor) -> Jet | None:
        """Return the jet that stands for the tensor, or for what it is a view of; None for any other tensor."""
        if tensor.layout is not torch.strided or not tensor.numel():
            return None
        whole, jet = self._jets.get(_address(tensor), (None, None))
        if whole is None or jet is None:
            return None
        if tensor is whole:
            return jet
        if base_of(tensor) is not whole:
            why = "shares memory with a tensor that a moving value was written into"
            raise UnsupportedOperation("a tensor that is no view, but", why)
        size, stride = tensor.size(), tensor.stride()
        of_pairs = whole.is_complex() and not tensor.is_complex()  # by `view_as_real`, `real` or `imag`
        offset = tensor.storage_offset() - whole.storage_offset() * (2 if of_pairs else 1)

        def view(x: Tensor) -> Tensor:
            if x.stride() != jet.value.stride():
                x = torch.empty_strided(x.shape, jet.value.stride(), dtype=x.dtype, device=x.device).copy_(x)
            return (torch.view_as_real(x) if of_pairs else x).as_strided(size, stride, offset)

        return jet.viewed(view(jet.value), view)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
