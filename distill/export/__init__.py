"""Formats that a student is deployed in, one per file. Every module here is imported, so that a format is found by its class."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
