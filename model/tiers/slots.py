"""Memory in which one expert lies as in its record. It begins at a page, so that direct reads can go straight to it."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_moe.model.native.memory import allocate
from elastic_moe.model.record_layout import PAGE


class Slot:
    """One piece of the host's memory. Its memory is released when the object is garbage."""

    __slots__ = ("_release", "data")

    def __init__(self, nbytes: int) -> None:
        assert nbytes % PAGE == 0
        # steps make slots, and readers write into them
        with torch.inference_mode(False):
            raw, self._release = allocate(nbytes)
            if raw.data_ptr() % PAGE:
                raw = torch.empty(nbytes + PAGE, dtype=torch.uint8)
                begin = -raw.data_ptr() % PAGE
                raw = raw[begin : begin + nbytes]
        self.data: Tensor = raw
        """[nbytes] of uint8."""

    def __del__(self) -> None:
        self._release()
