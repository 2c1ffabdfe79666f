import numpy as np

from elastic_moe.cluster.facts.transfers import plan_transfers
from elastic_moe.cluster.placement import Worker, WorkerId, contiguous


def test_copies_are_spread_over_the_holders_and_unheld_experts_are_read() -> None:
    full = np.ones((2, 8), dtype=bool)
    full[1, 7] = False
    placement = contiguous(2, 8, [Worker(id=WorkerId("w2"), node="n", slots=8)])
    nothing = np.zeros((2, 8), dtype=bool)
    transfers = plan_transfers(placement, {WorkerId("w2"): nothing}, {WorkerId("w0"): full, WorkerId("w1"): full})
    assert len(transfers.copies) == 15
    assert abs(sum(move.source == "w0" for move in transfers.copies) - 7.5) == 0.5
    assert transfers.reads == (("w2", 1, 7),)
    everything = plan_transfers(placement, {WorkerId("w2"): nothing}, {WorkerId("w0"): full}, read_all=True)
    assert len(everything.reads) == 16
    assert not everything.copies
