"""The table of families: what the floor counts, what a row says, and which blocks the measured sequences get."""

from __future__ import annotations

import pytest

from elastic_moe.cluster.fit import CodePath, FitNotes, FitReport, Part
from elastic_moe.cluster.messages.epochs import WindowRoom
from tests.bench.families import CASES, CONTEXT, HEAD, WIDE, Measured, arguments_of, decode_floor_s, row
from tests.bench.machine import Floor, Machine
from tests.bench.workers import BLOCK, Case, Load


def test_a_step_reads_and_writes_states() -> None:
    machine = Machine(read_gb_per_s=10.0, gemm_gflop_per_s=1e9)
    floor = Floor(layers=1, experts=2, top_k=1, expert_parameters=10, trunk_parameters=100, kv_numbers_per_token=4)
    without = floor.decode_step_ms(8, CONTEXT, machine) / 1e3
    assert decode_floor_s(floor, 8, machine, 0) == without
    assert decode_floor_s(floor, 8, machine, 5000) == pytest.approx(without + 2 * 8 * 5000 / 10e9)


def test_a_row_names_what_is_not_native() -> None:
    notes = FitNotes()
    notes.add(Part.ATTENTION, "layers", CodePath.NATIVE)
    notes.add(Part.ATTENTION_HALF, "layers", CodePath.TRANSFORMERS, "sinks")
    notes.add(Part.LINEARS, "others", CodePath.TORCH, "too small")
    cells = row(Measured(family="some", shares=(0.5, 0.61, 0.7, 0.8), report=FitReport(rows=notes.rows())))
    assert cells == ["some", "50%", "61%", "70%", "80%", "attention half, linears"]
    assert len(cells) == len(HEAD)


def test_cases_of_the_tests_are_made_wide() -> None:
    assert WIDE.keys() <= set(CASES)
    made = arguments_of("qwen3_next")
    assert (made["hidden"], made["linear_key_head_dim"], made["family"]) == (1024, 128, "qwen3_next")
    assert arguments_of("afmoe")["family"] == "afmoe"


@pytest.mark.parametrize(("context", "steps"), [(160, 24), (2048, 0)])
def test_sequences_have_blocks_for_all_tokens_and_share_none(context: int, steps: int) -> None:
    case = Case(requests=3, context=context, steps=steps, most_requests=3)
    load = Load(case, 0, 0, 1, 50, WindowRoom(tokens=128, blocks=3 * 150))
    plans = [load.prefill(), *(load.decode() for _ in range(steps))]
    seen: list[set[int]] = []
    for n in range(3):
        chunks = [plan.chunks[n] for plan in plans]
        assert all(len(chunk.block_ids) * BLOCK >= chunk.start + chunk.length for chunk in chunks)
        windows = [chunk.windows for chunk in chunks if chunk.windows is not None]
        assert len(windows) == len(chunks)
        assert all(len(one.ids) * BLOCK >= chunk.known for one, chunk in zip(windows, chunks, strict=True))
        # what a step reads and writes lies in different blocks
        reach = [one.ids[-(128 + context) // BLOCK :] if context < 1000 else one.ids for one in windows]
        assert all(len(set(ids)) == len(ids) for ids in reach)
        seen.append({block for one in windows for block in one.ids})
    assert not (seen[0] & seen[1] | seen[1] & seen[2] | seen[0] & seen[2])
    assert max(set().union(*seen)) < 3 * 150


def test_too_little_room_for_windows_is_said() -> None:
    with pytest.raises(ValueError, match="no room for windows of 128 tokens of 3 sequences"):
        Load(Case(requests=3, context=160, steps=1, most_requests=3), 0, 0, 1, 50, WindowRoom(tokens=128, blocks=40))
