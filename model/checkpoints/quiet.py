"""Keeps transformers' progress bars and load reports off the terminal. Errors are still raised and logged."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

_lock = threading.RLock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """While the block runs, transformers shows no progress bars and logs errors only.

    Only one thread at a time can be in such a block: these switches belong to the whole process, and so do those that
    transformers changes while it builds a model (the default dtype, how weights are initialised).
    """
    with _lock:
        bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()  # type: ignore[no-untyped-call]
