from types import SimpleNamespace
from typing import Any

import pytest

from distill.parallel import through as room
from distill.parallel.through import through
from tests import pair
from tests.callbacks.tiny import Tiny


class Asked(Tiny):
    def asked(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


def test_where_weights_are_whole_the_method_is_called() -> None:
    trainer = pair.trainer()
    trainer.strategy._lightning_module = Asked()
    assert through(trainer, "asked", 1, key=2) == ((1,), {"key": 2})


def test_where_they_are_in_shards_what_gathers_them_is_called_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module, wrapped, called = Asked(), object(), []

    def redirect(*args: Any, **kwargs: Any) -> str:
        called.append((args, kwargs))
        return "gathered"

    strategy = SimpleNamespace(model=wrapped, _forward_redirection=redirect)
    monkeypatch.setattr(room, "shards_parameters", lambda _: True)
    trainer: Any = SimpleNamespace(lightning_module=module, strategy=strategy)
    assert through(trainer, "asked", 1, key=2) == "gathered"
    assert called == [((wrapped, module, "asked", 1), {"key": 2})]
