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
"""Groups for each core of the head, on which each has an engine that takes part in every step; without an `address` it
has all workers too. With more, most of them wait for a core at any time, and all answer slowly."""


def check_groups(config: ServeConfig, *, cores: int, free_bytes: int, present: int = 0) -> None:
    """Raises ConfigError for more groups than the head can carry, with its cores and the memory that is free there.

    It is this machine; where no `address` is given, all workers are on it too. present: groups that run there already,
    whose memory is not free.
    """
    processes = GROUP_PROCESSES + (config.workers if config.address is None else 0)
    by_memory = present + free_bytes // (processes * PROCESS_BYTES)
    most = max(1, present, min(GROUPS_PER_CORE * cores, by_memory))
    if config.data_parallel_size <= most:
        return
    where = "this machine" if config.address is None else "the head of the cluster"
    if by_memory < GROUPS_PER_CORE * cores:
        others = f" beside the {present} groups that run" if present else ""
        why = f"{where} has {free_bytes / 1e9:.1f} GB of free memory{others}, and a group has {processes} processes"
        why += f" there of at least {PROCESS_BYTES / 1e9:g} GB"
    else:
        why = f"{where} has {cores} cores, and a core carries {GROUPS_PER_CORE} groups"
    advice = "more workers in each group (--workers) use more machines"
    if config.address is None:
        advice = "a larger machine, or a Ray cluster (--address), carries more"
    raise ConfigError(f"data_parallel_size: expected at most {most}, got {config.data_parallel_size}: {why}; {advice}")


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
