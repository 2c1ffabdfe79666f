import re

from elastic_moe.actors import liveness


def test_the_table_names_every_time_out() -> None:
    constants = {name for name in vars(liveness) if name.isupper()}
    assert "HANG_S" in constants
    named = set(re.findall(r"\w+", liveness.__doc__ or ""))
    assert constants <= named, f"say in the docstring who waits for whom: {constants - named}"


def test_the_coordinator_gives_up_a_planner_before_the_api_stops_waiting() -> None:
    for deadline_s in (0.1, 10.0, 600.0):
        assert liveness.dry_run_timeout_s(deadline_s) >= 30 + liveness.plan_timeout_s(deadline_s)
        assert liveness.plan_timeout_s(deadline_s) == 2 * deadline_s + 30
