"""`export`: the student of a run in the formats it is deployed in."""

from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat, PositiveInt
from pytorch_lightning.cli import LightningArgumentParser

from distill.export.verb import export_student
from distill.module import DistillModule
from distill.verb import Verb

Scheme = Literal["int8", "int8-int4", "int4", "int3", "int2", "ternary"]


class Export(Verb):
    """Writes a trained student in other formats, loads each again and compares it with the student."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of the export."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--format", type=list[str] | str, default="hf", help="one or [several]: hf, packed, torchao, onnx, openvino, gguf; onnx:int8"
        )
        parser.add_argument("--precision", type=str | None, default=None, help="of formats that name none (default: each one's first)")
        parser.add_argument(
            "--out",
            type=str | None,
            default=None,
            help="folder of the exports (default: runs/NAME/export; with --ptq runs/NAME/export-ptq-SCHEME, or -SCHEME-GROUP_SIZE)",
        )
        parser.add_argument("--student", type=str | None, default=None, help="folder of the student (default: runs/NAME/student)")
        parser.add_argument("--ptq", type=Scheme | None, default=None, help="quantise the weights first, without training")
        parser.add_argument(
            "--group_size", type=PositiveInt | Literal["row"] | None, default=None, help="weights that share a scale, for --ptq"
        )
        parser.add_argument("--rows", type=PositiveInt, default=64, help="training rows to calibrate and to compare on")
        parser.add_argument(
            "--tolerance",
            type=NonNegativeFloat | None,
            default=None,
            help="largest mean KL to the student, in nats; never above half of a constant's",
        )

    def act(self, module: DistillModule, data: Any, config: Any) -> None:
        """Export."""
        export_student(data, config)
