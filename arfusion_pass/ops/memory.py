"""Where a call's tensors lie in memory: rows at one distance, and which tensors may overlap.

``kernels/binding.cpp`` decides the same for CUDA tensors; ``tests/runtime/test_binding.py`` compares the two.
"""

from __future__ import annotations

import dataclasses

import torch


def row_pitch(tensor: torch.Tensor) -> int | None:
    """Elements from one row of ``[..., H]`` to the next: ``H`` where the tensor is contiguous or holds one row.

    None where rows are not contiguous in themselves, lie at several distances, or at less than ``H``: an expanded
    tensor's rows are one, and a kernel that takes rows apart would read past it.
    """
    if tensor.is_contiguous():
        return tensor.shape[-1]
    if tensor.dim() < 2 or tensor.stride(-1) != 1:
        return None
    pitch, expected = 0, 0
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if pitch == 0:
            pitch = stride
            if pitch < tensor.shape[-1]:
                return None
        elif stride != expected:
            return None
        expected = stride * size
    return pitch or tensor.shape[-1]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Memory as rows of ``width`` bytes that begin ``pitch`` bytes apart; a contiguous tensor may be one row."""

    start: int
    width: int
    pitch: int
    count: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Rows:
        """``[..., H]`` whose rows have a :func:`row_pitch`."""
        hidden, pitch = tensor.shape[-1], row_pitch(tensor)
        assert pitch is not None
        count = tensor.numel() // hidden if hidden else 0
        return cls(tensor.data_ptr(), hidden * tensor.itemsize, pitch * tensor.itemsize, count)

    @classmethod
    def span(cls, tensor: torch.Tensor) -> Rows:
        """All from the first byte of ``tensor`` to its last, as one row."""
        if tensor.numel() == 0:
            return cls(tensor.data_ptr(), 0, 0, 0)
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(tensor.data_ptr(), (last + 1) * tensor.itemsize, 0, 1)

    def overlaps(self, start: int, end: int) -> bool:
        """Whether a byte of ``[start, end)`` is one of these."""
        if self.count == 0 or start >= end:
            return False
        whole = self.start + (self.count - 1) * self.pitch + self.width
        if end <= self.start or start >= whole:
            return False
        if start < self.start or self.count == 1:
            return True
        row, offset = divmod(start - self.start, self.pitch)
        return offset < self.width or end > self.start + (row + 1) * self.pitch

    def coincides(self, other: Rows) -> bool:
        """Whether each row is the other's row of that number, byte for byte."""
        return (self.start, self.width, self.pitch, self.count) == (other.start, other.width, other.pitch, other.count)


def within_storage(tensor: torch.Tensor) -> bool:
    """Whether all of ``tensor`` lies in its storage, which may have been freed or made smaller since it was made."""
    end = tensor.storage_offset() * tensor.itemsize + Rows.span(tensor).width
    return tensor.numel() == 0 or end <= tensor.untyped_storage().nbytes()
