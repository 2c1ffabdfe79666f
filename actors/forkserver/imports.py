"""Imports what a worker needs to load a model, torch among it. Processes that call nothing here do not wait for it."""

from __future__ import annotations

import os

from elastic_moe.cluster.interpreter import no_collection


def import_model() -> None:
    """Import the model's code. The first call takes two to four seconds."""
    # before OpenMP is loaded, with torch: threads that wait for the next parallel region leave their core to the node's
    # other workers soon (about 0.1 ms), instead of after some milliseconds
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    with no_collection():
        import elastic_moe.model.worker.data_plane  # noqa: F401
