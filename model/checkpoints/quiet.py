"""Keeps transformers' progress bars and load reports off the terminal. Errors raise, and are logged, as ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

_lock = threading.RLock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without progress bars and without log records below error, for as long as the block runs.

    One thread at a time: these switches belong to the whole process, and so does what transformers changes while it
    builds a model (the default dtype, how weights are initialised).
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
