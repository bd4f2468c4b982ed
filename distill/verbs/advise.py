"""`advise`: what to do with a model that is too big, too slow, or may lose no more than so much. It reads no YAML: it writes one."""

import sys
from argparse import RawDescriptionHelpFormatter
from typing import Any, Literal

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import PositiveInt

from distill.advise.ask import Question, answer
from distill.types import ConfigError
from distill.usage import explain

ABOUT = """\
What to do with a model before weeks of GPUs are spent on it: export, train in few bits, prune, distil, or several of these.

It looks at the model's configuration, times it and two of its layers in every runtime that is installed here, counts what each form would
weigh, take and cost, and says what to type. The weights are read only with --data.

  python train.py advise --teacher my/bert --target size --budget "30 MB"
  python train.py advise --teacher my/bert --target latency --budget "50 %" --hours 8
  python train.py advise --teacher my/bert --target quality --budget "1 point" --data texts.txt --out advice.json
"""


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the examples as they are."""


class Parser(ArgumentParser):
    """Says a mistake in one line."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise what the command line shows."""
        keys = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        raise ConfigError(explain(message, keys).replace("give a config, e.g. --config kd_llama.yaml", "see advise --help"))


class Advise:
    """Parses its own options, and answers; the command line is in `sys.argv`, as LightningCLI's verbs take it."""

    def __init__(self) -> None:
        answer(question(sys.argv[2:]))


def question(args: list[str]) -> Question:
    """Read the options.

    Raises:
        ConfigError: one is missing, unknown or has a value that it cannot have.
    """
    parser = Parser(prog="train.py advise", description=ABOUT, formatter_class=Help)
    parser.add_argument("--teacher", type=str, required=True, help="the model: a folder of transformers, or a hub id")
    parser.add_argument("--target", type=Literal["size", "latency", "quality"], required=True, help="what the budget limits")
    parser.add_argument("--budget", type=str, required=True, help='"500 MB" · "20 ms" · "30 %" of the teacher · "1 point" · "0.05 nats"')
    parser.add_argument("--task", type=Literal["causal-lm", "classification"] | None, default=None, help="(default: as its config says)")
    parser.add_argument("--hours", type=float | None, default=None, help="that there are for training (default: as many as it takes)")
    parser.add_argument(
        "--tokens", type=PositiveInt | None, default=None, help="to train on (default: a rule of thumb, see docs/advise.md)"
    )
    parser.add_argument("--length", type=int, default=128, help="tokens of a row that is timed and trained on")
    parser.add_argument(
        "--data", type=str | None, default=None, help="a text of yours: what rounding costs is measured on it, on the weights"
    )
    parser.add_argument(
        "--tflops", type=float | None, default=None, help="peak of a GPU that will train (default: training on this machine)"
    )
    parser.add_argument("--gpus", type=int, default=1, help="how many of these")
    parser.add_argument("--out", type=str | None, default=None, help="write the figures here, e.g. advice.json, and the YAML beside it")
    given = parser.parse_args(args)
    return Question(**given.as_dict())
