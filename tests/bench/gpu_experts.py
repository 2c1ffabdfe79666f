"""How long a GPU takes for the experts of a layer: `python -m tests.bench.gpu_experts [--rows 1,8,32,128,256,1024]`.

Rows choose 8 of 64 experts at random, others in each of 16 turns, which are one CUDA graph, so that caches hold little
of what a turn reads, and launches cost nothing. For each form of the experts, every way that can compute it: pair by
pair, the grouped product of packed experts, and torch's grouped product, for which packed experts are unpacked first.
The floor is the time to read the chosen experts once, at the rate of reading a large tensor. Writes gpu-experts.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.experts.interface import Tensors
from elastic_moe.model.experts.packed_trial import matrices
from elastic_moe.model.experts.stacked import StackedExperts
from elastic_moe.model.experts.unpacking import Packing
from tests.bench.gpu import free, measure_rates
from tests.bench.machine import where_and_when
from tests.bench.report import markdown

HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 1024, 64, 8
TURNS = 16
WAYS = {"pair by pair": (1 << 30, 0), "packed, grouped": (0, 1 << 30), "torch's grouped product": (0, 0)}
"""Most pairs of model/gpu/few.py, and most rows of a slot of model/gpu/grouped.py."""
MOST_PAIRS = 1024
"""Of pair by pair: with more it takes long, and no caller asks for it."""


class Module(nn.Module):
    """An expert module as transformers has them, without weights."""

    is_transposed = has_bias = False
    has_gate = True
    num_experts = EXPERTS

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def drawn(form: ExpertForm, sizes: dict[str, tuple[int, int]], device: torch.device) -> Tensors:
    """One expert with random codes, and matrices [N, K] of these names and sizes."""
    made: Tensors = {}
    g = torch.Generator().manual_seed(0)
    for name, (outputs, inputs) in sizes.items():
        if form is ExpertForm.PLAIN:
            made[name] = torch.randn(outputs, inputs, generator=g).bfloat16() * inputs**-0.5
        else:
            made |= {part: tensor[0] for part, tensor in matrices(name, form, 1, outputs, inputs, g).items()}
    return {name: tensor.to(device) for name, tensor in made.items()}


def layer_of(form: ExpertForm, device: torch.device) -> StackedExperts:
    packing = None if form is ExpertForm.PLAIN else Packing(form, torch.bfloat16, torch.device("cuda", 0))
    layer = StackedExperts(Module(), kernels=True, packing=packing)
    layer.reserve(EXPERTS)
    tensors = drawn(form, {"gate_up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}, device)
    for expert in range(EXPERTS):
        # the same numbers in memory of their own
        layer.put(expert, tensors, borrowed=True)
    layer.keep_only(set(range(EXPERTS)))
    return layer


def choices(rows: int, device: torch.device) -> list[Tensor]:
    """[R, K] of each turn."""
    g = torch.Generator().manual_seed(rows)
    return [torch.rand(rows, EXPERTS, generator=g).argsort(1)[:, :TOP_K].to(device) for _ in range(TURNS)]


def graph_s(run: Callable[[], None]) -> float:
    """Seconds of the device for what `run` launches."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        graph.replay()
    begin.record()
    for _ in range(5):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,32,128,256,1024")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU and a torch built for it; there is none here", file=sys.stderr)
        return 2
    from elastic_moe.model.gpu import few, grouped

    device, found = torch.device("cuda"), []
    rate = measure_rates().read_bytes_per_s
    for form in ExpertForm:
        layer = layer_of(form, device)
        per_expert = layer.nbytes / EXPERTS
        for rows in (int(n) for n in args.rows.split(",")):
            x, weight = (torch.randn(rows, size, device=device).bfloat16() for size in (HIDDEN, TOP_K))
            indices = choices(rows, device)
            active = sum(index.unique().numel() for index in indices)
            row = [str(form), str(rows), f"{active * per_expert / rate / TURNS * 1e6:.0f}"]
            for way, (few.MOST_PAIRS, grouped.MOST_ROWS) in WAYS.items():
                if (way == "pair by pair" and rows * TOP_K > MOST_PAIRS) or (
                    way == "packed, grouped" and form is ExpertForm.PLAIN
                ):
                    row.append("")
                    continue

                def turns(layer: StackedExperts = layer, x: Tensor = x, weight: Tensor = weight) -> None:
                    for index in indices:  # noqa: B023 - it is called in this turn alone
                        layer.forward(x, index, weight)

                row.append(f"{graph_s(turns) / TURNS * 1e6:.0f}")
            print(*row, flush=True)
            found.append(row)
        del layer
        free()
    about = "; ".join(f"{name} {value}" for name, value in where_and_when().items())
    text = f"{about}; {torch.cuda.get_device_name()}; microseconds of a layer\n\n"
    text += markdown(("experts", "rows", "floor", *WAYS), found)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu-experts.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
