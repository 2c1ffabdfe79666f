from elastic_moe.cluster.facts.operations import HISTORY, OperationLog
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.views import Phase


def test_history_is_bounded_and_open_operations_are_kept() -> None:
    log = OperationLog()
    first = log.open("scale", Epoch(1), "to 4")
    for _ in range(3 * HISTORY):
        log.complete(log.open("rebalance", Epoch(2), "periodic").operation_id, "done")
    assert len(log.all()) <= HISTORY + 1
    assert log.find_open("scale") == first
    assert log.get(first.operation_id) == first
    assert log.find_open("rebalance") is None


def test_errors_that_were_retried_are_not_the_operations_error() -> None:
    log = OperationLog()
    operation = log.open("recover", Epoch(1), "w0 lost")
    log.note_error(operation.operation_id, "a copy failed")
    log.advance(operation.operation_id, phase=Phase.COMMITTING, epoch=Epoch(3))
    log.complete(operation.operation_id, "epoch 3")
    ended = log.get(operation.operation_id)
    assert ended is not None
    assert (ended.phase, ended.epoch, ended.reason, ended.error) == (Phase.COMPLETED, 3, "epoch 3", None)


def test_newest_first() -> None:
    log = OperationLog()
    ids = [log.open(kind, Epoch(1), "").operation_id for kind in ("start", "rebalance")]
    assert [operation.operation_id for operation in log.all()] == ids[::-1]
