"""Strategies that spread training over processes. Every module is imported, so that YAML can name its classes by their short name."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
