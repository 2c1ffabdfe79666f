"""Every setting of the server: one frozen value, from flags, a YAML file or Serve's `args`.

Each field is a flag of `emoe serve` (`max_num_seqs` is `--max-num-seqs`) and a key of the YAML file. Unknown keys are
errors. cluster/setting.py says how a field is declared and checked.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.peers import Networks, check_origins, check_root_path
from elastic_moe.cluster.setting import DAY_S, MILLION, MOST_BYTES, by_fields, check_fields, names, setting

COLLECTOR = re.compile(r"(https?|grpc)://[^/?#\s]+(/[^\s]*)?")
PLANNERS = (
    "contiguous", "round_robin", "random", "greedy", "anticorrelation", "eplb", "pinning", "load_ilp", "moetuner",
    "relief", "local_search", "ilp", "auto",
)  # fmt: skip
"""The planners of optimizer/planner.py, which this package cannot import."""
MOST_WORKERS = 4096
MOST_TOKENS = 10**9
"""Of one request. The model's own limit is below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Raises ConfigError, naming the field, for a value of the wrong type or outside its range."""

    model: str | None = setting(
        None, "directory of the model, in Hugging Face layout; without it, the built-in model is served"
    )
    served_model_name: str | None = setting(
        None, "name by which clients ask for the model; if not given, it is the name of the model's directory"
    )
    workers: int = setting(
        2, "number of workers to start; each has one GPU, or an equal share of the CPU cores", within=(1, MOST_WORKERS)
    )
    min_workers: int | None = setting(
        None,
        "smallest number of workers that the autoscaler keeps; 1 if not given; with 0, all workers end after 20 times "
        "--autoscale-window without a request, and the next request waits until others have started",
        within=(0, MOST_WORKERS),
    )
    max_workers: int | None = setting(
        None,
        "largest number of workers that the autoscaler asks for; if not given, there is no autoscaler",
        within=(1, MOST_WORKERS),
    )
    autoscale_window: float = setting(
        15.0,
        "seconds over which the autoscaler averages the load; after a change it waits for 2 such windows before it "
        "adds workers, and for 8 before it removes some",
        within=(1, DAY_S),
    )
    data_parallel_size: int = setting(
        1,
        "number of groups of workers, each with an engine, all experts and --workers workers of its own; a request "
        "runs in one group, and goes on in another one if that is lost",
        within=(1, MOST_WORKERS),
    )
    host: str = setting("127.0.0.1", "address that the server listens on")
    port: int = setting(8000, "port that the server listens on", within=(1, 65535))
    address: str | None = setting(
        None, "address of a Ray cluster to join; if not given, the server starts a Ray of its own on this machine"
    )
    interface: str | None = setting(
        None,
        "network interface, by its name or as a network such as 10.1.0.0/16, over which tokens go from node to node;"
        " if not given, the one with the address by which Ray knows the node",
    )
    worker_gbps: float | None = setting(
        None,
        "bandwidth in Gb/s of the link of each worker, by which planners reckon; if not given, it is measured between "
        "workers of several nodes, and is an H100's elsewhere",
        within=(0.001, MILLION),
    )
    node_gbps: float | None = setting(
        None,
        "bandwidth in Gb/s of the link of each node, which its workers share; if not given, it is measured as well",
        within=(0.001, MILLION),
    )
    calibration: str | None = setting(
        None,
        "file of constants by which planners reckon, as `emoe calibrate` writes it; if not given, what it has measured "
        "of this model on the head node, if anything",
        made_absolute=True,
    )
    device: str = setting(
        "auto", "device that workers compute on; auto takes GPUs where there are any", choices=("auto", "cpu", "cuda")
    )
    workers_on_head: bool = setting(
        False,
        "let workers on CPUs run on the head of a Ray cluster, beside the API and the engine; always so where the "
        "server has started Ray itself",
    )
    dtype: str = setting(
        "auto",
        "number format of weights and activations; auto takes the format of the checkpoint",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    expert_dtype: str = setting(
        "auto",
        "number format of the experts' weights; auto keeps packed experts packed if they can be computed so, and "
        "bfloat16 unpacks them; int8 and int4 round experts of 16 bits, with one scale for every 128 and every 32 "
        "weights, and need dtype bfloat16",
        choices=("auto", "bfloat16", "int8", "int4"),
    )
    trunk_dtype: str = setting(
        "auto",
        "number format of the weights beside the experts; auto takes that of dtype; int8 rounds linear layers, "
        "embeddings and the output head, with one scale for every 128 weights, and works only with bfloat16 on CPUs",
        choices=("auto", "bfloat16", "int8"),
    )
    max_model_len: int | None = setting(
        None,
        "largest number of tokens of a prompt and its answer together; if not given, the model's own limit",
        within=(2, MOST_TOKENS),
        scaled=True,
    )
    max_num_seqs: int = setting(64, "largest number of requests that one worker runs at a time", within=(1, MILLION))
    max_num_batched_tokens: int = setting(
        2048, "largest number of tokens that one worker runs in one step", within=(1, MILLION), scaled=True
    )
    max_num_prefill_tokens: int | None = setting(
        None,
        "largest number of prompt tokens that one worker runs in a step in which other requests wait for their next "
        "token; if not given, as many as make such a step three quarters longer, or 25 ms where that is more",
        within=(1, MILLION),
    )
    block_size: int = setting(16, "number of tokens in one block of the KV cache", within=(1, 4096))
    kv_cache_memory_bytes: int | None = setting(
        None,
        "bytes of KV cache on each worker; if not given, they are computed from the free memory",
        within=(1, MOST_BYTES),
    )
    enforce_eager: bool = setting(
        False, "launch the kernels of a GPU's steps one by one, instead of as CUDA graphs that were recorded before"
    )
    enable_prefix_caching: bool = setting(
        True, "reuse the KV cache of an earlier request whose prompt began with the same tokens"
    )
    expert_memory_bytes: int | None = setting(
        None,
        "bytes that experts may take in the device of each worker, which is a GPU's memory or a CPU worker's; experts "
        "beyond it are read from disk when they are needed; if not given, the memory that the KV cache leaves free",
        within=(1, MOST_BYTES),
    )
    host_expert_memory_bytes: int | None = setting(
        None,
        "bytes of pinned memory that each GPU worker may use for experts that do not fit in its GPU; 0 uses none; if "
        "not given, a share of the node's free memory",
        within=(0, MOST_BYTES),
    )
    expert_cache_dir: str | None = setting(
        None,
        "directory of each node in which experts are kept as they are computed with, for fast reading; if not given, "
        "~/.cache/elastic-moe/experts",
        made_absolute=True,
    )
    expert_cache_policy: str = setting(
        "lfru",
        "policy that chooses which expert leaves the cache area of a layer: lfru weighs recent use and frequency",
        choices=("lfru", "lru", "lfu", "lifo"),
    )
    redundant_experts: int = setting(
        0, "number of additional slots per layer, over all workers, for replicas of experts", within=(0, MILLION)
    )
    rebalance_interval: float = setting(
        60.0,
        "seconds between two checks of the placement of experts; 0 re-places experts only on request",
        within=(0, 30 * DAY_S),
    )
    planner: str = setting("auto", "planner that the periodic re-placement uses", choices=PLANNERS)
    solver: str = setting(
        "highs", "solver that the planners use for integer programs", choices=("highs", "cbc", "gurobi")
    )
    migration_bandwidth: float = setting(
        0.0,
        "largest rate, in MB/s, at which workers copy experts from one another while requests run; 0 sets no limit",
        within=(0, MILLION),
    )
    plan_deadline: float = setting(10.0, "largest number of seconds that a planner may take", within=(0.1, DAY_S))
    standby: bool = setting(
        True,
        "keep one process ready, with everything but weights, for the next worker that starts; only on CPUs, and only "
        "where the server has started Ray itself",
    )
    fork_workers: bool = setting(
        True,
        "fork Ray's workers from processes that have imported what they need, so that they start sooner and share "
        "memory; only on CPUs, and only where the server has started Ray itself",
    )
    step_timeout: float = setting(
        60.0,
        "largest number of seconds that a step may take; once steps were measured, the limit is 10 times the slowest "
        "recent step, if that is less",
        within=(1, DAY_S),
    )
    heartbeat_timeout: float = setting(
        5.0, "seconds without a sign of life after which a process counts as hung and is killed", within=(0.5, DAY_S)
    )
    recovery_timeout: float = setting(
        600.0,
        "seconds that running requests wait while no worker can serve them; after that they end with an error",
        within=(1, 30 * DAY_S),
    )
    stream_interval: int = setting(
        1,
        "tokens in each part of a streamed answer. The first token and the end are sent at once",
        within=(1, MILLION),
    )
    max_waiting_requests: int = setting(
        2048,
        "largest number of answers that wait for their first token; further requests are refused with status 503. One "
        "client may take at most three quarters of the places that the other clients leave. Each API replica counts "
        "its own",
        within=(1, MILLION),
    )
    api_replicas: int = setting(
        1,
        "number of API processes behind the proxy; a connection stays with one of them, and if that one dies, only its "
        "connections end",
        within=(1, 256),
    )
    max_stored_responses: int = setting(
        1000,
        "largest number of answers of /v1/responses that are kept after their end; the oldest go first, and 0 keeps "
        "none",
        within=(0, MILLION),
    )
    stored_responses_memory_bytes: int = setting(
        256 << 20, "bytes that those answers may take together, with their conversations", within=(1, MOST_BYTES)
    )
    stored_responses_ttl: float = setting(
        86400.0, "seconds after their end for which those answers are kept", within=(1, 3650 * DAY_S)
    )
    drain_timeout: float = setting(
        30.0,
        "seconds that a worker's requests have to finish before the worker leaves; the rest moves to other workers",
        within=(0, DAY_S),
    )
    max_connections: int | None = setting(
        None,
        "largest number of open connections; if not given, as many as `ulimit -n` allows, and at most 16384",
        within=(1, MILLION),
    )
    max_connections_per_address: int = setting(
        1024,
        "largest number of open connections from one address; connections from this machine and from the addresses of "
        "--forwarded-allow-ips are not limited",
        within=(1, MILLION),
    )
    forwarded_allow_ips: str = setting(
        "127.0.0.1,::1",
        "addresses and networks of reverse proxies, separated by commas, whose X-Forwarded-For header the server "
        "trusts; * trusts everybody",
    )
    allowed_hosts: str | None = setting(
        None,
        "host names, separated by commas, that a server on loopback answers to besides localhost, such as the name "
        "that a reverse proxy passes on; * allows every name",
    )
    allowed_origins: str | None = setting(
        None,
        "origins, such as https://chat.example.org, separated by commas or as a JSON list, whose web pages may call "
        "the server from a browser (CORS); * allows every page; calls under /admin need --admin-api-key besides",
    )
    allowed_methods: str = setting("*", "methods that pages of --allowed-origins may use; * is all of them")
    allowed_headers: str = setting("*", "headers that pages of --allowed-origins may send; * is all of them")
    allow_credentials: bool = setting(False, "let pages of --allowed-origins send cookies and client certificates")
    root_path: str = setting(
        "",
        "path under which a reverse proxy serves this server, such as /llm; the proxy may remove it or pass it on",
    )
    api_key: str | None = setting(
        None,
        "key that clients must send with every call except the page, /health, /ping, /ready, /version, /docs, "
        "/openapi.json, /metrics, /load and /admin; the environment variable EMOE_API_KEY sets it too",
    )
    api_key_file: str | None = setting(
        None, "file that holds the API key, so that the key does not show in the list of processes"
    )
    admin_api_key: str | None = setting(
        None,
        "key that clients must send with the /admin calls that change something; the environment variable "
        "EMOE_ADMIN_API_KEY sets it too",
    )
    admin_api_key_file: str | None = setting(None, "file that holds the admin API key")
    admin_read_key: str | None = setting(
        None,
        "key that clients must send with GET /metrics and GET /admin, which also take the admin key; if not given, "
        "these calls need no key; the environment variable EMOE_ADMIN_READ_KEY sets it too",
    )
    admin_read_key_file: str | None = setting(None, "file that holds the admin read key")
    chat_template: str | None = setting(None, "file with a chat template, which replaces the one of the tokenizer")
    tool_call_parser: str | None = setting(
        None,
        "form in which the model writes tool calls, by vLLM's name, such as hermes, deepseek_v3 or openai; none looks "
        "for no calls; if not given, it is found in the checkpoint",
    )
    reasoning_parser: str | None = setting(
        None,
        "form in which the model writes its reasoning, by vLLM's name, such as qwen3, deepseek_r1 or openai_gptoss; "
        "none leaves the reasoning in the answer; if not given, it is found in the checkpoint",
    )
    shutdown_timeout: float = setting(
        30.0, "seconds that running requests have to finish when the server stops", within=(0, DAY_S)
    )
    handover_timeout: float = setting(
        120.0,
        "seconds that a redeployed model waits for the resources of its own workers, beside the old model, which "
        "serves meanwhile; after that the old model finishes its requests and ends first",
        within=(0, DAY_S),
    )
    log_level: str = setting(
        "info", "lowest level of the lines that are logged", choices=("debug", "info", "warning", "error")
    )
    log_format: str = setting(
        "text", "format of log lines; json writes one object for each line", choices=("text", "json")
    )
    log_file: str | None = setting(
        None, "file for the log lines of every process; if not given, a new file under ~/.local/state/elastic-moe"
    )
    enable_log_requests: bool = setting(
        False, "write a line for each request that has ended, with its id, its times and its numbers of tokens"
    )
    otlp_traces_endpoint: str | None = setting(
        None,
        "URL of an OpenTelemetry collector that gets a trace of each request and operation: http://HOST:4318/v1/traces "
        "sends over HTTP, http://HOST:4317 over gRPC; needs pip install 'elastic-moe[otlp]'",
        like=(COLLECTOR, "a URL such as http://localhost:4318/v1/traces"),
    )

    def __post_init__(self) -> None:
        check_fields(self)
        Networks.parse(self.forwarded_allow_ips)
        self._check_limits()
        check_origins(self.origins)
        check_root_path(self.root_path)

    def _check_limits(self) -> None:
        if self.max_workers is None:
            if self.min_workers is not None:
                raise ConfigError("min_workers: max_workers must be given with it")
            return
        least = self.min_workers or 1
        if least > self.max_workers:
            raise ConfigError(f"min_workers: expected at most max_workers, which is {self.max_workers}, got {least}")
        if not least <= self.workers <= self.max_workers:
            raise ConfigError(f"workers: expected {least} to {self.max_workers}, the limits of the autoscaler, "
                              f"got {self.workers}")  # fmt: skip

    @property
    def origins(self) -> tuple[str, ...]:
        return names("allowed_origins", self.allowed_origins or "")

    @property
    def cors_methods(self) -> tuple[str, ...]:
        return names("allowed_methods", self.allowed_methods)

    @property
    def cors_headers(self) -> tuple[str, ...]:
        return names("allowed_headers", self.allowed_headers)

    @property
    def most_workers(self) -> int:
        return max(self.workers, self.max_workers or 0)

    @property
    def all_workers(self) -> int:
        """The most workers of all groups together."""
        return self.data_parallel_size * self.most_workers

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], *, source: str = "configuration") -> ServeConfig:
        """From the keys of a YAML file or of Serve's `args`; `-` and `_` are the same. Unknown keys raise."""
        try:
            return cls(**by_fields(dataclasses.fields(cls), data))
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None


def cache_directory() -> Path:
    """The directory of files that can be made again: elastic-moe under $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "elastic-moe"


def native_wanted() -> bool:
    """Whether workers may use the native library: not if the environment variable EMOE_NATIVE is 0."""
    return os.environ.get("EMOE_NATIVE") != "0"
