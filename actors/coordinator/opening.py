"""Settles what the configuration leaves open, by what the checkpoint says of itself and by the machines there are."""

from __future__ import annotations

import logging
import os
import time

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.cluster.facts.events import Reconfigured
from elastic_moe.cluster.facts.facts import ControlSettings
from elastic_moe.cluster.messages.epochs import ModelInfo, ModelSpec

logger = logging.getLogger(__name__)


def served_model(config: ServeConfig, model: ModelInfo, device: str) -> ModelInfo:
    """The model with the sizes that it has in the served dtype and forms. device: cpu or cuda.

    Raises ConfigError for a form that this model or device does not allow. May compile the native library.
    """
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    native = model.kept is ExpertForm.PLAIN or _native()
    form = model.form(config.expert_dtype, dtype, device, native=native)
    if model.packed_as is not None:
        kept = dtype if form is ExpertForm.PLAIN else form
        logger.info("experts come packed as %s, and are kept in %s", model.packed_as, kept)
    return model.served_in(dtype, form, model.trunk_form(config.trunk_dtype, dtype, device))


def _native() -> bool:
    """Whether the native library is there. May compile it."""
    from elastic_moe.model.native.library import unavailable

    return unavailable() is None


def model_spec(config: ServeConfig, model: ModelInfo, model_dir: str, device: str) -> ModelSpec:
    """device: cpu or cuda. Raises ConfigError for a context that the model does not allow, and for memory beside GPUs
    where there are none."""
    if (config.max_model_len or 0) > model.max_model_len:
        raise ConfigError(f"max_model_len: the model allows {model.max_model_len}, got {config.max_model_len}")
    if config.host_expert_memory_bytes and device == "cpu":
        raise ConfigError(
            f"host_expert_memory_bytes: expected 0, as workers on CPUs keep experts in memory by expert_memory_bytes"
            f" alone, got {config.host_expert_memory_bytes}"
        )
    return ModelSpec(
        path=model_dir,
        dtype=model.dtype if config.dtype == "auto" else config.dtype,
        device=device,
        max_model_len=config.max_model_len or model.max_model_len,
        expert_dtype=config.expert_dtype,
        trunk_dtype=config.trunk_dtype,
    )


def control_settings(config: ServeConfig, model: ModelInfo, *, shared_gpus: bool) -> ControlSettings:
    """shared_gpus: whether several workers share a GPU."""
    memory_bytes = config.expert_memory_bytes
    return ControlSettings(
        workers=config.workers,
        redundant_experts=config.redundant_experts,
        rebalance_interval_s=config.rebalance_interval,
        min_workers=config.min_workers,
        max_workers=config.max_workers,
        autoscale_window_s=config.autoscale_window,
        seats_per_worker=config.max_num_seqs,
        drain_timeout_s=config.drain_timeout,
        expert_capacity=None if memory_bytes is None else memory_bytes // model.expert_bytes,
        shared_gpus=shared_gpus,
        cluster_id=f"emoe-{os.getpid()}-{time.time_ns() % 10**9}",
    )


def reconfigured(config: ServeConfig) -> Reconfigured:
    """What a redeploy with this configuration changes in the control plane's settings."""
    return Reconfigured(
        workers=config.workers,
        min_workers=config.min_workers,
        max_workers=config.max_workers,
        autoscale_window_s=config.autoscale_window,
        rebalance_interval_s=config.rebalance_interval,
        drain_timeout_s=config.drain_timeout,
    )
