"""What every backend inherits."""

import re
from collections.abc import Sequence

import pytest

from django_socketio.backends import BaseBackend, Deliver, InvalidBackend


class Silent(BaseBackend):
    """A backend as somebody else may write one: the five methods, and nothing more."""

    def start(self, deliver: Deliver) -> None: ...
    def stop(self) -> None: ...
    def subscribe(self, topics: Sequence[str]) -> None: ...
    def unsubscribe(self, topics: Sequence[str]) -> None: ...
    def publish(self, topic: str, payload: bytes) -> int:
        return 0


def test_five_methods_are_a_backend() -> None:
    backend = Silent("silent://host")
    assert backend.url == "silent://host"
    assert backend.check() == []
    assert backend.supports_receivers
    assert backend.crosses_processes


@pytest.mark.parametrize("name", ["start", "stop", "subscribe", "unsubscribe", "publish"])
def test_a_missing_method_fails_at_construction(name: str) -> None:
    methods = {each: getattr(Silent, each) for each in BaseBackend.__abstractmethods__}
    del methods[name]
    incomplete = type("Incomplete", (BaseBackend,), methods)
    with pytest.raises(TypeError, match=name):
        incomplete()


def test_unknown_options_are_refused_by_name() -> None:
    with pytest.raises(InvalidBackend, match=re.escape("Silent does not know the option(s) a, b.")):
        Silent(b=1, a=2)
