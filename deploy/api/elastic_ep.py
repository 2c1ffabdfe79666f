"""The scaling calls of vLLM and SGLang, so that tools which scale those servers can scale this one.

Unlike those servers, this one refuses no request while it scales. Their data-parallel or expert-parallel size is our
number of workers, in each group where there are several.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request

from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.cluster.errors import EmoeError, NotReadyError, RequestError
from elastic_moe.cluster.facts.operations import ENDED, new_operation_id
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.messages.views import Operation, OperationKind, Phase
from elastic_moe.deploy.api.http_io import naming
from elastic_moe.deploy.api.service import Service
from elastic_moe.deploy.backend.backend import Group
from elastic_moe.deploy.bodies.schema import ElasticEpRequest
from elastic_moe.deploy.web.openapi import described, json_answer

LOOK_S = 0.1


def elastic_ep_router(service: Service) -> APIRouter:
    router = APIRouter()
    backend = service.backend

    scaled = {200: json_answer("The server has scaled.", "message")}

    @router.post("/scale_elastic_ep", **described(body=ElasticEpRequest, answers=scaled, errors=(408, 409)))
    async def scale(request: Request) -> dict[str, Any]:
        body = await service.bodies.read(request, ElasticEpRequest)
        size = body.new_data_parallel_size or body.new_ep_size
        if size is None:
            raise RequestError("new_data_parallel_size: this field is required", param="new_data_parallel_size")
        asked = "new_ep_size" if body.new_data_parallel_size is None else "new_data_parallel_size"
        groups = [backend.group(number) for number in range(backend.num_groups)]
        before = len((await groups[0].ask(Coordinator.placement)).placement.workers)
        name = new_operation_id(OperationKind.SCALE)
        operations: dict[int, Operation] = {}
        refusals: dict[int, EmoeError] = {}
        for number, group in enumerate(groups):
            try:
                with naming(workers=asked):
                    operations[number] = await group.ask(Coordinator.scale, size, operation_id=name)
            except EmoeError as error:
                refusals[number] = error
        if refusals:
            raise _partly(size, operations, refusals)
        for number, operation in operations.items():
            await _wait(groups[number], operation, body.drain_timeout)
        if body.new_data_parallel_size is None:
            return {"message": f"Scaled to {counted(size, 'worker')}", "old_ep_size": before, "new_ep_size": size}
        each = f" in each of {len(groups)} groups" if len(groups) > 1 else ""
        return {"message": f"Scaled to {size} data parallel engines{each}"}

    @router.post(
        "/is_scaling_elastic_ep", **described(answers={200: json_answer("Whether it scales.", "is_scaling_elastic_ep")})
    )
    async def is_scaling() -> dict[str, bool]:
        groups = [backend.group(number) for number in range(backend.num_groups)]
        operations = [operation for group in groups for operation in await group.ask(Coordinator.operations)]
        under_way = any(op.kind is OperationKind.SCALE and op.phase not in ENDED for op in operations)
        return {"is_scaling_elastic_ep": under_way}

    return router


def _partly(size: int, operations: Mapping[int, Operation], refusals: Mapping[int, EmoeError]) -> EmoeError:
    """What says which groups scale and which do not."""
    if not operations:
        return next(iter(refusals.values()))
    scaling = ", ".join(map(str, operations))
    refused = "; ".join(f"engine {number} does not: {error}" for number, error in refusals.items())
    return RequestError(
        f"engine {scaling} scales to {counted(size, 'worker')}, and {refused}. POST /admin/scale?engine=N asks one "
        "engine alone",
        code="scaled_in_part",
        status=503,
    )


async def _wait(group: Group, operation: Operation, timeout_s: float) -> None:
    """Wait until the operation has succeeded. Raises RequestError 408 after `timeout_s`; the operation goes on then."""
    deadline = time.monotonic() + timeout_s
    name = operation.operation_id
    while operation.phase not in ENDED:
        if time.monotonic() > deadline:
            raise RequestError(
                f"operation {name} is not done after {timeout_s:g} s, and goes on",
                code="operation_timeout",
                status=408,
            )
        await asyncio.sleep(LOOK_S)
        try:
            found = await group.ask(Coordinator.operation, name)
            operation = found or operation
        except NotReadyError:
            continue  # a new coordinator takes over, and knows the operation
    if operation.phase is Phase.FAILED:
        raise RequestError(f"operation {name} failed: {operation.error}", code="scale_failed", status=500)
