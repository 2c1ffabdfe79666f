"""/v1/responses: OpenAI's Responses API, with background responses that outlive this replica."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from ray.exceptions import RayError
from starlette.responses import JSONResponse, Response

from elastic_moe.cluster.errors import NotReadyError, RequestError
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest
from elastic_moe.deploy.api.chat import chat_prompt
from elastic_moe.deploy.api.http_io import EventStream, client_name, first_then_rest, unless_gone
from elastic_moe.deploy.api.service import Service, logger
from elastic_moe.deploy.backend.backend import GenerationFailed
from elastic_moe.deploy.bodies.responses import ResponsesRequest, renamed
from elastic_moe.deploy.responses.counting import Counting
from elastic_moe.deploy.responses.events import Event, Item
from elastic_moe.deploy.responses.following import failed
from elastic_moe.deploy.responses.items import input_items, messages
from elastic_moe.deploy.responses.record import Outcome, Record, Status, new_response_id, suffix_of
from elastic_moe.deploy.responses.rendering import Rendering, response_of, sse
from elastic_moe.deploy.web.openapi import described, json_answer, streamable_answer

RESPONSE_ID = re.compile(r"resp_[0-9a-f]{48}")
MOST_ITEMS = 100
"""Most input items that are listed at once; fewer by default."""
USUAL_ITEMS = 20
FIELDS = ("id", "object", "created_at", "status", "model", "output", "usage")
ONE = json_answer("The response.", *FIELDS)
ANSWER = streamable_answer("The response.", *FIELDS)


def responses_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/responses")

    @router.post("", **described(body=ResponsesRequest, answers={200: ANSWER}, errors=(404,)))
    async def create(request: Request) -> Response:
        body = await service.bodies.read(request, ResponsesRequest)
        service.check_model(body.model)
        await service.accept(request)
        if body.background and not service.store.bounds.most:
            raise RequestError("background: this server stores no responses", param="background")
        record = await _new_record(service, body, client_name(request))
        if body.background:
            return await _in_background(service, record, stream=bool(body.stream))
        return await _Direct(service, record, stored=body.stored).respond(request, stream=bool(body.stream))

    @router.get("/{response_id}", **described(answers={200: ANSWER}, errors=(400, 404)))
    async def retrieve(response_id: str, request: Request) -> Response:
        stream = _flag(request, "stream")
        after = _number(request, "starting_after", least=0)
        record = await _find(service, response_id)
        if not stream:
            if after is not None:
                raise RequestError("starting_after: allowed only when stream is true", param="starting_after")
            return _json(shown(record))
        if not record.background:
            raise RequestError("stream: only background responses can be streamed again", param="stream")
        service.following.check_ours(record)
        service.requests.begin(request.scope)
        return _events(service, record, -1 if after is None else after)

    deleted = json_answer("What was deleted.", "id", "object", "deleted")

    @router.delete("/{response_id}", **described(answers={200: deleted}, errors=(404,)))
    async def delete(response_id: str, request: Request) -> Response:
        record = await _find(service, response_id)
        if record.outcome is None:
            service.following.check_ours(record)
            await unless_gone(request, service.following.cancel(record))
        await service.store.delete(record.id)
        return JSONResponse({"id": record.id, "object": "response", "deleted": True})

    @router.post("/{response_id}/cancel", **described(answers={200: ONE}, errors=(400, 404)))
    async def cancel(response_id: str, request: Request) -> Response:
        record = await _find(service, response_id)
        if not record.background:
            raise RequestError("only responses that were created with background can be cancelled", param="response_id")
        if record.outcome is None:
            service.following.check_ours(record)
            record = await unless_gone(request, service.following.cancel(record))
        return _json(shown(record))

    listed = json_answer("The items of the request.", "object", "data", "first_id", "last_id", "has_more")

    @router.get("/{response_id}/input_items", **described(answers={200: listed}, errors=(400, 404)))
    async def items(response_id: str, request: Request) -> Response:
        record = await _find(service, response_id)
        return JSONResponse(_page(record.input, request))

    return router


# --- A new response -------------------------------------------------------------------------------------------------


async def _new_record(service: Service, body: ResponsesRequest, client: str) -> Record:
    """Raises RequestError for a fault in the body, in the names of a response's fields."""
    response_id = new_response_id()
    own = input_items(body.input, suffix_of(response_id))
    history = await _history(service, body.previous_response_id)
    chat = body.chat(messages([*history, *own], body.instructions))
    service.check_room(client, chat)
    try:
        prompt = await chat_prompt(service, chat)
        answers = await service.answers(chat, [prompt], response_id=response_id, client=client)
    except RequestError as error:
        raise renamed(error) from None
    request = dataclasses.replace(answers[0].request, lasting=bool(body.background))
    return Record(
        id=response_id,
        created_at_s=int(time.time()),
        background=bool(body.background),
        frame=_frame(service, body, request),
        input=own,
        history=history,
        chat=chat.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"messages"}),
        request=request,
        generation=service.generation,
    )


