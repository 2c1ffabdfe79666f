"""Every setting of the server: one frozen value, from flags, a YAML file or Serve's `args`.

A field is a flag of `emoe serve` (`max_num_seqs` is `--max-num-seqs`) and a key of the YAML file.
Unknown keys are errors.
Its metadata carries the help text and, where the values are few, the choices; the command line is made from it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.peers import Networks


def setting(default: Any, help: str, *, choices: tuple[str, ...] = (), at_least: float | None = None) -> Any:
    """A field of ServeConfig: its default, what --help says, and what is allowed."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "at_least": at_least})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Raises ConfigError, naming the field, for a value of the wrong type or outside its range."""

    model: str | None = setting(None, "model directory in Hugging Face layout; the built-in model if not given")
    served_model_name: str | None = setting(None, "name clients use; the directory's name if not given")
    workers: int = setting(
        2, "workers (ExpertHost actors) to start: one GPU each, or a share of the CPU cores", at_least=1
    )
    min_workers: int | None = setting(None, "fewest workers that the autoscaler leaves; 1 if not given", at_least=1)
    max_workers: int | None = setting(
        None, "most workers that the autoscaler asks for; no autoscaler if not given", at_least=1
    )
    autoscale_window: float = setting(
        15.0,
        "seconds of load that the autoscaler goes by; it waits 2 such windows before growing again, 8 to shrink",
        at_least=1,
    )
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on", at_least=1)
    address: str | None = setting(None, "address of a Ray cluster to join; a local one is started if not given")
    device: str = setting("auto", "where workers compute", choices=("auto", "cpu", "cuda"))
    dtype: str = setting("auto", "of weights and activations", choices=("auto", "bfloat16", "float16", "float32"))
    expert_dtype: str = setting(
        "auto",
        "of experts' weights; int8: rounded to 8 bits with a scale for every 128 (bfloat16 on CPU only)",
        choices=("auto", "int8"),
    )
    max_model_len: int | None = setting(
        None, "longest prompt plus answer, in tokens; the model's own if not given", at_least=2
    )
    max_num_seqs: int = setting(64, "most requests that one worker runs at a time", at_least=1)
    max_num_batched_tokens: int = setting(2048, "most tokens that one worker runs in one step", at_least=1)
    max_num_prefill_tokens: int | None = setting(
        None,
        "most prompt tokens that one worker runs in a step in which requests wait for their next token; "
        "if not given, 48 on CPUs, and no limit of its own elsewhere",
        at_least=1,
    )
    block_size: int = setting(16, "tokens in a KV-cache block", at_least=1)
    kv_cache_memory_bytes: int | None = setting(
        None, "KV cache of each worker; sized from free memory if not given", at_least=1
    )
    enable_prefix_caching: bool = setting(True, "compute a beginning that an earlier request had only once")
    expert_memory_bytes: int | None = setting(
        None, "memory that experts may take on each worker; what is free, after the KV cache, if not given", at_least=1
    )
    redundant_experts: int = setting(0, "spare slots per layer over all workers, for replicas", at_least=0)
    rebalance_interval: float = setting(60.0, "seconds between looks at the placement; 0: only on request", at_least=0)
    planner: str = setting("auto", "placement planner of the periodic re-placement")
    solver: str = setting("highs", "ILP solver", choices=("highs", "cbc", "gurobi"))
    migration_bandwidth: float = setting(
        0.0, "MB/s that copies of experts between workers may take while requests run; 0: no limit", at_least=0
    )
    plan_deadline: float = setting(10.0, "seconds that a planner may take", at_least=0.1)
    standby: bool = setting(
        True,
        "keep a process ready for the next worker, with everything but weights; on CPUs, where no cluster is joined",
    )
    step_timeout: float = setting(
        60.0, "most seconds that a step may take; less, 10 times the slowest lately, once steps are known", at_least=1
    )
    heartbeat_timeout: float = setting(
        5.0, "seconds without a sign of life after which a process is taken to hang and is ended", at_least=0.5
    )
    recovery_timeout: float = setting(
        600.0,
        "seconds that requests under way wait while no worker can serve them; then they end with an error",
        at_least=1,
    )
    max_waiting_requests: int = setting(
        2048,
        "most requests that wait for their first token, every answer of every prompt counted; more are refused with "
        "status 503. One client gets three quarters of the places that the others leave",
        at_least=1,
    )
    drain_timeout: float = setting(
        30.0, "seconds that a worker's requests get to finish before it leaves; then they move", at_least=0
    )
    max_connections: int | None = setting(
        None, "most connections that are open at a time; what `ulimit -n` allows, up to 16384, if not given", at_least=1
    )
    max_connections_per_address: int = setting(
        1024,
        "most connections from one address; this machine's own and those of --forwarded-allow-ips are not counted",
        at_least=1,
    )
    forwarded_allow_ips: str = setting(
        "127.0.0.1,::1",
        "addresses and networks of reverse proxies, separated by commas, whose X-Forwarded-For header is believed; "
        "*: all",
    )
    allowed_hosts: str | None = setting(
        None,
        "names, separated by commas, that a server on loopback answers to besides localhost, such as the name "
        "that a reverse proxy passes on; *: all",
    )
    api_key: str | None = setting(
        None, "key that every call asks for, except /health, /ready, /version, /metrics and /admin; or $EMOE_API_KEY"
    )
    api_key_file: str | None = setting(None, "file with that key, which then does not show in the list of processes")
    admin_api_key: str | None = setting(
        None, "key that /admin calls ask for if they change something; or $EMOE_ADMIN_API_KEY"
    )
    admin_api_key_file: str | None = setting(None, "file with that key")
    admin_read_key: str | None = setting(
        None,
        "key that GET /metrics and GET /admin ask for, besides the admin key; open if not given; "
        "or $EMOE_ADMIN_READ_KEY",
    )
    admin_read_key_file: str | None = setting(None, "file with that key")
    chat_template: str | None = setting(None, "file of a chat template, instead of the tokenizer's")
    shutdown_timeout: float = setting(
        30.0, "seconds that running requests get when the server is asked to stop", at_least=0
    )
    log_level: str = setting("info", "least level of log lines", choices=("debug", "info", "warning", "error"))
    log_format: str = setting("text", "of log lines; json: one object for each", choices=("text", "json"))
    log_file: str | None = setting(
        None, "file for the log lines of every process; one under ~/.local/state/elastic-moe if not given"
    )

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, hints[field.name], getattr(self, field.name)))
        if self.port > 65535:
            raise ConfigError(f"port: expected 1 to 65535, got {self.port}")
        Networks.parse(self.forwarded_allow_ips)
        self._check_limits()

    def _check_limits(self) -> None:
        if self.max_workers is None:
            if self.min_workers is not None:
                raise ConfigError("min_workers: max_workers must be given with it")
            return
        least = self.min_workers or 1
        if not least <= self.workers <= self.max_workers:
            raise ConfigError(f"workers: expected {least} to {self.max_workers}, the limits of the autoscaler, "
                              f"got {self.workers}")  # fmt: skip

    @property
    def most_workers(self) -> int:
        return max(self.workers, self.max_workers or 0)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], *, source: str = "configuration") -> ServeConfig:
        """From the keys of a YAML file or of Serve's `args`; `-` and `_` are the same. Unknown keys raise."""
        known = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, value in data.items():
            name = key.replace("-", "_") if isinstance(key, str) else ""
            if name not in known:
                raise ConfigError(f"{source}: unknown key {reprlib.repr(key)}; known keys: {', '.join(sorted(known))}")
            if name in values:
                raise ConfigError(f"{source}: {key!r} is given twice")
            values[name] = value
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def read_yaml(cls, path: Path) -> dict[str, Any]:
        """The mapping in a YAML file, unchecked. Raises ConfigError where it cannot be read or is no mapping."""
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError, yaml.YAMLError) as error:
            # besides its own errors, yaml raises whatever its converters of scalars do
            raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
        except Exception as error:  # noqa: BLE001 - what Python raises of a date, a number or nesting that cannot be
            raise ConfigError(f"{path}: a value cannot be read: {' '.join(str(error).split())}") from None
        if data is None:
            return {}
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
        return data


