"""`plan`: what a run will need, before it runs."""

from pkgutil import resolve_name
from typing import Any

from jsonargparse.typing import PositiveInt
from pytorch_lightning.cli import LightningArgumentParser

from distill.compress.base import Compression
from distill.module import DistillModule
from distill.plan.verb import show
from distill.verb import Verb, parsed


class Plan(Verb):
    """Prints memory, communication and hours of a run."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of the plan."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--nodes", type=PositiveInt | None, default=None, help="machines (default: trainer.num_nodes)")
        parser.add_argument("--gpus", type=PositiveInt | None, default=None, help="GPUs of each machine (default: trainer.devices)")
        parser.add_argument("--gpu_memory", type=float, default=80.0, help="of a GPU, in 10^9 bytes")
        parser.add_argument("--tflops", type=float, default=989.0, help="peak of a GPU in 10^12 operations a second (H100, bf16: 989)")
        parser.add_argument("--mfu", type=float, default=0.35, help="share of the peak that is reached")
        parser.add_argument("--bandwidth", type=float, default=50.0, help="that a GPU can send, in 10^9 bytes a second")
        parser.add_argument("--measure", action="store_true", help="run a micro-step here, with random weights, instead of --tflops")
        parser.add_argument("--teacher_sharded", action="store_true", help="each rank holds only its part of the teacher")

    def act(self, module: DistillModule, data: Any, config: Any) -> None:
        """Print."""
        show(module, data, config, self.strategy, parsed)
        if named := [path for path in self.callbacks if issubclass(resolve_name(path), Compression)]:
            print(f"Not counted: masks, scores and fake quantisers of {', '.join(path.rpartition('.')[2] for path in named)}")
