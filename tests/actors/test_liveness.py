import re

from elastic_moe.actors import liveness


def test_the_table_names_every_time_out() -> None:
    constants = {name for name in vars(liveness) if name.isupper()}
    assert "HANG_S" in constants
    named = set(re.findall(r"\w+", liveness.__doc__ or ""))
    assert constants <= named, f"say in the docstring who waits for whom: {constants - named}"
