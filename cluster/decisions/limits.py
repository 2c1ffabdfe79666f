"""What a configuration may ask of a model, checked before anything starts."""

from __future__ import annotations

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.messages.epochs import ModelInfo

GROUP_PROCESSES = 3
"""Processes of a group beside its workers: coordinator, engine and migrator. They are on the head."""
PROCESS_BYTES = 100_000_000
"""The least memory that one of them takes."""
GROUPS_PER_CORE = 4
"""Groups for each core of the machine, or of all nodes of a joined cluster, on which their workers compute. With more,
most of them wait for a core at any time, and all answer slowly."""
ENGINES_PER_CORE = 16
"""Groups for each core of a joined cluster's head, which has the API and their engines and coordinators. These take
1.3 ms of a core for a step (docs/benchmarks/tried.md), so with 16 a step waits for some 20 ms while all are busy."""


def check_groups(
    config: ServeConfig, *, cores: int, free_bytes: int, all_cores: int | None = None, present: int = 0
) -> None:
    """Raises ConfigError for more groups than there are cores for, or than the memory holds that is free on the head.

    cores: of the head, which is this machine; without an `address`, all workers are on it too. all_cores: of all nodes
    of a joined cluster, with the head's; if not given, the head's. present: groups that run already, whose memory is
    not free.
    """
    processes = GROUP_PROCESSES + (config.workers if config.address is None else 0)
    where = "this machine" if config.address is None else "the head of the cluster"
    others = f" beside the {present} groups that run" if present else ""
    bounds = [
        (
            present + free_bytes // (processes * PROCESS_BYTES),
            f"{where} has {free_bytes / 1e9:.1f} GB of free memory{others}, and a group has {processes} processes there"
            f" of at least {PROCESS_BYTES / 1e9:g} GB",
        )
    ]
    if config.address is None:
        bounds += [_by_cores(where, cores, GROUPS_PER_CORE, "groups")]
    else:
        everywhere = max(cores, all_cores or 0)
        bounds += [_by_cores("the cluster", everywhere, GROUPS_PER_CORE, "groups")]
        bounds += [_by_cores(where, cores, ENGINES_PER_CORE, "groups' engines")]
    least, reason = min(bounds, key=lambda bound: bound[0])
    most = max(1, present, least)
    if config.data_parallel_size <= most:
        return
    advice = "more workers in each group (--workers) use more machines"
    if config.address is None:
        advice = "a larger machine, or a Ray cluster (--address), carries more"
    got = config.data_parallel_size
    raise ConfigError(f"data_parallel_size: expected at most {most}, got {got}: {reason}; {advice}")


def _by_cores(where: str, cores: int, each: int, what: str) -> tuple[int, str]:
    return each * cores, f"{where} has {cores} cores, and a core carries {each} {what}"


def check_limits(config: ServeConfig, info: ModelInfo) -> None:
    """Raises ConfigError, naming the setting, for what this model does not allow."""
    if config.workers > info.num_logical_experts:
        raise ConfigError(
            f"workers: {config.workers} is more than the {info.num_logical_experts} experts of a layer; "
            "every worker holds at least one"
        )
    _check_weights(config, info)
    if config.max_model_len is not None and config.max_model_len > info.max_model_len:
        raise ConfigError(
            f"max_model_len: {config.max_model_len} is more than the {info.max_model_len} that the model allows"
        )
    _check_cache(config, info)


def _check_cache(config: ServeConfig, info: ModelInfo) -> None:
    """Raises ConfigError for a KV cache that is too small for one request of full length. A worker, which knows more,
    may refuse it all the same."""
    tokens = config.max_model_len or info.max_model_len
    least = info.kv_bytes(info.dtype if config.dtype == "auto" else config.dtype, tokens)
    if config.kv_cache_memory_bytes is not None and config.kv_cache_memory_bytes < least:
        raise ConfigError(
            f"kv_cache_memory_bytes: expected at least {least}, room for one request of max_model_len ({tokens})"
            f" tokens, got {config.kv_cache_memory_bytes}"
        )


def _check_weights(config: ServeConfig, info: ModelInfo) -> None:
    """Raises ConfigError for number formats that this model does not allow, and if a worker may not hold one expert of
    each layer."""
    dtype = info.dtype if config.dtype == "auto" else config.dtype
    # whether there are GPUs is not known yet
    device = "cpu" if config.device == "auto" else config.device
    info.trunk_form(config.trunk_dtype, dtype, device)
    served = info.served_in(dtype, info.form(config.expert_dtype, dtype, device))
    least = served.num_layers * served.expert_bytes
    if config.expert_memory_bytes is not None and config.expert_memory_bytes < least:
        raise ConfigError(
            f"expert_memory_bytes: expected at least {least}, room for one expert of each of the {served.num_layers}"
            f" layers, got {config.expert_memory_bytes}"
        )
