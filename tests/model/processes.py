"""Processes of tests that need torch. They are forked from one that has imported it, so that each starts at once."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

IMPORTED = ["pytest", "hypothesis", "elastic_moe.model.worker.data_plane"]


def processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context
