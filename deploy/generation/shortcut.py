"""The shortcut of streamed tokens: from the engine's message to the connection, in one call.

Most tokens of a stream say nothing but their text. While the task that writes the stream waits for one, with everything
before it written, the token becomes an event here and goes to the connection at once. So no task wakes, and no
generator runs. Everything else goes the long way: first and last outputs, log probabilities, several tokens at once,
and all that comes while the client reads too slowly.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Protocol

import msgspec

from elastic_moe.cluster.messages.requests import TokenOutput
from elastic_moe.deploy.generation.answer import Answer, Delta
from elastic_moe.deploy.generation.progress import Progress

_encode = msgspec.json.Encoder().encode


class Connection(Protocol):
    """The connection to a client that reads a stream."""

    @property
    def takes_more(self) -> bool:
        """Whether the client is there, and reads fast enough."""
        ...

    def write(self, body: bytes) -> None:
        """Send a part of the stream. Only while `takes_more`."""
        ...


class Shortcut:
    """For a response with one answer. `connection` and `progress` are set by those who open them."""

    def __init__(self, answer: Answer, event: Callable[[Delta], bytes], *, same_frame: bool = True) -> None:
        """`event` makes the event of a delta. same_frame: whether all its events are the same but for their text."""
        self.connection: Connection | None = None
        """There is one from the beginning of the response on, and so from the first token on."""
        self.progress: Progress | None = None
        self.finished = False
        """Whether a stop string, or the end of a call, has ended the answer."""
        self._answer = answer
        self._event = event
        self._frame = _frame(answer.index, event) if same_frame and answer.is_plain else None

    def take(self, token_id: int, group: int) -> bool:
        """Send one token, which came from a group. Returns False where it has to go the long way.

        Raises what `Answer.feed` raises.
        """
        connection, progress = self.connection, self.progress
        if connection is None or progress is None or not connection.takes_more:
            return False
        if self._frame is not None:
            text = self._answer.feed_plain(token_id)
            if text:
                before, after = self._frame
                connection.write(b"%b%b%b" % (before, _encode(text), after))
        else:
            delta = self._answer.feed(self._output(token_id))
            if not delta.empty:
                connection.write(self._event(delta))
            if delta.finish_reason is not None:
                self.finished, progress.reason = True, delta.finish_reason
        progress.next_token(group)
        return True

    def _output(self, token_id: int) -> TokenOutput:
        name, offset = self._answer.request.request_id, self._answer.completion_tokens
        return TokenOutput(request_id=name, offset=offset, token_ids=(token_id,))


def _frame(index: int, event: Callable[[Delta], bytes]) -> tuple[bytes, bytes]:
    """What is before and after the text in every event."""
    text = secrets.token_hex(16)
    before, _, after = event(Delta(index=index, text=text)).partition(_encode(text))
    return before, after
