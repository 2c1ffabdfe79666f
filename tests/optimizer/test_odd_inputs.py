"""Files and flags with anything in them: only our own errors come out, in one line."""

from __future__ import annotations

import argparse
import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError, PlacementError, UserError
from elastic_moe.cluster.placement import Placement
from elastic_moe.cluster.setting import read_yaml
from elastic_moe.deploy.cli.plan import add_parsers
from elastic_moe.optimizer.study.generate import generate_trace
from elastic_moe.optimizer.study.scenario import make_workers
from elastic_moe.optimizer.study.traces import TraceError, count, load_trace, save_trace

quick = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 8, -1, -(2**31), 2**31, 2**63, 10**12, 10**400, 0.5, -0.0, 1e300, math.inf, math.nan]
)
TREES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def one_line(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 3000


# --- Traces -----------------------------------------------------------------------------------------------------


def archive(**members: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **members)
    return stream.getvalue()


GOOD = {
    "topk_ids": np.array([[[0, 1]], [[1, 2]], [[2, 0]]], dtype=np.uint8),
    "request_lengths": np.array([1, 2]),
    "num_logical_experts": np.int32(4),
}
ANY_ARRAY = arrays.arrays(
    st.sampled_from([np.dtype(kind) for kind in ("u1", "i2", "i8", "u8", "f4", "f8", "?", "U3", "S2", "c8", "M8[s]")]),
    arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3),
)


def read(path: Path) -> None:
    try:
        count(load_trace(path))
    except TraceError as error:
        one_line(error)


@quick
@given(members=st.dictionaries(st.sampled_from([*GOOD, "topk_weights", "other"]), ANY_ARRAY))
@example(members={"num_logical_experts": np.array(np.nan)})
@example(members={"num_logical_experts": np.array(10**12)})
@example(members={"num_logical_experts": np.array(-1)})
@example(members={"num_logical_experts": np.array(["x"])})
@example(members={"topk_ids": np.full((3, 1, 1), 32767, dtype=np.int16)})
@example(members={"request_lengths": np.array([2**63 - 1, 2**63 - 1, 5])})
@example(members={"request_lengths": np.array([2**64 - 1, 4], dtype=np.uint64)})
def test_a_trace_of_any_arrays_is_read_or_refused(members: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "trace.npz").write_bytes(archive(**(GOOD | members)))
    read(tmp_path / "trace.npz")


@quick
@given(at=st.integers(0, 10**6), put=st.binary(max_size=4), cut=st.booleans())
def test_a_damaged_trace_is_read_or_refused(at: int, put: bytes, cut: bool, tmp_path: Path) -> None:
    whole = archive(**GOOD)
    at %= len(whole)
    (tmp_path / "trace.npz").write_bytes(whole[:at] + put + (b"" if cut else whole[at + len(put) :]))
    read(tmp_path / "trace.npz")


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (10000000000000, 1, 1)}",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 1)}",
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (-1, 1, 1)}",
        b"{'descr': 'x', 'shape': ",
        b"(" * 9000,
    ],
)
def test_a_trace_with_a_lying_header_is_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    member = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n" + bytes(8)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("topk_ids.npy", member)
        file.writestr("request_lengths.npy", member)
    with pytest.raises(TraceError, match=r"trace\.npz"):
        load_trace(path)


# --- Placements -------------------------------------------------------------------------------------------------

PLACEMENT = {
    "num_layers": 1,
    "num_logical_experts": 2,
    "workers": [{"id": "a", "node": "n", "slots": 1}, {"id": "b", "node": "n", "slots": 2}],
    "slot_to_worker": [0, 1, 1],
    "physical_to_logical_map": [[0, 1, 0]],
}
WORKERS = st.lists(st.fixed_dictionaries({"id": TREES, "node": TREES, "slots": NUMBERS}), max_size=3)


@quick
@given(changes=st.dictionaries(st.sampled_from([*PLACEMENT, "other"]), TREES | WORKERS, max_size=3))
@example(changes={"num_logical_experts": 10**12})
@example(changes={"num_logical_experts": -5, "physical_to_logical_map": [], "num_layers": 0})
@example(changes={"num_logical_experts": math.inf})
@example(changes={"slot_to_worker": 5})
@example(changes={"workers": [{"id": "a", "node": "n", "slots": 10**12}]})
def test_a_placement_of_anything_is_read_or_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    try:
        path.write_text(json.dumps(PLACEMENT | changes))
    except ValueError:
        return  # more digits than Python writes
    try:
        assert Placement.load(path).num_logical_experts >= 1
    except PlacementError as error:
        one_line(error)


