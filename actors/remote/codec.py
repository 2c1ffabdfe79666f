"""Messages on sockets: frames of a length, a kind and a dataclass of cluster/messages in msgpack.

They are used where Ray calls would cost too much: a frame takes some 30 us, a call a millisecond on either side.
Reading a message cannot run code, and nothing is decoded before the other side has shown its token.
"""

from __future__ import annotations

import errno
import hmac
import secrets
import socket
import struct
from typing import Any

import msgspec

from elastic_moe.actors.liveness import TCP_KEEP_ALIVE
from elastic_moe.cluster.messages.requests import (
    AbortRequests,
    Adopt,
    Adopted,
    CancelRequests,
    Hello,
    Outputs,
    Refused,
    Submit,
)
from elastic_moe.cluster.messages.steps import CommitEpoch, Done, Failed, ForgetSequences, StepPlan, StepResult

Message = (
    StepPlan
    | StepResult
    | CommitEpoch
    | ForgetSequences
    | Done
    | Failed
    | Hello
    | Submit
    | AbortRequests
    | Refused
    | Outputs
    | CancelRequests
    | Adopt
    | Adopted
)

_KINDS: tuple[type, ...] = Message.__args__
_NUMBERS = {kind: number for number, kind in enumerate(_KINDS)}
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: list[msgspec.msgpack.Decoder[Any]] = [msgspec.msgpack.Decoder(kind) for kind in _KINDS]
_HEAD = struct.Struct("<IB")

TOKEN_BYTES = 32
"""Length of the token that the connecting process sends before the first frame."""
MAX_BYTES = 1 << 28
"""Most bytes of one frame. A longer frame is an error. Memory is taken as bytes arrive, not as announced."""
_PIECE_BYTES = 1 << 16


class WireError(ConnectionError):
    """The received bytes are not one of our messages."""


_NOTHING_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def is_exhausted(error: BaseException) -> bool:
    """Whether the process has no file descriptor left, or the kernel no memory for one."""
    return isinstance(error, OSError) and error.errno in _NOTHING_LEFT


def new_token() -> str:
    return secrets.token_hex(TOKEN_BYTES // 2)


def opens(token: str, shown: bytes) -> bool:
    return hmac.compare_digest(token.encode(), shown)


def encode(message: Message) -> bytes:
    body = _ENCODER.encode(message)
    return _HEAD.pack(len(body), _NUMBERS[type(message)]) + body


def _decode(kind: int, body: bytearray | memoryview) -> Message:
    if kind >= len(_DECODERS):
        raise WireError(f"expected a message kind below {len(_DECODERS)}, got {kind}")
    try:
        message: Message = _DECODERS[kind].decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"a damaged {_KINDS[kind].__name__}: {error}") from None
    return message


def _length(data: bytes | bytearray, at: int = 0) -> tuple[int, int]:
    length, kind = _HEAD.unpack_from(data, at)
    if length > MAX_BYTES:
        raise WireError(f"expected a message of at most {MAX_BYTES} bytes, got one of {length}")
    return length, kind


class Frames:
    """Decodes messages from bytes as they arrive."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Returns the messages that are complete now. Raises WireError."""
        if not self._buffer and len(data) >= _HEAD.size:
            length, kind = _length(data)
            if len(data) == _HEAD.size + length:
                # most often just one message has come, which is not copied
                return [_decode(kind, memoryview(data)[_HEAD.size :])]
        self._buffer += data
        buffer, at = self._buffer, 0
        messages: list[Message] = []
        while len(buffer) - at >= _HEAD.size:
            length, kind = _length(buffer, at)
            begin = at + _HEAD.size
            if len(buffer) < begin + length:
                break
            at = begin + length
            messages.append(_decode(kind, memoryview(buffer)[begin:at]))
        if at:
            # a new one, since a view of the old one may live on, by which it cannot change its size: the loop watch
            # holds the frames of this thread for a moment
            self._buffer = buffer[at:]
        return messages


def receive(connection: socket.socket) -> Message | None:
    """The next message, or None at the end. Blocks. Raises OSError, of which WireError is one."""
    head = receive_exactly(connection, _HEAD.size)
    if head is None:
        return None
    length, kind = _length(head)
    body = receive_exactly(connection, length)
    return None if body is None else _decode(kind, body)


def receive_exactly(connection: socket.socket, size: int) -> bytearray | None:
    """Blocks until `size` bytes have come. Returns None if the connection ends before."""
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(min(size - len(data), _PIECE_BYTES))
        if not piece:
            return None
        data += piece
    return data


def keep_alive(connection: socket.socket) -> None:
    """Have the kernel notice within half a minute that the other machine is gone, and send every message at once."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in TCP_KEEP_ALIVE:
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
