"""Our own verbs, one per file: `verbs/NAME.py` holds the class of its name and is the verb; nothing is to be listed."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

LIGHTNING = ("fit", "validate", "test")


def names() -> list[str]:
    """The verbs there are, without importing them."""
    return [*LIGHTNING, *(module.name for module in iter_modules(__path__))]


def command(verb: str) -> Any:
    """The class behind a verb, None for Lightning's; heavy: seconds of imports."""
    if verb in LIGHTNING:
        return None
    return getattr(import_module(f"{__name__}.{verb}"), verb.capitalize())
