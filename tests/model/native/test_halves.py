"""The parts of the library for different CPUs compute the same: AVX2, AVX-512, and the matrix unit.

Sums of floats differ in their last bits. Sums of integers are exact.

This machine's library is compared with one compiled for AVX2 alone, and with itself while it does not use the unit. On
a machine without the unit its instructions are emulated (emulated_tiles.h).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.int8 import quantize
from elastic_moe.model.native.attention import Rules, attend_apart
from elastic_moe.model.native.block import Norm
from elastic_moe.model.native.experts import NativeExperts
from elastic_moe.model.native.linear import linear, pack, pack4, pack8, pack_nvfp4, round4
from elastic_moe.model.rms_norm import LayerNorm
from elastic_moe.model.states.recurrent import (
    DeltaInputs,
    SelectiveInputs,
    Slots,
    convolve,
    delta_rule,
    selective_update,
)
from tests.model.native import forms
from tests.model.native.forms import FLOATS, GATES, draw, expert, in_form, module, sizes
from tests.model.native.test_experts import routing
from tests.paths import ROOT

library_module = import_module("elastic_moe.model.native.library")
"""Not the function of that name."""
SOURCES = (
    "layer/attention.cpp",
    "layer/trunk.cpp",
    "moe/experts.cpp",
    "products/forms.cpp",
    "products/four_bits.cpp",
    "products/linear.cpp",
    "products/tiles.cpp",
    "states/convolution.cpp",
    "states/delta.cpp",
    "states/mamba2.cpp",
)
NEITHER, OFF, ON = -1, 0, 1
"""Arguments of `emoe_tiles`."""


WITH_TILES = ("avx512vbmi", "avx512_bf16", "avx512_vnni")
"""What the code for the matrix unit needs beside it, by the names in /proc/cpuinfo."""


@pytest.fixture(scope="module")
def avx2(lib: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    flags = tuple(flag.replace("native", "haswell") for flag in library_module._FLAGS)
    return compiled(flags, tmp_path_factory.mktemp("avx2"))


@pytest.fixture(scope="module")
def tiles(lib: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A library that uses the matrix unit, or emulates it."""
    if lib.emoe_tiles(NEITHER):
        return lib
    if missing := [flag for flag in WITH_TILES if flag not in library_module._cpu_flags()]:
        pytest.skip(f"the code for the matrix unit (AMX) needs {', '.join(missing)} too")
    emulated = ("-DEMOE_EMULATED_TILES", "-include", str(Path(__file__).parent / "emulated_tiles.h"))
    flags = (*emulated, "-mamx-tile", "-mamx-bf16", "-mamx-int8", *library_module._FLAGS)
    return compiled(flags, tmp_path_factory.mktemp("tiles"))


def compiled(flags: Sequence[str], folder: Path) -> ctypes.CDLL:
    """The library, or most of it, compiled with other flags."""
    target = folder / "native.so"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library_module, "_FLAGS", tuple(flag.replace("-O3", "-O1") for flag in flags))
        library_module._compile("c++", [library_module._SOURCES / name for name in SOURCES], target)
    loaded = ctypes.CDLL(str(target))
    for name, signature in library_module._SIGNATURES.items():
        if hasattr(loaded, name):
            function = getattr(loaded, name)
            function.argtypes = [library_module._TYPES[kind] for kind in signature.partition(">")[0]]
    return loaded