def test_a_placement_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "placement.json").write_text("[" * 200_000)
    with pytest.raises(PlacementError, match=r"placement\.json: not JSON"):
        Placement.load(tmp_path / "placement.json")


# --- Settings ---------------------------------------------------------------------------------------------------

FIELDS = list(ServeConfig.__dataclass_fields__)


def settings_of(path: Path) -> None:
    try:
        ServeConfig.from_mapping(read_yaml(path), source=str(path))
    except ConfigError as error:
        one_line(error)


@quick
@given(data=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), TREES, max_size=3))
@example(data={"rebalance_interval": 10**400})
@example(data={"rebalance_interval": math.inf})
@example(data={"step_timeout": math.nan})
def test_settings_of_anything_are_taken_or_refused(data: dict[str, Any]) -> None:
    try:
        config = ServeConfig.from_mapping(data)
    except ConfigError as error:
        one_line(error)
    else:
        assert all(math.isfinite(value) for value in vars_of(config) if isinstance(value, float))


def vars_of(config: ServeConfig) -> list[Any]:
    return [getattr(config, name) for name in FIELDS]


@quick
@given(text=st.text(alphabet="ab:-[]{}&*!? \n\t#|>%@'\"0129._x\x00é", max_size=40))
@example(text="model: 2001-99-99")
@example(text="workers: 0x_")
@example(text="workers: 1_:99999999999999999999999999")
@example(text="[" * 5000)
@example(text="model: !!python/object/apply:os.system [true]")
@example(text="workers: !!int x")
@example(text="workers: !!timestamp x")
@example(text="? [a]\n: b")
@example(text="a: &a [x,x,x,x,x,x,x,x]\n" + "\n".join(f"{n}: &{n} [{', '.join([f'*{p}'] * 8)}]" for p, n in
         zip("abcdefghijk", "bcdefghijkl", strict=True)) + "\nmodel: *l")  # fmt: skip
@example(text="&k model: &a [*a]")
def test_any_yaml_is_taken_or_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text(text, encoding="utf-8")
    settings_of(tmp_path / "serve.yaml")


@quick
@given(raw=st.binary(max_size=30))
def test_any_bytes_are_no_settings(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_bytes(raw)
    settings_of(tmp_path / "serve.yaml")


# --- The planning verbs -----------------------------------------------------------------------------------------

FLAGS = {
    "--workers": ["0", "-1", "1", "3", "100000000000"],
    "--nodes": ["0", "-1", "2", "100000000000"],
    "--redundant": ["-1", "2", "100000000000"],
    "--node-cores": ["0", "-1", "nan", "1", "1.5", "inf"],
    "--speeds": ["", "x", "1,1", "0,0", "nan,1", "inf,1", "1e400,1", "-1,1", ","],
    "--experts": ["0", "-1", "4", "5", "1000000000000"],
    "--worker-gbps": ["0", "-1", "nan", "inf", "1e-300"],
    "--node-gbps": ["0", "nan", "1e300"],
    "--expert-bytes": ["0", "-1", "100000000000000000000000"],
    "--horizon": ["0", "-1", "nan", "inf"],
    "--deadline": ["0", "-1", "nan", "inf", "0.01"],
    "--seed": ["-1", "100000000000000000000000"],
    "--move-share": ["-1", "nan", "0.5", "2"],
    "--semantics": ["follow"],
    "--planner": ["greedy", "random", "eplb", "contiguous", "local_search"],
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


words = st.dictionaries(st.sampled_from(list(FLAGS)), st.integers(0, 9), max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(chosen=words)
def test_planning_with_any_flags_ends_in_a_plan_or_a_line(
    chosen: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.npz"
    save_trace(path, generate_trace(num_layers=2, num_experts=4, top_k=2, num_tokens=60, num_themes=2))
    picked = {"--planner": "greedy", "--deadline": "0.01"}
    picked |= {flag: FLAGS[flag][n % len(FLAGS[flag])] for flag, n in chosen.items()}
    parser = Parser()
    add_parsers(parser.add_subparsers(required=True))
    try:
        args = parser.parse_args(["plan", str(path), "--json", *(f"{flag}={value}" for flag, value in picked.items())])
        args.run(args)
    except UserError as error:
        one_line(error)
    else:
        json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_workers_beyond_all_clusters_are_refused() -> None:
    with pytest.raises(PlacementError, match="workers"):
        make_workers(10**11, nodes=1, num_experts=4)
