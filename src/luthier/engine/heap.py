"""Where tensors lie while training: freed memory is kept for the next tensor, and given back when asked.

Sources: `heap.cpp` beside this file, through torch's own `SetCPUAllocator`; glibc's `mallopt` and
`malloc_trim`. Given back to the kernel after each use, every large tensor would be touched for the first
time again, page by page: a fifth of a step. Kept by glibc, rooms do not fit again what left them: a step
holds 15 % more than its tensors, or four times as much where layers are computed again (decision 15).

It does not know GPUs, nor what was allocated before it was there.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from luthier.engine import memory, native
from luthier.errors import TrainError

SOURCE = Path(__file__).with_name("heap.cpp")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


@cache
def hold() -> bool:
    """From now on keep freed memory for the next tensor. True if in a heap of our own, where it is whole
    again; false if in glibc's, where there is no C++ compiler, no headers of torch or no room for addresses.
    """
    library = _library()
    if library is not None and library.hold(ctypes.c_long(2 * memory.machine()[0])):
        return True
    hold_glibc()
    return False


def hold_glibc() -> None:
    """The same in glibc's heap, where a tensor seldom fits into what one of its size has left."""
    with suppress(OSError, AttributeError):
        glibc = ctypes.CDLL(None)
        glibc.mallopt(_M_MMAP_MAX, 0)
        glibc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        glibc.mallopt(_M_TOP_PAD, 64 * 2**20)


@cache
def _library() -> ctypes.CDLL | None:
    if not native.can_compile():
        return None
    torch_ = Path(torch.__file__).parent
    try:
        library = native.build(SOURCE, f"-I{torch_ / 'include'}", f"-L{torch_ / 'lib'}", "-lc10")
    except (TrainError, OSError):
        return None
    library.hold.restype = ctypes.c_bool
    return library


def release() -> None:
    """Give back what is no longer used, so that what follows starts from a clean heap."""
    gc.collect()
    trim()


def trim() -> None:
    """Give freed memory back to the kernel now, held or not."""
    if (library := _library()) is not None:
        library.trim()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