def cache_directory() -> Path:
    """Where things that can be made again are kept: elastic-moe under $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "elastic-moe"


def native_wanted() -> bool:
    """Whether workers may use the native library: not where EMOE_NATIVE is 0."""
    return os.environ.get("EMOE_NATIVE") != "0"


def base_type(hint: Any) -> type:
    """The type of a setting without its `| None`."""
    if isinstance(hint, types.UnionType):
        return typing.cast(type, next(arm for arm in typing.get_args(hint) if arm is not type(None)))
    return typing.cast(type, hint)


def _checked(field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    if value is None and hint != base_type(hint):
        return None
    expected = base_type(hint)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        # an integer beyond all floats is infinite, and refused as that
        value = float(value) if abs(value) < 2**1000 else math.inf
    # few lines of YAML can stand for a value that is gigabytes when it is written out
    shown = reprlib.repr(value)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ConfigError(f"{field.name}: expected {expected.__name__}, got {shown}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{field.name}: expected a finite number, got {shown}")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"{field.name}: expected one of {', '.join(choices)}, got {shown}")
    at_least = field.metadata["at_least"]
    # written so that a NaN fails too
    if at_least is not None and not value >= at_least:
        raise ConfigError(f"{field.name}: expected at least {at_least:g}, got {shown}")
    return value
