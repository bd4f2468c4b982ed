"""The way of every export: written beside its place, loaded again, compared with the student, and only then put there."""

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from transformers import PreTrainedModel

from distill.export import record
from distill.export.base import ExportError, Format, Source
from distill.export.compare import Gap, compare
from distill.report import tables
from distill.report.costs.served import logits_of
from distill.report.files import write_folder
from distill.types import ConfigError

CANNOT_WRITE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES)
ROOM = 1 << 16  # bytes that are free on a disk that is not full


@dataclass(frozen=True)
class Exported:
    """One export that was made.

    Attributes:
        name: format and precision.
        folder: where it is; None for what was not written.
        bytes: of its files, the tokenizer's not counted.
        ratio: to the student's parameters in float32.
        gap: to the student.
    """

    name: str
    folder: Path | None
    bytes: int | None
    ratio: float | None
    gap: Gap


def all_formats() -> dict[str, type[Format]]:
    """The formats there are, by name."""
    return {found.name: found for found in Format.__subclasses__()}


def parse(wanted: Sequence[str], precision: str | None) -> list[Format]:
    """Make formats of what a person writes: `onnx`, or `onnx:int8` for a precision of its own.

    Args:
        wanted: names.
        precision: of those without their own; None for each format's first.

    Raises:
        ConfigError: no such format or precision, or one twice.
    """
    known, made = all_formats(), []
    for each in wanted:
        name, _, own = each.partition(":")
        if name not in known:
            several = "; several are written '[hf,onnx:int8]'" if "," in each else ""
            raise ConfigError(f"format: there is no '{name}'; there are {', '.join(sorted(known))}{several}")
        made.append(known[name](own or precision))
    if len({_title(each) for each in made}) < len(made) or not made:
        raise ConfigError(f"format: each once, and at least one; got {list(wanted)}")
    return made


def export(
    source: Source,
    formats: Sequence[Format],
    out: Path,
    student: PreTrainedModel | None = None,
    tolerance: float | None = None,
    made_of: Mapping[str, Any] | None = None,
) -> list[Exported]:
    """Write a student in several formats, each to `OUT/FORMAT-PRECISION`, and print what became of it.

    Args:
        source: what is exported.
        formats: made by `parse`.
        out: the folder of all exports.
        student: what the table compares with, where `source` is not the student itself but was quantised after training.
        tolerance: the largest mean KL to `source` in nats, but see `Gap.limit`; None for each format's own.
        made_of: what is recorded in each folder beside format and precision, see `record`.

    Raises:
        ConfigError: a format cannot store this student; nothing was written.
        ExportError: an export is not what the student is, or there is no room for it; what was there before is untouched.
    """
    for each in formats:
        each.check(source)
    done: list[Exported] = []
    if student is not None:
        gap = compare(partial(logits_of, student), partial(logits_of, source.model), source.calibration())
        done.append(Exported("quantised, not exported", None, None, None, gap))
    try:
        for each in formats:
            done.append(_one(source, each, out / _title(each), student or source.model, tolerance, made_of or {}))
    finally:
        if done:
            tables.show(table(done))
    return done


def _one(
    source: Source, made: Format, target: Path, student: PreTrainedModel, tolerance: float | None, made_of: Mapping[str, Any]
) -> Exported:
    allowed = made.tolerance if tolerance is None else tolerance
    size, gap = 0, None

    def fill(folder: Path) -> None:
        nonlocal size, gap
        made.write(source, folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        run = made.load(folder, source.task)
        gap = compare(partial(logits_of, source.model), run, source.calibration())
        if not gap.within(allowed):
            raise ExportError(_refusal(made, gap, allowed))
        if student is not source.model:
            gap = compare(partial(logits_of, student), run, source.calibration())
        source.tokenizer.save_pretrained(folder)
        record.write(folder, {"format": made.name, "precision": made.precision, **made_of})

    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_folder(target, fill)
    except BaseException as error:
        full = _full(error, target.parent)
        shutil.rmtree(target.with_name(f".{target.name}.tmp"), ignore_errors=True)  # where `write_folder` lets it be filled
        if isinstance(error, ExportError | ConfigError):
            raise type(error)(f"{error}{_kept(target)}") from error
        if full:
            raise ExportError(
                f"{_title(made)}: cannot write to {target.parent}: {full}; make room and export again{_kept(target)}"
            ) from error
        raise
    assert gap is not None
    fp32 = 4 * sum(parameter.numel() for parameter in student.parameters())
    return Exported(_title(made), target, size, size / fp32, gap)


def _full(error: BaseException, folder: Path) -> str | None:
    """What keeps a file from being written: libraries of C++ give errors of their own, or none until the file is read."""
    chain = list(_causes(error))
    for each in chain:
        number = each.errno if isinstance(each, OSError) else int((re.findall(r"os error (\d+)", str(each)) or [0])[-1])
        if number in CANNOT_WRITE:
            return os.strerror(number)
    if chain and shutil.disk_usage(folder).free < ROOM:
        return os.strerror(errno.ENOSPC)
    # NumPy, protobuf and OpenVINO say no more than that
    partly = any(re.search(r"problem writing element|requested and \d+ written|basic_ios", str(each)) for each in chain)
    return "a file was not written whole, as on a disk that is full" if partly else None


def _causes(error: BaseException | None) -> Iterator[Exception]:
    while isinstance(error, Exception):
        yield error
        error = error.__cause__ or error.__context__


def _kept(target: Path) -> str:
    return f" (the export that was in {target} before is untouched)" if target.exists() else ""


def _refusal(made: Format, gap: Gap, allowed: float) -> str:
    limit, fix = "the same bits", ", or, if that is good enough, a higher --tolerance"
    if allowed and gap.limit(allowed) < allowed:
        limit, fix = f"at most {gap.limit(allowed):.3g} nats, for one constant for all rows is {gap.constant:.3g} nats away", ""
    elif allowed:
        limit = f"at most {allowed:g} nats"
    return (
        f"{_title(made)}: what was written and loaded again is not the student: mean KL {gap.kl:.3g} nats, largest difference of a logit "
        f"{gap.largest:.3g}, the same top-1 in {gap.agreement:.1%}; allowed is {limit}. Take a finer precision, or more calibration rows "
        f"(--rows){fix}"
    )


def _title(made: Format) -> str:
    return f"{made.name}-{made.precision}"


def table(done: Sequence[Exported]) -> Table:
    """One row an export: size, and how far it is from the student."""
    shown = Table(title="Exports, loaded again and compared with the student", title_justify="left", box=box.SIMPLE_HEAD)
    shown.add_column("", no_wrap=True)
    for head in ("bytes", "of fp32", "KL, nats", "same top-1", "largest gap"):
        shown.add_column(head, justify="right", no_wrap=True)
    for each in done:
        size = "" if each.bytes is None else f"{each.bytes:,}"
        ratio = "" if each.ratio is None else f"{each.ratio:.3f}"
        largest = "none" if each.gap.exact else f"{each.gap.largest:.2g}"
        shown.add_row(each.name, size, ratio, f"{each.gap.kl:.2e}", f"{each.gap.agreement:.1%}", largest)
    return shown
