"""The flags about tiers of the verbs about placements, and the memories of workers that they describe."""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.facts.tiering import cache_slots_of
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.setting import MILLION, MOST_BYTES, number_flag, size_flag, with_unit
from elastic_moe.optimizer.baselines.heuristics import greedy_table
from elastic_moe.optimizer.core.cost import price_table
from elastic_moe.optimizer.core.problem import BITS, GIGA, PlacementProblem
from elastic_moe.optimizer.residency.memory import WorkerMemory, kv_price_s

DEFAULT_DISK_GBPS = 24.0
DEFAULT_HOST_GBPS = 400.0


def tier_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device-experts",
        metavar="N",
        help="number of experts that a worker's fast memory holds in each layer, or its size for all layers, such as "
        "8GB (all fit)",
    )
    parser.add_argument(
        "--host-experts",
        metavar="N",
        help="number of further experts in each layer, or bytes for all layers, in the host's memory (none)",
    )
    parser.add_argument(
        "--disk-gbps",
        type=number_flag(float, 0.001, MILLION),
        default=DEFAULT_DISK_GBPS,
        metavar="GBPS",
        help=f"rate at which experts come from disk, in Gb/s ({DEFAULT_DISK_GBPS:g})",
    )
    parser.add_argument(
        "--host-gbps",
        type=number_flag(float, 0.001, MILLION),
        default=DEFAULT_HOST_GBPS,
        metavar="GBPS",
        help=f"rate at which experts come from the host's memory, in Gb/s ({DEFAULT_HOST_GBPS:g})",
    )
    parser.add_argument(
        "--dealt",
        action="store_true",
        help="workers deal the misses of each step among them, as CPU workers of several nodes do",
    )
    parser.add_argument(
        "--kv-sequence-bytes",
        type=size_flag(1, MOST_BYTES),
        metavar="BYTES",
        help="bytes of KV cache of one sequence: an expert stays in fast memory only if it is worth the sequences that "
        "have no room then (the KV cache has memory of its own)",
    )
    parser.add_argument(
        "--step-tokens",
        type=number_flag(int, 1, MILLION),
        metavar="N",
        help="tokens of a step of all workers, which say how many experts it needs (1024; 8 with --cache)",
    )


def memories(args: argparse.Namespace, workers: int, layers: int) -> tuple[WorkerMemory, ...]:
    """The memory of each worker; empty where --device-experts is not given. Raises ConfigError."""
    if args.device_experts is None:
        if args.host_experts is not None:
            raise ConfigError("--host-experts: it adds to --device-experts, which is not given")
        if args.dealt:
            raise ConfigError("--dealt: it is about the misses of --device-experts, which is not given")
        return ()
    device = _experts("device-experts", args.device_experts, layers, args.expert_bytes)
    host = 0 if args.host_experts is None else _experts("host-experts", args.host_experts, layers, args.expert_bytes)
    if device < layers:
        raise ConfigError(
            f"--device-experts: expected room for at least one expert in each of {counted(layers, 'layer')}, "
            f"got {args.device_experts!r}"
        )
    memory = WorkerMemory(
        device_experts=device,
        host_experts=host,
        disk_fetch_s=fetch_s(args.disk_gbps, args.expert_bytes),
        host_fetch_s=fetch_s(args.host_gbps, args.expert_bytes),
        cache_slots=cache_slots_of(device // layers),
    )
    return (memory,) * workers


def with_kv_price(args: argparse.Namespace, problem: PlacementProblem) -> PlacementProblem:
    """The problem with the price of KV cache in it, if --kv-sequence-bytes asks for it. Raises ConfigError.

    A token is worth what it takes in a step that keeps all experts in fast memory for which there is room.
    """
    if args.kv_sequence_bytes is None:
        return problem
    if not problem.memory:
        raise ConfigError("--kv-sequence-bytes: it shares the memory of --device-experts, which is not given")
    step_s = price_table(problem, greedy_table(problem, np.random.default_rng(0))).step_s
    each = kv_price_s(step_s, problem.tokens_per_step, args.expert_bytes, args.kv_sequence_bytes)
    return replace(problem, memory=tuple(replace(memory, resident_s=each) for memory in problem.memory))


def fetch_s(gbps: float, expert_bytes: int) -> float:
    """Seconds to bring one expert."""
    return expert_bytes * BITS / (gbps * GIGA)


def step_tokens(args: argparse.Namespace, default: int) -> int:
    """The tokens of a step of all workers."""
    return default if args.step_tokens is None else int(args.step_tokens)


def _experts(flag: str, given: str, layers: int, expert_bytes: int) -> int:
    """Experts over all layers: a plain number is for each layer, and one with a unit is the bytes of all."""
    number = with_unit(given, of_bytes=True)
    if number is None:
        raise ConfigError(f"--{flag}: expected a number of experts, or bytes with a unit such as 8GB, got {given!r}")
    experts = number * layers if given.strip().isdecimal() else number // max(expert_bytes, 1)
    if experts > MOST_BYTES:
        raise ConfigError(f"--{flag}: expected at most {MOST_BYTES} experts of all layers, got {given!r}")
    return experts
