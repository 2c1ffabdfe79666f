"""The output items of a response and the events that tell of them, in OpenAI's order. Pure.

What comes in are pieces of text, of reasoning and of calls; equal pieces make equal events with equal numbers and ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Event = dict[str, Any]
Item = dict[str, Any]
Logprob = dict[str, Any]


class Output:
    """The items of one response, one after the other: an item ends where another one begins."""

    def __init__(self, suffix: str) -> None:
        """`suffix`: what the ids of the items are made of."""
        self._suffix = suffix
        self.items: list[Item] = []
        self._open: Item | None = None
        self._logprobs: list[Logprob] = []

    # --- Pieces -------------------------------------------------------------------------------------------------

    def text(self, delta: str, logprobs: Sequence[Logprob] = ()) -> list[Event]:
        events = self._begin("message")
        item = self._last()
        item["content"][0]["text"] += delta
        self._logprobs += logprobs
        event = {"content_index": 0, "delta": delta, "logprobs": list(logprobs)}
        return [*events, self._event("output_text.delta", event)]

    def reasoning(self, delta: str) -> list[Event]:
        events = self._begin("reasoning")
        item = self._last()
        item["content"][0]["text"] += delta
        return [*events, self._event("reasoning_text.delta", {"content_index": 0, "delta": delta})]

    def call(self, name: str, call_id: str) -> list[Event]:
        """A function call begins."""
        return [*self.close(), *self._begin("function_call", name=name, call_id=call_id)]

    def arguments(self, delta: str) -> list[Event]:
        """More of the arguments of the call that has begun last."""
        item = self._last()
        assert item["type"] == "function_call"
        item["arguments"] += delta
        return [self._event("function_call_arguments.delta", {"delta": delta})]

    def close(self, *, complete: bool = True) -> list[Event]:
        """The item that is under way ends. `complete`: whether it is whole."""
        item = self._open
        if item is None:
            return []
        item["status"] = "completed" if complete else "incomplete"
        match item["type"]:
            case "message":
                events = self._end_of_part("output_text", {"logprobs": self._logprobs})
                item["content"][0]["logprobs"] = self._logprobs
                self._logprobs = []
            case "reasoning":
                events = self._end_of_part("reasoning_text", {})
            case _:
                done = {"name": item["name"], "arguments": item["arguments"]}
                events = [self._event("function_call_arguments.done", done)]
        self._open = None
        return [*events, self._item_event("output_item.done", item)]

    # --- Inside -------------------------------------------------------------------------------------------------

    def _begin(self, kind: str, name: str = "", call_id: str = "") -> list[Event]:
        """Begin an item of this kind, unless one is under way."""
        if self._open is not None and self._open["type"] == kind:
            return []
        events = self.close()
        number = f"{self._suffix}{len(self.items):04x}"
        added: list[Event] = []
        match kind:
            case "message":
                item: Item = {"id": f"msg_{number}", "type": kind, "status": "in_progress", "role": "assistant"}
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            case "reasoning":
                item = {"id": f"rs_{number}", "type": kind, "status": "in_progress", "summary": []}
                part = {"type": "reasoning_text", "text": ""}
            case _:
                item = {"id": f"fc_{number}", "type": kind, "status": "in_progress", "call_id": call_id}
                item |= {"name": name, "arguments": ""}
                part = {}
        self._open = item
        self.items.append(item)
        if part:
            item["content"] = []
            added.append(self._item_event("output_item.added", item))
            item["content"] = [part]
            added.append(self._event("content_part.added", {"content_index": 0, "part": dict(part)}))
        else:
            added.append(self._item_event("output_item.added", item))
        return [*events, *added]

    def _end_of_part(self, kind: str, more: dict[str, Any]) -> list[Event]:
        part = self._last()["content"][0]
        return [
            self._event(f"{kind}.done", {"content_index": 0, "text": part["text"], **more}),
            self._event("content_part.done", {"content_index": 0, "part": {**part, **more}}),
        ]

    def _last(self) -> Item:
        assert self._open is not None
        return self._open

    def _event(self, kind: str, fields: dict[str, Any]) -> Event:
        where = {"item_id": self._last()["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{kind}", **where, **fields}

    def _item_event(self, kind: str, item: Item) -> Event:
        return {"type": f"response.{kind}", "output_index": len(self.items) - 1, "item": snapshot(item)}


def snapshot(item: Item) -> Item:
    """A copy that does not change when the item does."""
    copy = dict(item)
    if "content" in copy:
        copy["content"] = [dict(part) for part in copy["content"]]
    return copy
