"""The chapters of a report, one per file, found by their class; nothing is to be listed."""

from importlib import import_module
from pkgutil import iter_modules

from distill.report.sections.base import Section


def all_sections() -> list[Section]:
    """One of each, in the order in which they are read."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return sorted((found() for found in Section.__subclasses__()), key=lambda section: section.order)
