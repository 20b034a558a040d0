"""Tensors beside pages that may not be accessed: reading outside of one ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor


def guarded(tensor: Tensor, end: bool) -> Tensor:
    """A copy whose last byte (or first, without ``end``) touches a page that may not be accessed."""
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    body = -(-max(size, 1) // page) * page
    memory = mmap.mmap(-1, body + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for fence in (address, address + page + body):
        assert libc.mprotect(ctypes.c_void_p(fence), page, 0) == 0
    offset = page + (body - size if end else 0)
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset) if size else torch.empty(0)
    if size:
        copy = copy.view(tensor.dtype).reshape(tensor.shape)
        copy.copy_(tensor)
    return copy if size else tensor
