"""`cost`: what teacher, student and exports of a run cost where they are served."""

from typing import Any

from jsonargparse.typing import PositiveInt
from pytorch_lightning.cli import LightningArgumentParser

from distill.export.costs import show
from distill.module import DistillModule
from distill.verb import Verb


class Cost(Verb):
    """Measures quality, size, latency, throughput, memory and energy, in turn."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of the measurement."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--rows", type=PositiveInt, default=256, help="validation rows that the quality is measured on")
        parser.add_argument("--batch", type=PositiveInt, default=8, help="rows of the large batch")
        parser.add_argument("--rounds", type=PositiveInt, default=20, help="how often each is timed at either size")

    def act(self, module: DistillModule, data: Any, config: Any) -> None:
        """Measure."""
        show(module, data, config)
