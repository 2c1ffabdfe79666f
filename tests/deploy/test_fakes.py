"""The fake backend answers the coordinator's questions as they are declared: `ask` sends only a method's name."""

from inspect import iscoroutinefunction, signature

import pytest

from elastic_moe.actors.coordinator.coordinator import Coordinator
from tests.deploy.fakes import FakeBackend
from tests.deploy.moving_cluster import MovingCluster

QUESTIONS = [
    name for name, method in vars(FakeBackend).items() if iscoroutinefunction(method) and hasattr(Coordinator, name)
]


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("fake", [FakeBackend, MovingCluster])
def test_questions_take_what_the_coordinators_take(fake: type[FakeBackend], name: str) -> None:
    assert signature(getattr(fake, name)) == signature(getattr(Coordinator, name))
