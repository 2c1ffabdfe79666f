"""/admin: calls that show what the cluster does and why, and calls that change it. Values become JSON here.

Where there are several groups of workers, `?engine=N` says which of them is meant; group 0 if it is not given.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import JSONResponse, Response

from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.actors.liveness import dry_run_timeout_s
from elastic_moe.cluster.errors import NotReadyError, RequestError
from elastic_moe.cluster.facts.operations import new_operation_id
from elastic_moe.cluster.lines import expected_engine
from elastic_moe.cluster.messages.views import (
    Operation,
    OperationKind,
    Readiness,
    RebalancePreview,
    RoutingView,
    WorkerView,
)
from elastic_moe.cluster.placement import Placement, Tier, WorkerId
from elastic_moe.deploy.api.http_io import naming
from elastic_moe.deploy.api.service import Service
from elastic_moe.deploy.backend.backend import LATER, Group
from elastic_moe.deploy.bodies.schema import EnginesRequest, RebalanceRequest, ScaleRequest
from elastic_moe.deploy.web.openapi import described, json_answer

PLACEMENT: dict[str, Any] = {
    "type": "object",
    "title": "Placement",
    "required": ["num_logical_experts", "workers", "physical_to_logical_map"],
    "properties": {
        "num_layers": {"type": ["integer", "null"]},
        "num_logical_experts": {"type": "integer", "minimum": 1},
        "workers": {"type": "array", "items": {"type": "object", "required": ["id", "node", "slots"]}},
        "slot_to_worker": {"type": ["array", "null"], "items": {"type": "integer"}},
        "physical_to_logical_map": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
        "tiers": {
            "type": ["array", "null"],
            "items": {"type": "array", "items": {"enum": [tier.word for tier in Tier]}},
        },
        "pinned": {"type": ["boolean", "null"]},
    },
}
"""The body of PUT /admin/placement: what GET returns."""
OPERATION = json_answer("The operation.", "operation_id", "kind", "phase", "reason")


EngineText = Annotated[str, Query(alias="engine", description="Number of the group's engine, from 0.")]


def engine_number(text: str, groups: int) -> int:
    """The number in `?engine=N`, where there are so many groups. Raises RequestError for another text."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < groups):
        raise RequestError(f"engine: expected {expected_engine(groups)}, got {text[:100]!r}", param="engine")
    return int(text)


def admin_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/admin")

    def asked(engine: EngineText = "0") -> Group:
        return service.backend.group(engine_number(engine, service.backend.num_groups))

    chosen = Depends(asked)

    @router.get("/engines", **described(answers={200: json_answer("The groups of workers.", kind="array")}))
    async def engines() -> list[dict[str, Any]]:
        numbers = range(service.backend.num_groups)
        wanted = service.backend.wanted_groups
        asked = (engine_json(n, service.backend.group(n), retiring=n >= wanted) for n in numbers)
        return [*await asyncio.gather(*asked), *map(later_engine_json, range(len(numbers), wanted))]

    resized = json_answer("The number of groups from now on.", "data_parallel_size", "data_parallel_size_before")

    @router.post("/engines", **described(body=EnginesRequest, answers={202: resized}))
    async def resize(request: Request) -> Response:
        size = (await service.bodies.read(request, EnginesRequest)).data_parallel_size
        before = service.backend.wanted_groups
        with naming("data_parallel_size"):
            await service.backend.resize(size)
        return JSONResponse({"data_parallel_size": size, "data_parallel_size_before": before}, 202)

    @router.get("/placement", **described(answers={200: json_answer("Where the experts are.", *PLACEMENT["required"])}))
    async def placement(group: Group = chosen) -> dict[str, Any]:
        view = await group.ask(Coordinator.placement)
        return {"epoch": view.epoch, "pinned": view.pinned, **view.placement.to_dict()}

    @router.put("/placement", **described(body=PLACEMENT, answers={202: OPERATION}, errors=(409,)))
    async def place(request: Request, group: Group = chosen) -> Response:
        data = await service.bodies.read_json(request)
        if not isinstance(data, dict):
            raise RequestError("the body must be a JSON object in the form of GET /admin/placement")
        pinned = request.query_params.get("pinned", data.get("pinned"))
        pinned = {"true": True, "false": False}.get(pinned, pinned) if isinstance(pinned, str) else pinned
        if not isinstance(pinned, bool | None):
            raise RequestError("pinned: expected true or false", param="pinned")
        with naming(*PLACEMENT["properties"]):
            operation = await group.ask(Coordinator.place, Placement.from_dict(data), pinned)
        return JSONResponse(operation_json(operation), 202)

    @router.delete("/placement/pin", **described(answers={200: json_answer("It is not pinned now.", "pinned")}))
    async def unpin(group: Group = chosen) -> dict[str, Any]:
        await group.ask(Coordinator.unpin)
        return {"pinned": False}

    @router.get("/routing", **described(answers={200: json_answer("Tokens and load.", "tokens", "window_s", "load")}))
    async def routing(group: Group = chosen) -> dict[str, Any]:
        return routing_json(await group.ask(Coordinator.routing))

    @router.get("/workers", **described(answers={200: json_answer("The workers.", kind="array")}))
    async def workers(group: Group = chosen) -> list[dict[str, Any]]:
        return [worker_json(worker) for worker in await group.ask(Coordinator.workers)]

    in_force = json_answer("What is in force.", "generation", "model_name", "model_dir", "device", "settings")

    @router.get("/config", **described(answers={200: in_force}))
    async def config() -> dict[str, Any]:
        return await service.settings()

    @router.get("/operations", **described(answers={200: json_answer("What was done, and why.", kind="array")}))
    async def operations(group: Group = chosen) -> list[dict[str, Any]]:
        return [operation_json(operation) for operation in await group.ask(Coordinator.operations)]

    @router.get("/operations/{operation_id}", **described(answers={200: OPERATION}, errors=(404,)))
    async def operation(operation_id: str, group: Group = chosen) -> dict[str, Any]:
        found = await group.ask(Coordinator.operation, operation_id)
        if found is None:
            raise RequestError(f"there is no operation {operation_id[:100]!r}", param="operation_id",
                               code="operation_not_found", status=404)  # fmt: skip
        return operation_json(found)

    preview = json_answer("What a dry run found.", "planner", "worthwhile", "reason", "moves", "bytes")

    @router.post(
        "/rebalance",
        **described(body=RebalanceRequest, optional=True, answers={200: preview, 202: OPERATION}, errors=(409,)),
    )
    async def rebalance(request: Request, group: Group = chosen) -> Response:
        empty = request.headers.get("content-length") == "0" or "content-type" not in request.headers
        none = empty and not await request.body()
        body = RebalanceRequest() if none else await service.bodies.read(request, RebalanceRequest)
        with naming("planner"):
            if not body.dry_run:
                return JSONResponse(operation_json(await group.ask(Coordinator.rebalance, body.planner)), 202)
            timeout_s = dry_run_timeout_s(service.config.plan_deadline)
            return JSONResponse(preview_json(await group.ask_within(timeout_s, Coordinator.preview, body.planner)))

    @router.get("/scale", **described(answers={200: json_answer("Numbers of workers.", "serving", "target")}))
    async def scaling(group: Group = chosen) -> dict[str, Any]:
        return dataclasses.asdict(await group.ask(Coordinator.scaling))

    @router.post("/scale", **described(body=ScaleRequest, answers={202: OPERATION}, errors=(409,)))
    async def scale(request: Request, group: Group = chosen) -> Response:
        body = await service.bodies.read(request, ScaleRequest)
        if body.workers is None and body.retire is None:
            raise RequestError("workers: expected workers, retire, or both", param="workers")
        retire = tuple(WorkerId(worker) for worker in body.retire or ())
        name = body.operation_id or new_operation_id(OperationKind.SCALE)
        with naming("workers", "retire"):
            operation = await group.ask(Coordinator.scale, body.workers, retire, name, body.replace)
        return JSONResponse(operation_json(operation), 202)

    return router


