"""How a worker's memory is split between its experts and its KV cache."""

from elastic_moe.model.worker.budgets import kv_bytes, room_for_experts


def test_experts_leave_the_least_kv_cache_or_the_one_that_was_asked_for() -> None:
    assert room_for_experts(1000, least_kv=100, given_kv=None) == 800
    assert room_for_experts(1000, least_kv=100, given_kv=400) == 500
    assert room_for_experts(100, least_kv=100, given_kv=None) < 0


def test_the_kv_cache_has_its_share_of_what_is_left_where_all_experts_fit() -> None:
    assert kv_bytes(1000, experts_to_come=0, least=100, share=0.3, short=False) == 300
    assert kv_bytes(1000, experts_to_come=500, least=100, share=0.3, short=False) == 150


def test_the_kv_cache_gives_way_no_further_than_the_least() -> None:
    assert kv_bytes(1000, experts_to_come=0, least=500, share=0.3, short=False) == 500
    # beside the experts' cache area, which has yet to come
    assert kv_bytes(1000, experts_to_come=800, least=150, share=0.3, short=True) == 150
    assert kv_bytes(1000, experts_to_come=0, least=150, share=0.85, short=True) == 150


def test_no_more_is_given_than_there_is() -> None:
    assert kv_bytes(100, experts_to_come=0, least=500, share=0.3, short=True) == 90
    assert kv_bytes(100, experts_to_come=200, least=500, share=0.3, short=False) == 0
