"""Fields of requests that are ignored: those for which there is a reason, and others, of which the log tells."""

from __future__ import annotations

import logging
from collections.abc import Sequence

logger = logging.getLogger(__name__)

HARMLESS = frozenset(
    {
        # names, of the client's user and of what the client or its router does with the request
        *("user", "safety_identifier", "prompt_cache_key", "metadata", "store", "service_tier", "session_id"),
        # the same tokens come in more events
        "stream_interval",
        # vLLM honours them on other calls, or where it is started for it
        *("routed_experts_prompt_start", "return_token_offsets", "return_mm_kwargs"),
        # text has none
        *("media_io_kwargs", "mm_processor_kwargs"),
    }
)
"""Fields of completions and chats without which the answer is the same."""

MOST_NAMES = 100
"""Names that are told of in all. Whoever sends others on purpose must not fill the log."""
PAUSE_S = 10.0
"""Least seconds between two lines."""
LONGEST = 60
"""Most characters of a name that are shown."""


class UnknownFields:
    """Each name is told of once, by one API process."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._last_s: float | None = None

    def seen(self, names: Sequence[str], path: str, now: float) -> None:
        """A request to `path` had these fields."""
        names = [name[:LONGEST] for name in names if name[:LONGEST] not in self._told]
        if not names or len(self._told) >= MOST_NAMES or (self._last_s is not None and now - self._last_s < PAUSE_S):
            return
        self._last_s = now
        names = names[: MOST_NAMES - len(self._told)]
        self._told.update(names)
        logger.warning("fields of a request to %s are unknown and ignored: %s", path, ", ".join(map(repr, names)))