@pytest.fixture
def both(tiles: ctypes.CDLL) -> Iterator[Callable[[Callable[[], Tensor]], tuple[Tensor, Tensor]]]:
    """What a function returns by the matrix unit, and without it."""

    def compute(run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        assert tiles.emoe_tiles(ON) == ON
        by_unit = run()
        assert tiles.emoe_tiles(OFF) == OFF
        return by_unit.float(), run().float()

    yield compute
    tiles.emoe_tiles(ON)


def near(one: Tensor, other: Tensor) -> bool:
    """Whether two results are the same but for a rounding to bfloat16 of what they are sums of."""
    return bool((one - other).abs().max() <= 2**-6 * (one.abs().max() + 1))


def choices(form: ExpertForm) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, and their experts with weights: one expert has many rows, and the others few."""
    x, (index, weight) = draw(1, 90, sizes(form)[0]), routing(2, 90, 2, [0, 1, 2], 3)
    index[30:, 0] = index[30:, 1] = -1
    index[60:, 0] = 1
    return x, index, weight


def experts(lib: ctypes.CDLL, form: ExpertForm) -> NativeExperts:
    made = NativeExperts(lib, module(None, 3), GATES["silu"], form)
    for e in range(3):
        made.put(e, in_form(lib, form, expert(e, *sizes(form), biased=True, transposed=False), False)[0])
    return made


@pytest.mark.parametrize("form", ExpertForm)
def test_experts_have_the_same_bits_with_avx2(lib: ctypes.CDLL, avx2: ctypes.CDLL, form: ExpertForm) -> None:
    one, other = experts(lib, form), NativeExperts(avx2, module(None, 3), GATES["silu"], form)
    for e in range(3):
        other.put(e, one.get(e))
    outputs = [half.forward(*choices(form)).float() for half in (one, other)]
    assert near(*outputs) if form in FLOATS else torch.equal(*outputs)


@pytest.mark.parametrize("form", [form for form in ExpertForm if form not in FLOATS])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17])
def test_few_and_many_rows_have_the_same_bits_with_avx2(
    lib: ctypes.CDLL, avx2: ctypes.CDLL, form: ExpertForm, count: int
) -> None:
    one, other = experts(lib, form), NativeExperts(avx2, module(None, 3), GATES["silu"], form)
    other.put(0, one.get(0))
    x = draw(1, count, 296)
    index, weight = torch.zeros(count, 1, dtype=torch.long), torch.ones(count, 1)
    assert torch.equal(*(half.forward(x, index, weight) for half in (one, other)))


@pytest.mark.parametrize("form", ExpertForm)
def test_experts_have_the_same_bits_without_the_matrix_unit(
    tiles: ctypes.CDLL, both: Callable[[Callable[[], Tensor]], tuple[Tensor, Tensor]], form: ExpertForm
) -> None:
    held, (x, index, weight) = experts(tiles, form), choices(form)
    together = both(lambda: held.forward(x, index, weight))
    assert near(*together) if form in FLOATS else torch.equal(*together)
    some = torch.tensor([3, 29, 89])
    alone = both(lambda: held.forward(x[some], index[some], weight[some]))
    for few, many in zip(alone, together, strict=True):
        assert torch.equal(few, many[some])


@pytest.mark.parametrize(("rows", "depth"), [(1, 30), (16, 32), (17, 290), (32, 64), (101, 4126)])
def test_products_are_the_same_without_the_matrix_unit(
    tiles: ctypes.CDLL, both: Callable[[Callable[[], Tensor]], tuple[Tensor, Tensor]], rows: int, depth: int
) -> None:
    x, packed = draw(1, rows, depth), pack(tiles, draw(2, 70, depth))
    by_unit, without = both(lambda: linear(x, packed, None))
    assert near(by_unit, without)
    _, alone = both(lambda: linear(x[-1:], packed, None))
    assert torch.equal(alone, without[-1:])


@pytest.mark.parametrize(("rows", "depth"), [(1, 30), (4, 128), (5, 128), (101, 1054)])
def test_products_with_8_bits_have_the_same_bits_everywhere(
    lib: ctypes.CDLL, avx2: ctypes.CDLL, tiles: ctypes.CDLL, rows: int, depth: int
) -> None:
    x, matrix, bias = draw(1, rows, depth), quantize(draw(2, 200, depth)), draw(3, 200)
    outputs = [linear(x, pack8(half, *matrix), bias) for half in (lib, avx2, tiles)]
    tiles.emoe_tiles(OFF)
    outputs.append(linear(x, pack8(tiles, *matrix), bias))
    tiles.emoe_tiles(ON)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("form", [ExpertForm.INT4, ExpertForm.INT4_HALF, ExpertForm.MXFP4])
@pytest.mark.parametrize(("rows", "depth"), [(1, 30), (7, 128), (8, 128), (101, 1054)])
def test_products_with_4_bits_have_the_same_bits_everywhere(
    lib: ctypes.CDLL, avx2: ctypes.CDLL, tiles: ctypes.CDLL, form: ExpertForm, rows: int, depth: int
) -> None:
    codes, scales, zeros = round4(lib, draw(2, 200, depth))
    scales = scales.to(torch.float16 if form is ExpertForm.INT4_HALF else torch.bfloat16)
    x, matrix, bias = draw(1, rows, depth), (codes, scales, None if form is ExpertForm.MXFP4 else zeros), draw(3, 200)
    outputs = [linear(x, pack4(half, *matrix, form), bias) for half in (lib, avx2, tiles)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("form", [ExpertForm.MXFP8, ExpertForm.NVFP4])
@pytest.mark.parametrize(("rows", "depth"), [(1, 16), (3, 128), (16, 176), (17, 304), (32, 512), (101, 4400)])
def test_products_with_exact_scales_have_the_bits_of_unpacked_ones(
    lib: ctypes.CDLL, avx2: ctypes.CDLL, tiles: ctypes.CDLL, form: ExpertForm, rows: int, depth: int
) -> None:
    """By each kind of CPU, for any number of rows. Columns have scales of all sizes that leave numbers normal."""
    random = torch.Generator().manual_seed(rows)
    if form is ExpertForm.NVFP4:
        codes, scales, each = forms.draw_nvfp4(random, 80, depth)
        scales[:40] = torch.arange(40 * scales.shape[1]).view(40, -1) % 255
        scales[scales & 127 == 127] = 0  # not a number
        each = each.log2().round().exp2()
        weights = forms.times_scales(codes, scales, each)
    else:
        codes = torch.randint(0, 256, (80, depth), generator=random, dtype=torch.uint8)
        codes[codes & 127 == 127] = 128  # not a number
        scales = torch.randint(110, 140, (80, -(-depth // 32)), generator=random, dtype=torch.uint8)
        scales[20:40], scales[40:60] = 60, 246
        scales[60:70], codes[60:70] = 254, codes[60:70] & 0x8F  # below 2^-5
        scales[70:], codes[70:] = 0, codes[70:] & 0x80
        weights = forms.times_powers(codes.view(torch.float8_e4m3fn), scales)
    assert torch.equal(weights.bfloat16().float(), weights)
    x = draw(1, rows, depth, scale=2**-20)

    def check(half: ctypes.CDLL) -> Tensor:
        if form is ExpertForm.NVFP4:
            packed = pack_nvfp4(half, codes, scales, each)
        else:
            packed = pack8(half, codes.view(torch.int8), scales, form)
        found = linear(x, packed, None)
        assert torch.equal(found, linear(x, pack(half, weights.bfloat16()), None))
        assert torch.equal(linear(x[-1:], packed, None), found[-1:])
        return found

    without = check(lib)
    check(avx2)
    check(tiles)
    tiles.emoe_tiles(OFF)
    assert torch.equal(check(tiles), without)
    tiles.emoe_tiles(ON)


def test_only_weights_below_2_to_the_minus_118_may_count_as_0(lib: ctypes.CDLL, avx2: ctypes.CDLL) -> None:
    codes = torch.randint(0, 127, (64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes[::2] = codes[::2] % 9
    powers = torch.arange(32, dtype=torch.uint8).repeat(2)[:, None].repeat(1, 2)
    x = torch.ones(3, 64, dtype=torch.bfloat16)
    weights = forms.times_powers(codes.view(torch.float8_e4m3fn), powers).double()
    most, least = weights.sum(1), torch.where(weights < 2.0**-118, 0, weights).sum(1)
    for half in (lib, avx2):
        got = linear(x, pack8(half, codes.view(torch.int8), powers, ExpertForm.MXFP8), None).double()
        assert ((got <= most * (1 + 2**-8)) & (got >= least * (1 - 2**-8))).all()


@pytest.mark.parametrize(("queries", "key_size", "value_size"), [(1, 64, 64), (40, 128, 80), (40, 24, 16)])
def test_attention_is_the_same_without_the_matrix_unit(
    tiles: ctypes.CDLL,
    both: Callable[[Callable[[], Tensor]], tuple[Tensor, Tensor]],
    queries: int,
    key_size: int,
    value_size: int,
) -> None:
    query, key, value = draw(1, 3, queries, key_size), draw(2, 3, 300, key_size), draw(3, 3, 300, value_size)
    rules = Rules(scale=key_size**-0.5, window=None, softcap=None, sinks=None)
    by_unit, without = both(lambda: attend_apart(tiles, query, key, value, rules))
    assert near(by_unit, without)
    _, alone = both(lambda: attend_apart(tiles, query[:, -1:], key, value, rules))
    assert torch.equal(alone, without[-1:])


def test_without_the_kernels_leave_the_unit_is_not_used(lib: ctypes.CDLL) -> None:
    """The kernel refuses a process whose stack for signals is too small for the state of tiles."""
    if not lib.emoe_tiles(NEITHER):
        pytest.skip("this CPU has no matrix unit (AMX), or its kernel does not let it be used")
    done = subprocess.run(
        [sys.executable, "-c", SMALL_STACK], env=os.environ, capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.stdout.split() == ["0", "0", "True"], done.stderr


SMALL_STACK = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(6144)
ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 6144)), None)
import torch
from elastic_moe.model.native import library
from elastic_moe.model.native.linear import linear, pack, pack4, pack8, round4
lib = library()
x = torch.ones(40, 64, dtype=torch.bfloat16)
print(lib.emoe_tiles(-1), lib.emoe_tiles(1), bool((linear(x, pack(lib, x), None) == 64).all()))
"""


@pytest.mark.parametrize("size", [40, 64])
def test_both_normalise_alike(lib: ctypes.CDLL, avx2: ctypes.CDLL, size: int) -> None:
    g = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(size, generator=g), torch.randn(size, generator=g)
    formula = LayerNorm(weight=weight, bias=bias, epsilon=1e-5)
    x = torch.randn(5, size, generator=g).bfloat16()
    one, other = (Norm(lib=library, formula=formula)(x) for library in (lib, avx2))
    assert near(one.float(), other.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 300, 4099])
