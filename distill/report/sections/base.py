"""What a chapter of a report is: figures for programs, and blocks for people made of these figures alone."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from distill.report.evidence import Evidence
from distill.report.page.blocks import Block


class Section(ABC):
    """One chapter.

    Attributes:
        name: its key in `report.json`, and its anchor on the page.
        title: its heading.
        question: what it answers, in one sentence.
        order: its place.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    question: ClassVar[str]
    order: ClassVar[int]

    @abstractmethod
    def figures(self, evidence: Evidence) -> dict[str, Any]:
        """Measure.

        Returns:
            What JSON can hold. A figure with an interval is `Interval.as_dict()`; one that could not be measured is `{"missing": "why"}`.

        Raises:
            NotMeasured: nothing of the chapter can be measured.
        """

    @abstractmethod
    def blocks(self, figures: dict[str, Any]) -> list[Block]:
        """Show the figures; they come from `report.json`, so that a page can be made again without any model."""
