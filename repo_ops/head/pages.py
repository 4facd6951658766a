"""Large memory pages for the head's buffers on a CPU.

A tile of logits and the gradient of a head are new memory in each call, and the first touch of a page is a trip into
the kernel: 27 thousand of them for [49152, 576] in float32 by pages of 4 KiB, 54 by pages of 2 MiB.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

from torch import Tensor

PAGE = 1 << 21
OWN_MAPPING = 1 << 25
"""From this size on glibc gives every allocation a mapping of its own, which takes the advice away with it."""
MADV_HUGEPAGE = 14


def on_large_pages(new: Tensor) -> Tensor:
    """`new`, an uninitialised tensor; Linux is advised to back it by large pages. Other systems, other devices: as is.

    It is advice: where large pages are switched off, or there are none left, the tensor works as before.
    """
    if new.device.type == "cpu" and new.nbytes >= OWN_MAPPING and (advise := _madvise()) is not None:
        start, end = -(-new.data_ptr() // PAGE) * PAGE, (new.data_ptr() + new.nbytes) // PAGE * PAGE
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_HUGEPAGE)
    return new


@cache
def _madvise() -> Any:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