def operation_json(operation: Operation) -> dict[str, Any]:
    return {**dataclasses.asdict(operation), "phase": operation.phase.value}


async def engine_json(number: int, group: Group, *, retiring: bool) -> dict[str, Any]:
    """A group in a few words. Fields that nobody can tell now are null. `error`: why the group will never serve.
    `retiring`: it gives its requests away."""
    body = _engine_body(number, await group.readiness(), retiring=retiring)
    with contextlib.suppress(NotReadyError):
        scale = await group.ask(Coordinator.scaling)
        body |= {"workers": scale.serving, "target": scale.target}
        status = await group.engine.status()
        usage = max(status.kv_usage.values(), default=0.0)
        body |= {"running": sum(status.running.values()), "waiting": status.waiting, "kv_usage": usage}
    return body


def later_engine_json(number: int) -> dict[str, Any]:
    """A group that has not begun to start."""
    return _engine_body(number, LATER, retiring=False)


def _engine_body(number: int, state: Readiness, *, retiring: bool) -> dict[str, Any]:
    body: dict[str, Any] = {"engine": number, "ready": state.ready, "reason": state.error or state.reason}
    body |= {"error": state.error, "retiring": retiring}
    return body | dict.fromkeys(("workers", "target", "running", "waiting", "kv_usage"))


def preview_json(preview: RebalancePreview) -> dict[str, Any]:
    fields = {field.name: getattr(preview, field.name) for field in dataclasses.fields(preview)}
    placement = preview.placement
    subjects = [dataclasses.asdict(subject) for subject in preview.subjects]
    return fields | {"subjects": subjects, "placement": None if placement is None else placement.to_dict()}


def worker_json(worker: WorkerView) -> dict[str, Any]:
    # the report becomes a list of its rows
    fit = None if worker.fit is None else [dataclasses.asdict(row) for row in worker.fit.rows]
    return dataclasses.asdict(worker) | {"fit": fit}


def routing_json(view: RoutingView) -> dict[str, Any]:
    return {
        "tokens": view.tokens,
        "window_s": view.window_s,
        "load": view.load.tolist(),
        "load_imbalance": list(view.load_imbalance),
        "prefill": {"tokens": view.prefill.tokens, "load": view.prefill.load.tolist()},
        "decode": {"tokens": view.decode.tokens, "load": view.decode.load.tolist(), "weight": view.decode_weight},
    }
