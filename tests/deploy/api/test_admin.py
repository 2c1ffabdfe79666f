"""/admin and /metrics over a fake backend: what is shown, changed and counted, and what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import NotReadyError, PlacementError
from elastic_moe.cluster.messages.requests import RequestId
from elastic_moe.cluster.messages.views import EngineStatus, Phase, WorkerState, WorkerView
from tests.deploy.api.asking import COMPLETION, Call, error
from tests.deploy.conftest import client_of
from tests.deploy.fakes import FakeBackend

# --- Admin and metrics ------------------------------------------------------------------------------------------


def test_admin_views(call: Call) -> None:
    placement = call("GET", "/admin/placement").json()
    assert placement["epoch"] == 1
    assert placement["slot_to_worker"] == [0, 0, 1, 1]
    assert placement["physical_to_logical_map"] == [[0, 1, 2, 3]] * 2
    routing = call("GET", "/admin/routing").json()
    assert routing["load_imbalance"] == [1.0, 1.25]
    assert (routing["prefill"]["tokens"], routing["decode"]["tokens"], routing["decode"]["weight"]) == (5, 5, 3.0)
    worker = call("GET", "/admin/workers").json()[0]
    fields = {"id", "rank", "state", "pid", "node", "device", "running_requests", "kv_usage", "fit"}
    more = {"experts_served", "experts_resident", "address", "link_gbps", "waits_for"}
    assert set(worker) == fields | more
    assert worker["fit"] == [
        {"part": "experts", "modules": "MoE layers", "count": 2, "path": "native", "reason": None},
        {"part": "norms", "modules": "LayerNorm", "count": 3, "path": "transformers", "reason": "it has a bias"},
    ]


def test_what_is_in_force(call: Call) -> None:
    told = call("GET", "/admin/config").json()
    settings = told.pop("settings")
    assert told == {
        "generation": "g", "model_name": "tiny-moe", "model_dir": "/models/tiny-moe", "device": "cpu"
    }  # fmt: skip
    assert settings.keys() == {field.name for field in dataclasses.fields(ServeConfig)}
    assert (settings["workers"], settings["dtype"]) == (3, "auto")
    assert "the cluster's" not in str(settings)


def test_rebalancing(call: Call) -> None:
    started = call("POST", "/admin/rebalance")
    assert started.status_code == 202
    fields = {"operation_id", "kind", "phase", "epoch", "reason", "error", "asked", "retiring", "progress"}
    fields.add("safe_to_terminate")
    assert set(started.json()) == fields
    assert call("GET", "/admin/operations").json()[0]["phase"] == "preparing"
    assert set(call("GET", "/admin/operations/op-1").json()) == fields
    assert error(call("GET", "/admin/operations/op-9"), 404)["code"] == "operation_not_found"
    preview = call("POST", "/admin/rebalance", json={"planner": "greedy", "dry_run": True})
    assert (preview.status_code, preview.json()["moves"]) == (200, 3)
    assert "planner" in error(call("POST", "/admin/rebalance", json={"planner": "magic"}), 400)["message"]
    assert error(call("POST", "/admin/rebalance", json={"dryrun": True}), 400)["param"] == "dryrun"
    busy = call("POST", "/admin/rebalance", json={}, backend=FakeBackend(running_operation="op-7"))
    assert "op-7" in error(busy, 409)["message"]


def test_metrics(model_dir: Path) -> None:
    async def work() -> str:
        async with client_of(FakeBackend(), model_dir) as client:
            await client.post("/v1/completions", json=COMPLETION)
            return (await client.get("/metrics")).text

    text = asyncio.run(work())
    labels = '{engine="0",model_name="tiny-moe"}'
    for line in (
        f"vllm:num_requests_running{labels} 2.0",
        f"vllm:num_requests_waiting{labels} 1.0",
        f"vllm:kv_cache_usage_perc{labels} 0.25",
        f"vllm:num_preemptions_total{labels} 3.0",
        f"vllm:corrupted_requests_total{labels} 5.0",
        f"vllm:prefix_cache_queries_total{labels} 40.0",
        f"vllm:prefix_cache_hits_total{labels} 16.0",
        f"emoe:engine_time_to_first_token_seconds_count{labels} 4.0",
        f"emoe:engine_time_to_first_token_seconds_sum{labels} 0.5",
        f"vllm:prompt_tokens_total{labels} 1.0",
        f"vllm:generation_tokens_total{labels} 3.0",
        f"vllm:time_to_first_token_seconds_count{labels} 1.0",
        f"vllm:inter_token_latency_seconds_count{labels} 2.0",
        f"vllm:e2e_request_latency_seconds_count{labels} 1.0",
        f"vllm:request_prompt_tokens_sum{labels} 1.0",
        f"vllm:request_generation_tokens_sum{labels} 3.0",
        f"vllm:request_params_max_tokens_sum{labels} 3.0",
        f"vllm:request_queue_time_seconds_sum{labels} 0.125",
        f"vllm:request_prefill_time_seconds_count{labels} 1.0",
        f"vllm:request_decode_time_seconds_count{labels} 1.0",
        f"vllm:request_inference_time_seconds_count{labels} 1.0",
        f"vllm:request_time_per_output_token_seconds_count{labels} 1.0",
        'vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny-moe"} 1.0',
        f"emoe:experts_moved_total{labels} 5.0",
        'emoe:workers{engine="0",model_name="tiny-moe",state="serving"} 1.0',
        'emoe:fit_info{engine="0",model_name="tiny-moe",part="experts",path="native"} 1.0',
        'emoe:fit_info{engine="0",model_name="tiny-moe",part="norms",path="transformers"} 1.0',
        'emoe:rebalance_events_total{engine="0",model_name="tiny-moe",result="completed"} 2.0',
    ):
        assert line in text.splitlines()
    for line in (
        'emoe:rebalance_duration_seconds_count{engine="0",model_name="tiny-moe",stage="planning"} 1.0',
        'emoe:rebalance_duration_seconds_sum{engine="0",model_name="tiny-moe",stage="planning"} 0.2',
        'emoe:rebalance_duration_seconds_bucket{engine="0",le="0.25",model_name="tiny-moe",stage="planning"} 1.0',
        'emoe:recoveries_total{cause="worker",engine="0",model_name="tiny-moe"} 1.0',
        f"emoe:recovery_duration_seconds_sum{labels} 0.5",
        f"emoe:requests_resumed_total{labels} 0.0",
        f"emoe:bytes_moved_total{labels} 1000.0",
        f"emoe:workers_target{labels} 2.0",
        f"emoe:experts_resident{labels} 4.0",
        'emoe:expert_accesses_total{engine="0",model_name="tiny-moe",tier="device"} 7.0',
        'emoe:expert_accesses_total{engine="0",model_name="tiny-moe",tier="disk"} 3.0',
        'emoe:expert_fetch_bytes_total{engine="0",from="disk",model_name="tiny-moe"} 300.0',
        'emoe:expert_stall_seconds_total{cause="miss",engine="0",model_name="tiny-moe"} 0.25',
        "emoe:balancedness" + labels + " 0.9",
    ):
        assert line in text.splitlines()


def test_metrics_show_dead_workers_while_there_is_no_engine(model_dir: Path) -> None:
    class Losing(FakeBackend):
        lost = False

        async def status(self) -> EngineStatus:
            if self.lost:
                raise NotReadyError("there is no engine at the moment")
            return await super().status()

        async def workers(self) -> list[WorkerView]:
            state = WorkerState.DEAD if self.lost else WorkerState.SERVING
            return [dataclasses.replace(worker, state=state) for worker in await super().workers()]

    async def work() -> tuple[str, str]:
        async with client_of(backend := Losing(), model_dir) as client:
            before = (await client.get("/metrics")).text
            backend.lost = True
            return before, (await client.get("/metrics")).text

    before, after = asyncio.run(work())
    labels = 'engine="0",model_name="tiny-moe"'
    assert f'emoe:workers{{{labels},state="serving"}} 1.0' in before
    assert f'emoe:workers{{{labels},state="serving"}} 0.0' in after
    assert f'emoe:workers{{{labels},state="dead"}} 1.0' in after
    assert "vllm:num_requests_running" in before
    assert "vllm:num_requests_running" not in after
    assert f"emoe:experts_moved_total{{{labels}}} 5.0" in after


# --- Scaling and given placements -------------------------------------------------------------------------------


class Pair(FakeBackend):
    """Two groups, of which the second one has all requests."""

    num_groups = 2

    def group(self, number: int) -> FakeBackend:
        return self

    def group_of(self, request_id: RequestId) -> int:
        return 1


def test_groups_are_listed_asked_and_counted_by_their_engines(call: Call) -> None:
    engines = call("GET", "/admin/engines", backend=Pair()).json()
    assert [engine["engine"] for engine in engines] == [0, 1]
    assert (engines[1]["ready"], engines[1]["workers"], engines[1]["running"], engines[1]["kv_usage"]) == (
        *(True, 2, 2, 0.25),
    )
    assert call("GET", "/admin/workers?engine=1", backend=Pair()).status_code == 200
    for number in ("1", "-1", "x", "", "9" * 30):
        assert error(call("GET", f"/admin/workers?engine={number}"), 400)["param"] == "engine"


def test_the_number_of_groups_is_changed_by_a_call(call: Call) -> None:
    backend = FakeBackend()
    answer = call("POST", "/admin/engines", json={"data_parallel_size": 3}, backend=backend)
    assert (answer.status_code, answer.json()) == (202, {"data_parallel_size": 3, "data_parallel_size_before": 1})
    assert backend.num_groups == 3
    for size in (0, "2", None, True, 2**31, 5):
        told = error(call("POST", "/admin/engines", json={"data_parallel_size": size}, backend=backend), 400)
        assert told["param"] == "data_parallel_size"
    error(call("POST", "/admin/engines", json={}), 400)
    error(call("POST", "/admin/engines", json={"data_parallel_size": 2}, config={"admin_api_key": "k"}), 401)
    assert backend.num_groups == 3

    class Leaving(Pair):
        wanted_groups = 1

    listed = call("GET", "/admin/engines", backend=Leaving()).json()
    assert [engine["retiring"] for engine in listed] == [False, True]

    class Growing(Pair):
        wanted_groups = 4

    listed = call("GET", "/admin/engines", backend=Growing()).json()
    assert [(engine["engine"], engine["ready"], engine["retiring"]) for engine in listed] == [
        *((0, True, False), (1, True, False), (2, False, False), (3, False, False)),
    ]
    assert listed[2]["reason"] == "waits until others have started"
    assert listed[2].keys() == listed[0].keys()


def test_metrics_of_a_group_that_came_later(model_dir: Path) -> None:
    async def work() -> str:
        backend = FakeBackend()
        async with client_of(backend, model_dir) as client:
            backend.num_groups = 2
            backend.group = lambda number: backend  # type: ignore[method-assign]
            backend.group_of = lambda request_id: 1  # type: ignore[method-assign]
            await client.post("/v1/completions", json=COMPLETION)
            await client.get("/metrics")
            backend.num_groups = 1
            return (await client.get("/metrics")).text

    families = list(text_string_to_metric_families(asyncio.run(work())))
    found = {(s.name, s.labels.get("engine")): s.value for family in families for s in family.samples}
    # what was counted stays, and the state of a group that is gone does not
    assert found["vllm:generation_tokens_total", "1"] == 3
    assert ("vllm:num_requests_waiting", "0") in found
    assert ("vllm:num_requests_waiting", "1") not in found


def test_metrics_of_several_groups(model_dir: Path) -> None:
    async def work() -> str:
        async with client_of(Pair(), model_dir) as client:
            await client.post("/v1/completions", json=COMPLETION)
            return (await client.get("/metrics")).text

    families = list(text_string_to_metric_families(asyncio.run(work())))
    assert len({family.name for family in families}) == len(families)
    samples = (sample for family in families for sample in family.samples if "le" not in sample.labels)
    found = {(sample.name, sample.labels["engine"]): sample.value for sample in samples}
    for name, expected in (
        ("vllm:generation_tokens_total", (0, 3)),
        ("vllm:prompt_tokens_total", (0, 1)),
        ("vllm:e2e_request_latency_seconds_count", (0, 1)),
        ("vllm:num_requests_waiting", (1, 1)),
    ):
        assert (found[name, "0"], found[name, "1"]) == expected, name


def test_scaling(call: Call) -> None:
    backend = FakeBackend()
    answer = call("POST", "/admin/scale", json={"workers": 4, "operation_id": "mine"}, backend=backend)
    assert (answer.status_code, answer.json()["operation_id"], answer.json()["kind"]) == (202, "mine", "scale")
    retired = call("POST", "/admin/scale", json={"retire": ["w2"]}, backend=backend).json()
    assert (retired["retiring"], retired["progress"], retired["safe_to_terminate"]) == (["w2"], 0.0, False)
    assert backend.scaled == [(4, ()), (None, ("w2",))]
    assert "1 to 4" in error(call("POST", "/admin/scale", json={"workers": 9}), 400)["message"]
    for body in ({}, {"workers": "4"}, {"workers": True}, {"retire": []}, {"retire": "w2"}, {"operation_id": "a b"}):
        error(call("POST", "/admin/scale", json=body), 400)
    twice = error(call("POST", "/admin/scale", json={"retire": ["w1", "w2", "w1"]}), 400)
    assert (twice["param"], twice["message"]) == ("retire", "retire: expected each worker once, got 'w1' several times")
    busy = FakeBackend(running_operation="op-7")
    assert "op-7" in error(call("POST", "/admin/scale", json={"workers": 3}, backend=busy), 409)["message"]
    assert call("POST", "/admin/scale", json={"workers": 3, "replace": True}, backend=busy).status_code == 202


def test_scaling_as_vllm_and_sglang_do(call: Call) -> None:
    path, size = "/scale_elastic_ep", {"new_data_parallel_size": 2, "drain_timeout": 1}
    done = call("POST", path, json=size)
    assert (done.status_code, done.json()) == (200, {"message": "Scaled to 2 data parallel engines"})
    assert call("POST", path, json={"new_ep_size": 3}).json()["new_ep_size"] == 3
    for body in ({}, {"new_data_parallel_size": 0}, {"new_data_parallel_size": 2, "drain_timeout": 0}):
        error(call("POST", path, json=body), 400)
    error(call("POST", path, json=size, backend=FakeBackend(scale_ends=Phase.PREPARING)), 408)
    error(call("POST", path, json=size, backend=FakeBackend(scale_ends=Phase.FAILED)), 500)
    error(call("POST", path, json=size, config={"admin_api_key": "k"}), 401)
    assert call("POST", "/is_scaling_elastic_ep").json() == {"is_scaling_elastic_ep": False}


def test_scaling_of_groups_of_which_one_cannot(call: Call) -> None:
    class Recovering(FakeBackend):
        async def scale(self, *_: object, **__: object) -> Any:
            raise NotReadyError("recovering")

    class Groups(FakeBackend):
        num_groups = 2

        def __init__(self, *members: FakeBackend) -> None:
            super().__init__()
            self.members = members

        def group(self, number: int) -> FakeBackend:
            return self.members[number]

    path, size = "/scale_elastic_ep", {"new_data_parallel_size": 2, "drain_timeout": 1}
    told = call("POST", path, json=size, backend=Groups(FakeBackend(), Recovering()))
    assert "engine 0 scales to 2 workers, and engine 1 does not: recovering" in error(told, 503)["message"]
    none = call("POST", path, json=size, backend=Groups(Recovering(), Recovering()))
    assert error(none, 503)["message"] == "recovering"
    both = call("POST", path, json=size, backend=Groups(FakeBackend(), FakeBackend()))
    assert both.json() == {"message": "Scaled to 2 data parallel engines in each of 2 groups"}


def test_the_state_of_scaling(call: Call) -> None:
    told = call("GET", "/admin/scale").json()
    assert (told["serving"], told["max_workers"], told["autoscaler"]) == (2, 8, "demand 60% of capacity")


def test_a_given_placement(call: Call) -> None:
    backend = FakeBackend()
    placement = call("GET", "/admin/placement", backend=backend).json()
    assert placement["pinned"] is False
    for path, pinned, expected in (
        ("/admin/placement", True, True),
        ("/admin/placement", None, None),
        ("/admin/placement?pinned=true", False, True),
    ):
        answer = call("PUT", path, json={**placement, "pinned": pinned}, backend=backend)
        assert answer.status_code == 202
        assert backend.placed is not None
        assert backend.placed[0].to_dict() == {k: v for k, v in placement.items() if k not in ("epoch", "pinned")}
        assert backend.placed[1] is expected
    error(call("PUT", "/admin/placement", json={**placement, "pinned": 1}), 400)
    error(call("PUT", "/admin/placement", json=[]), 400)
    broken = {**placement, "physical_to_logical_map": [[0, 1, 2, 2]] * 2}
    assert "no slot for expert 3" in error(call("PUT", "/admin/placement", json=broken), 400)["message"]
    error(call("PUT", "/admin/placement", json=placement, config={"admin_api_key": "k"}), 401)
    assert call("DELETE", "/admin/placement/pin", backend=backend).json() == {"pinned": False}
    assert backend.placed is None


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"pinned": 1}, "pinned"),
        ({"num_layers": 9}, "num_layers"),
        ({"num_logical_experts": "many"}, "num_logical_experts"),
        ({"num_logical_experts": 99}, "num_logical_experts"),
        ({"workers": []}, "workers"),
        ({"workers": [{"id": "w0", "node": "n"}]}, "workers.0.slots"),
        ({"workers": [7]}, "workers.0"),
        ({"slot_to_worker": [1, 0, 0, 0]}, "slot_to_worker"),
        ({"physical_to_logical_map": [[0], [1, 2]]}, "physical_to_logical_map"),
        ({"physical_to_logical_map": [[0, 1, 2, 2]] * 2}, "physical_to_logical_map"),
        ({"physical_to_logical_map": [[0, 1, 2]] * 2}, "physical_to_logical_map"),
        ({"tiers": "disk"}, "tiers"),
        ({"tiers": [["far"] * 4] * 2}, "tiers"),
    ],
)
def test_a_fault_of_a_placement_names_its_key(call: Call, change: dict[str, Any], param: str) -> None:
    """`param` was null."""
    placement = call("GET", "/admin/placement").json()
    assert error(call("PUT", "/admin/placement", json={**placement, **change}), 400)["param"] == param


# --- What is said against a call ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "question", "param"),
    [
        ("/admin/scale", {"workers": 99}, "scale", "workers"),
        ("/admin/scale", {"retire": ["w9"]}, "scale", "retire"),
        ("/admin/rebalance", {"planner": "best"}, "rebalance", "planner"),
        ("/admin/rebalance", {"planner": "best", "dry_run": True}, "preview", "planner"),
        ("/admin/placement", {}, "place", "workers"),
        ("/scale_elastic_ep", {"new_ep_size": 99}, "scale", "new_ep_size"),
        ("/scale_elastic_ep", {"new_data_parallel_size": 99}, "scale", "new_data_parallel_size"),
    ],
)
def test_a_refusal_of_the_coordinators_names_the_field(
    call: Call, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], question: str, param: str
) -> None:
    """`param` was null where the cluster, and not the schema, refused."""

    async def refuse(*_: Any, **__: Any) -> None:
        begin = "placement: " if path == "/admin/placement" else ""
        raise PlacementError(f"{begin}{'workers' if 'size' in param else param}: expected something else")

    backend = FakeBackend()
    method = "PUT" if question == "place" else "POST"
    body = body or call("GET", path, backend=backend).json()
    monkeypatch.setattr(backend, question, refuse)
    refused = error(call(method, path, json=body, backend=backend), 400)
    assert refused["param"] == param
    assert refused["message"].endswith(": expected something else")


@pytest.mark.parametrize("number", ["-1", "1", "x", "1" * 99, "\u0663"])
def test_the_range_of_engines_is_told(call: Call, number: str) -> None:
    for path in ("/admin/workers", "/admin/events"):
        refused = error(call("GET", path, params={"engine": number}), 400)
        assert refused["message"].startswith("engine: expected 0, since there is one group, got ")
        assert refused["param"] == "engine"


def test_the_key_that_is_needed_is_named(call: Call) -> None:
    keys = {"api_key": "a", "admin_api_key": "b", "admin_read_key": "c"}
    for method, path, flag in (
        ("POST", "/admin/scale", "--admin-api-key"),
        ("GET", "/admin/workers", "--admin-read-key"),
        ("GET", "/v1/models", "--api-key"),
    ):
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            refused = error(call(method, path, headers=headers, config=keys), 401)
            assert flag in refused["message"]
            assert headers or "'Authorization: Bearer KEY'" in refused["message"]
