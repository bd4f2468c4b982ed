"""docs/losses.md: a section per class, each with YAML that the command accepts."""

import inspect
import re
from pathlib import Path

import jsonargparse
import pytest
import yaml

from distill.balance.base import Balancer
from distill.losses.base import Term
from distill.types import ConfigError
from distill.usage import our_classes

TEXT = (Path(__file__).parents[1] / "docs/losses.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n", 1)[0].strip(): part for part in re.split(r"^###? ", TEXT, flags=re.MULTILINE)[1:]}
DOCUMENTED = sorted(
    cls.__name__
    for cls in our_classes()
    if issubclass(cls, Term | Balancer) and cls.__module__.startswith("distill.") and not inspect.isabstract(cls)
)


def test_there_are_terms() -> None:
    assert len(DOCUMENTED) > 30


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_class_has_a_section_with_its_yaml(name: str) -> None:
    assert name in SECTIONS, f"docs/losses.md has no section '### {name}'"
    assert re.search(rf"```yaml\n.*\b{name}\b.*?```", SECTIONS[name], re.DOTALL), f"the section of {name} shows no YAML with it"


@pytest.mark.parametrize("name", [name for name, text in SECTIONS.items() if "```yaml" in text])
def test_its_yaml_makes_objects(name: str) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--losses", type=dict[str, Term])
    parser.add_argument("--balancer", type=Balancer)
    for block in re.findall(r"```yaml\n(.*?)```", SECTIONS[name], re.DOTALL):
        model = yaml.safe_load(block)["model"]
        given = {key: model[key] for key in ("losses", "balancer") if key in model}
        assert given
        try:
            parser.instantiate_classes(parser.parse_object(given))
        except ConfigError as error:
            if "needs torchjd" not in str(error):  # its solver is optional
                raise
