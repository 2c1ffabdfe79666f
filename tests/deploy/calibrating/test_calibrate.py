"""What `emoe calibrate` advises where its constants predict little."""

import pytest

from elastic_moe.deploy.calibrating.calibrate import advice


@pytest.mark.parametrize(
    ("steps", "load", "says"),
    [
        (18, 1.0, "run it again while nothing else runs, and give a model whose experts take most of a step"),
        (2, 1.0, "measure each placement in more steps than 2 (--steps, --turns), and give a model whose"),
        (18, 3.2, "run it while nothing else runs, since the machine was busy: 3.2 processes per core, and give"),
        (2, 3.2, "more steps than 2 (--steps, --turns), and run it while nothing else runs, since"),
    ],
)
def test_the_likely_reason_comes_first(steps: int, load: float, says: str) -> None:
    assert says in advice(steps, load)