async def _history(service: Service, previous: str | None) -> list[Item]:
    """The items of the conversation that the request continues."""
    if previous is None:
        return []
    record = await _stored(service, previous)
    if record is None:
        raise RequestError(
            f"previous_response_id: there is no response with the id {previous[:100]!r}",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    if record.outcome is None:
        raise RequestError(
            f"previous_response_id: response {previous!r} has not ended yet",
            param="previous_response_id",
            code="invalid_value",
        )
    return record.conversation


def _frame(service: Service, body: ResponsesRequest, request: GenerateRequest) -> dict[str, Any]:
    """The fields of OpenAI's object that say what was asked for."""
    given = body.model_dump(mode="json", by_alias=True, exclude_none=True)
    text = given.get("text") or {}
    reasoning = given.get("reasoning") or {}
    choice = body.tool_choice
    return {
        "model": service.model_name,
        "background": bool(body.background),
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "metadata": body.metadata or {},
        "tools": given.get("tools") or [],
        "tool_choice": "auto" if choice is None else given["tool_choice"],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": {**text, "format": text.get("format") or {"type": "text"}},
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "temperature": request.params.temperature,
        "top_p": request.params.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "max_output_tokens": body.max_output_tokens,
        "store": body.stored,
        "truncation": "disabled",
        "service_tier": "default",
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
    }


async def _in_background(service: Service, record: Record, *, stream: bool) -> Response:
    taken = service.places.take(record.request.client, 1)
    try:
        await service.following.accept(record, began=taken.give_back)
    except BaseException:
        taken.give_back()
        raise
    if stream:
        return _events(service, record, -1)
    return _json(response_of(record, Status.QUEUED))


class _Direct:
    """A response that ends with its connection, as a chat completion does."""

    def __init__(self, service: Service, record: Record, *, stored: bool) -> None:
        self._service = service
        self._record = record
        self._stored = stored and service.store.bounds.most > 0

    async def respond(self, request: Request, *, stream: bool) -> Response:
        """Raises ClientGone where the client hangs up before there is anything to send."""
        rendering = await self._service.rendering(self._record)
        events = self._run(rendering)
        try:
            if stream:
                # an error before the first token becomes an HTTP status, not an event
                return EventStream(_encoded(await unless_gone(request, first_then_rest(events))))
            await unless_gone(request, _exhaust(events))
        except RequestError as error:
            raise renamed(error) from None
        assert rendering.ending is not None
        if rendering.ending.reason is FinishReason.ERROR:
            raise GenerationFailed(rendering.ending.error or "the response has failed")
        return _json(rendering.response())

    async def _run(self, rendering: Rendering) -> AsyncGenerator[Event, None]:
        """The events of the response. Closing the generator aborts it in the engine."""
        service, request = self._service, self._record.request
        taken = service.places.take(request.client, 1)
        counting = Counting(service.metrics, request)
        reason = FinishReason.ABORT
        outputs = service.backend.engine.generate(request)
        begun = False
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    taken.give_back()
                    events = [*([] if begun else rendering.begin()), *rendering.feed(output)]
                    begun = True
                    counting.came(output, rendering.tokens, service.backend.engine.group_of(request.request_id))
                    if rendering.ending is not None:
                        reason = rendering.ending.reason
                        await self._keep(rendering)
                    for event in events:
                        yield event
                    if rendering.ending is not None:
                        return
        except (NotReadyError, GenerationFailed) as error:
            reason = FinishReason.ERROR
            if not begun:
                raise
            for event in rendering.feed(failed(request.request_id, str(error))):
                yield event
        finally:
            taken.give_back()
            counting.ended(reason)

    async def _keep(self, rendering: Rendering) -> None:
        """Store the response before its end is sent: the client may continue the conversation at another replica."""
        if not self._stored or rendering.ending is None:
            return
        outcome = Outcome(
            token_ids=(),
            ending=rendering.ending,
            cached_tokens=0,
            ended_at_s=time.time(),
            response=rendering.response(),
        )
        # the prompt is in the items; its tokens are needed only to render again
        request = dataclasses.replace(self._record.request, prompt_token_ids=())
        try:
            await self._service.store.finish(dataclasses.replace(self._record, outcome=outcome, request=request))
        except RayError as error:
            logger.warning("response %s is not stored: %s", self._record.id, type(error).__name__)


# --- Stored responses -----------------------------------------------------------------------------------------------


def shown(record: Record) -> dict[str, Any]:
    """OpenAI's object of a stored response."""
    return response_of(record, Status.IN_PROGRESS) if record.outcome is None else record.outcome.response


async def _find(service: Service, response_id: str) -> Record:
    record = await _stored(service, response_id)
    if record is None:
        raise RequestError(
            f"there is no response with the id {response_id[:100]!r}",
            param="response_id",
            code="response_not_found",
            status=404,
        )
    return record


async def _stored(service: Service, response_id: str) -> Record | None:
    if RESPONSE_ID.fullmatch(response_id) is None:
        return None
    try:
        return await service.store.find(response_id)
    except RayError:
        raise NotReadyError("stored responses cannot be read at the moment") from None


def _page(items: Sequence[Item], request: Request) -> dict[str, Any]:
    """Some of the items, as the query asks for them: newest first unless it says otherwise."""
    limit = _number(request, "limit", least=1) or USUAL_ITEMS
    if limit > MOST_ITEMS:
        raise RequestError(f"limit: expected at most {MOST_ITEMS}, got {limit}", param="limit")
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError("order: expected asc or desc", param="order")
    ordered = list(items) if order == "asc" else list(reversed(items))
    after = request.query_params.get("after")
    ids = [item["id"] for item in ordered]
    if after is not None and after not in ids:
        raise RequestError("after: no input item has this id", param="after")
    begin = 0 if after is None else ids.index(after) + 1
    page = ordered[begin : begin + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": begin + limit < len(ordered),
    }


# --- HTTP -----------------------------------------------------------------------------------------------------------


def _json(value: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _events(service: Service, record: Record, after: int) -> Response:
    return EventStream(_encoded(service.following.events(record, after)))


async def _encoded(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(events):
        async for event in events:
            yield sse(event)


async def _exhaust(events: AsyncGenerator[Event, None]) -> None:
    async with contextlib.aclosing(events):
        async for _ in events:
            pass


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "false")
    if value not in ("true", "false"):
        raise RequestError(f"{name}: expected true or false", param=name)
    return value == "true"


def _number(request: Request, name: str, *, least: int) -> int | None:
    value = request.query_params.get(name)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) < 12) or int(value) < least:
        raise RequestError(f"{name}: expected an integer of at least {least}", param=name)
    return int(value)
