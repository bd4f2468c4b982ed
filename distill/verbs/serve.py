"""`serve`: the configuration's teacher, for students in other processes."""

import signal
from typing import Any, Literal

import torch
from pytorch_lightning.cli import LightningArgumentParser

from distill.checks import check_packing
from distill.module import DistillModule
from distill.teachers.online import OnlineTeacher
from distill.teachers.server import TeacherServer
from distill.types import ConfigError
from distill.verb import Verb


class Serve(Verb):
    """Loads the teacher and answers until it is stopped."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of the server."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--host", type=str, default="127.0.0.1", help="address to listen at; 0.0.0.0: every one of this machine")
        parser.add_argument("--port", type=int, default=8100, help="0: any free one, which is printed")
        parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where the teacher runs")

    def _refuse_ranks(self, message: str) -> None:
        """There is one process."""

    def act(self, module: DistillModule, data: Any, config: Any) -> None:
        """Serve."""
        teacher = module.teacher
        if teacher is None:
            raise ConfigError("model.teacher is missing: there is nothing to serve")
        if not 0 <= config.port < 2**16:
            raise ConfigError(f"port must be between 0 and 65535, got {config.port}")
        if not isinstance(teacher, OnlineTeacher):
            raise ConfigError(
                f"model.teacher is {type(teacher).__name__} ({teacher.name}), not one model in this process; serve a configuration with an "
                "OnlineTeacher"
            )
        if teacher.sharded:
            raise ConfigError("model.teacher.sharded leaves each rank a part of the weights, but serve is one process; set sharded: false")
        if recipe := teacher.recipe_needed():
            self._make_teacher(recipe)
        data.prepare_data()
        data.setup()
        device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        task = data.task()
        half = {"bf16": torch.bfloat16, "16": torch.float16}.get(str(config.trainer.precision).partition("-")[0], torch.float32)
        teacher.setup(task, torch.device(device), half)
        teacher.check(data.tokenizer, data.model_config())
        if data.pack:
            (model,) = teacher.models()
            check_packing(task, model, "model.teacher")
        try:
            server = TeacherServer((config.host, config.port), teacher, task, data.tokenizer, data.pack)
        except OSError as error:
            raise ConfigError(f"cannot listen at {config.host}:{config.port} ({error.strerror}); take another --port") from error
        signal.signal(signal.SIGTERM, lambda *_: server.leave())
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # "the time is nearly up": the students save, and need answers for it
        print(f"serving {teacher.name} at http://{config.host}:{server.server_port}", flush=True)
        server.serve_forever()