def test_both_find_the_most_likely_token(
    lib: ctypes.CDLL, avx2: ctypes.CDLL, vocabulary: int, dtype: torch.dtype
) -> None:
    """The first one of equal ones, and none of numbers that are none."""
    g = torch.Generator().manual_seed(vocabulary)
    # few values, so that most rows have their largest one several times
    rows = torch.randint(-3, 3, (40, vocabulary), generator=g).to(dtype)
    rows[:8] = torch.randn(8, vocabulary, generator=g).to(dtype)
    rows[8:12, vocabulary // 2 :] = -torch.inf
    broken = (torch.nan, torch.inf, -torch.inf)
    for row, value in zip((12, 13, 14), broken, strict=True):
        rows[row, -1 if value == value and value > 0 else 0] = value
    rows[15] = -torch.inf
    best = rows.float().max(1)
    expected = torch.where(best.values.isfinite(), rows.float().argmax(1), -1)
    for half in (lib, avx2):
        tokens = torch.empty(len(rows), dtype=torch.int64)
        half.emoe_most_likely(rows.data_ptr(), dtype == torch.float32, *rows.shape, tokens.data_ptr())
        assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("size", [24, 64])
@pytest.mark.parametrize("rule", ["selective", "delta"])
def test_both_update_states_alike(lib: ctypes.CDLL, avx2: ctypes.CDLL, size: int, rule: str) -> None:
    """Matrices [6, size] of each head: it has rows that no group of four takes."""
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    selective = SelectiveInputs(
        x=draw(2, 4, 6).bfloat16(),
        steps=draw(2, 4).bfloat16(),
        read=draw(2, 2, size).bfloat16(),
        written=draw(2, 2, size).bfloat16(),
        rates=-draw(4).abs(),
        shift=draw(4),
        skip=draw(4),
        softplus=True,
    )
    delta = DeltaInputs(
        query=draw(2, 2, 6).bfloat16(),
        key=draw(2, 2, 6).bfloat16(),
        value=draw(2, 4, size).bfloat16(),
        gates=-draw(2, 4).abs(),
        beta=draw(2, 4).sigmoid(),
        unit=True,
    )
    states = draw(4, 4, 6, size)
    results = []
    for library in (lib, avx2):
        own = states.clone()
        slots = Slots(states=own, sources=torch.tensor([0, 1]), targets=torch.tensor([2, 3]))
        out = selective_update(library, selective, slots) if rule == "selective" else delta_rule(library, delta, slots)
        results.append((out.float(), own))
    assert all(near(one, other) for one, other in zip(*results, strict=True))
    assert torch.equal(results[0][1][:2], states[:2])


@pytest.mark.parametrize(("channels", "width"), [(40, 4), (64, 4), (40, 3)])
def test_both_convolve_alike(lib: ctypes.CDLL, avx2: ctypes.CDLL, channels: int, width: int) -> None:
    """By the formula too: the usual width has code of its own, but for channels that fill no register."""
    g = torch.Generator().manual_seed(3)
    x, bias = (torch.randn(shape, generator=g).bfloat16() for shape in ((2, channels), (channels,)))
    weight = torch.randn(channels, width, generator=g).bfloat16()
    states = torch.randn(4, channels, width, generator=g).bfloat16()
    inputs = torch.cat((states[:2, :, 1:], x[:, :, None]), -1)
    expected = (inputs.float() * weight.float()).sum(-1) + bias.float()
    for library in (lib, avx2):
        own = states.clone()
        slots = Slots(states=own, sources=torch.tensor([0, 1]), targets=torch.tensor([2, 3]))
        out = convolve(library, x, weight, bias, slots, silu=False)
        assert torch.equal(own[2:], inputs)
        assert torch.equal(own[:2], states[:2])
        assert near(out.float(), expected)
