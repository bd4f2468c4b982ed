"""The command. Answers `--help` and a wrong verb or config name before the heavy imports, and shows mistakes as one line."""

import logging
import os
import sys
from contextlib import nullcontext, redirect_stdout
from functools import partial

from distill import __version__, launch, signals, verbs
from distill.lookup import did_you_mean, find_config

VERBS = (*verbs.names(), "submit")

HELP = """\
distill: train a small student from a frozen teacher. One YAML, one command.

  python train.py --config kd_llama.yaml                 train (fit is the default verb)
  python train.py validate --config runs/NAME/config.yaml --ckpt_path last      or test
  python train.py plan --config kd_llama.yaml --nodes 1 --gpus 8    memory, communication and hours before it runs
  python train.py consolidate --config runs/NAME/config.yaml --ckpt_path last   a checkpoint's student, for transformers
  python train.py submit --config kd_llama.yaml --nodes 2 --gpus 8 --time 4:00:00   as a Slurm job; see --dry-run
  python train.py export --config runs/NAME/config.yaml --format openvino    loaded again and compared with the student
  python train.py cost   --config runs/NAME/config.yaml  size, latency, throughput, memory, energy, side by side
  python train.py shrink --config kd_llama_minitron.yaml --out FOLDER        cut a student out of a model, no training
  python train.py cache  --config kd_llama_cached.yaml   the targets of a teacher to disk, once; trained without it
  python train.py serve  --config kd_llama.yaml          the teacher, for students in other processes
  python train.py report --config runs/NAME/config.yaml  what the student kept and lost; `report runs/A runs/B` compares
  python train.py advise --teacher MODEL --target size --budget "30 MB"   what to do with a model, before training
  python train.py fit --help                             every key there is

A bare config name is looked up here, then in configs/. Any key of the YAML can be given on the command line:

  --model.losses.kd.temperature=4      T of the soft labels (a loss is named by its key under model.losses)
  --model.losses.mine my_losses.Mine   add a loss of your own, from my_losses.py in this folder
  --model.balancer.weights.kd=2        its weight in the objective
  --model.optimizer.lr=3e-4            peak learning rate
  --model.teacher.model=PATH_OR_HUB_ID a folder of transformers, or a hub id
  --data.train_data=FILE_OR_HUB_ID     your own texts (data classes: TextData, PromptData, ChatData, ClassificationData)
  --data.batch_size=8                  sequences per device and micro-batch
  --trainer.max_steps=1000             optimizer steps
  --trainer.precision=bf16-mixed       numbers of the forward and backward pass; losses are always float32 inside
  --trainer.accumulate_grad_batches=4  micro-batches a step
  --trainer.devices=8                  GPUs of this machine
  --trainer.strategy=zero2             how they share the work: ddp, zero1, zero2, zero3, fsdp2; see docs/scale.md
  --seed_everything=1                  initialisation and data order

  --name NAME        the run's folder, runs/NAME (default: the config's name and the time); never overwritten
  --ckpt_path last   go on where runs/NAME stopped (with --name NAME or --config runs/NAME/config.yaml)
  --save_every 100   optimizer steps between checkpoints; --keep 2 of them stay; --save_async true: beside training
  --logger wandb     track in Weights & Biases, offline where there is no key or network; metrics.jsonl is always there
  --baseline true    also train the same student alone, same initialisation, data order and steps, for the table
  --alone true       train only that student alone, without the teacher
  --report_rows 512  held-out rows that the report at the end looks at; 0: no report
  --dry-run          check everything and show what would run, without training
  --version          print the version

Ctrl-C saves at the end of the step and stops; twice leaves at once. SIGTERM and SIGUSR1 save, and requeue a Slurm job.
Exit status: 0 done · 2 a mistake in what was asked · stopped, to go on later: 130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM ·
75 another rank is lost
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 done, 2 a mistake in what was asked, 128 + its number after a signal: 130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if args[0] == "--version":
        print(__version__)
        return 0
    if args[0].startswith("-"):
        args.insert(0, "fit")
    if args[0] not in VERBS:
        return _mistake(f"no verb '{args[0]}'{did_you_mean(args[0], VERBS)}; the verbs are {', '.join(VERBS)}")
    if args[0] == "submit":
        return _submit(args[1:])
    try:
        args = [args[0], *find_configs(args[1:])]
    except FileNotFoundError as error:
        return _mistake(str(error))
    with signals.noted() if args[0] == "fit" else nullcontext():  # the other verbs have nothing to save
        return _run(args)


def _submit(args: list[str]) -> int:
    try:
        job = launch.job(args)
        with redirect_stdout(sys.stderr):  # what libraries print when imported is no part of the job
            status = _run(["fit", *find_configs(job.args)], job)  # a mistake is found here and now, not by the job
        if status:
            return status
        print(job.text, end="")
        if not job.dry_run:
            print(launch.send(job.text))
    except (OSError, ValueError) as error:
        return _mistake(str(error))
    return 0


def _run(args: list[str], job: launch.Job | None = None) -> int:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own loss, named by its import path, lies where the command is run
    for name in ("torchao", "torch.utils._pytree"):
        # transformers imports torchao where there is one, and that names every kernel this machine does not have
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
    from distill.command import run  # heavy: seconds of imports
    from distill.types import DistillError
    from distill.verb import Check

    try:
        run(args, partial(Check, job.nodes, job.tasks) if job else verbs.command(args[0]))
    except DistillError as error:
        return _mistake(str(error))
    except SyntaxError as error:  # in a user's own file
        return _mistake(f"{error.filename}, line {error.lineno}: {error.msg}")
    except signals.Stopped as stop:
        return int(stop.code or 0)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        return 130  # Lightning turns Ctrl-C into exit status 1; the shell's word for it is 128 + SIGINT
    return 0


def find_configs(args: list[str]) -> list[str]:
    """Replace the name after each `--config` by the file it means, see `lookup.find_config`."""
    found: list[str] = []
    for i, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if equals and flag in ("--config", "-c"):
            found.append(f"{flag}={find_config(value)}")
        elif i and args[i - 1] in ("--config", "-c"):
            found.append(find_config(arg))
        else:
            found.append("--dry_run=true" if arg == "--dry-run" else arg)
    return found


def _mistake(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
