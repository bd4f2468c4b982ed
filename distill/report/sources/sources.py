"""Where the signal could come from, what each source would cost the run at hand, and which to take; for the dry run.

Bytes of weights in memory are counted and one forward pass of the teacher is timed, see `situation`; all else follows by the formulas here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from rich import box
from rich.table import Table

from distill.report.sources.situation import ROOM, Figure, Situation
from distill.types import Support

# A store keeps about 1.4 bytes a class: scripts/bench/store.py, with 8 bits, finds 49 bytes a position at k = 50 (trigrams of WikiText-2)
# to 92 (random distributions), and 38 to 33 at 64 draws, of which some 26 are of different classes.
BYTES_PER_CLASS = 1.4
KEPT: dict[Support, tuple[str, int]] = {"draws": ("draws: 64", 26), "bins": ("k: 50", 50)}
HIDDEN_BYTES = 1  # of a value of a hidden state in a store
SERVED_K = 50  # of ServedTeacher, by default
ENTRY_BYTES = 42  # of one token's log-probability in the JSON of `serve`; vLLM's are about 25 longer
OFTEN = 2.0  # how often a run sees the rows before a store is worth its writing, the disk and a second command


@dataclass(frozen=True, slots=True)
class Cost:
    """What one source would cost; None where it takes nothing, or it is not known.

    Attributes:
        name: of the source.
        memory: bytes on the device.
        disk: bytes.
        network: bytes a step.
        seconds: a step.
        writing: seconds, once.
        pays_after: epochs after which the writing is won back.
        problem: why the terms cannot have it; empty where they can.
    """

    name: str
    memory: Figure | None = None
    disk: Figure | None = None
    network: Figure | None = None
    seconds: Figure | None = None
    writing: Figure | None = None
    pays_after: Figure | None = None
    problem: str = ""


def costs(s: Situation) -> list[Cost]:
    """What each source would cost; the one in use too."""
    found = [online(s)]
    if s.int8 is not None and s.source != "other":
        found.append(Cost("online, quantize: int8", memory=Figure(s.int8)))
    found += stores(s)
    return found if s.source == "other" else [*found, remote(s), served(s)]


def stores(s: Situation) -> list[Cost]:
    """The store in use, or those that could be written: of a teacher that knows all classes."""
    if s.store is not None:
        return [cached(s, s.support)]
    return [cached(s, "draws"), cached(s, "bins")] if s.support == "classes" else []


def online(s: Situation) -> Cost:
    """The model in memory: its weights, and a forward pass for every micro-batch."""
    return Cost("as it is" if s.source == "other" else "online", memory=s.weights, seconds=s.per_step)


def cached(s: Situation, support: Support) -> Cost:
    """A store: bytes of a position × positions with a label, and hidden states of all; a pass of the teacher over the rows to write it.

    A step waits for nothing, as rows are decoded by threads one step ahead. The writing is won back when the forward passes it saves have
    taken as long: after one epoch, whatever they take.
    """
    name, kept = KEPT[support]
    size = s.valid * min(kept, s.classes) * BYTES_PER_CLASS
    size += s.taps * (s.width or 0) * HIDDEN_BYTES * s.rows * s.positions / s.batch_size
    batches = -(-s.rows // (s.batch_size * s.ranks))
    writing = s.forward and Figure(batches * s.forward.value)
    pays = writing and s.per_step and Figure(writing.value / (s.per_step.value * s.steps_per_epoch) if s.per_step.value else 0.0)
    problem = _unfit(s, support) or ("the temperature of the terms moves" if len(s.temperatures) > 1 else "")
    disk = Figure(size) if s.store is None else Figure(s.store, measured=True)
    seconds = Figure(0.0)
    return Cost(f"cached, {name}" if s.store is None else "cached, as it is", None, disk, None, seconds, writing, pays, problem)


def remote(s: Situation) -> Cost:
    """`RemoteTeacher`: features of every prediction and hidden states of every position, in the teacher's dtype; the server's time."""
    if s.width is None:
        return Cost("remote (serve)")
    values = s.width * (s.predictions + s.taps * s.positions) * s.micro_batches
    return Cost("remote (serve)", network=Figure(values * s.item), seconds=s.per_step)


def served(s: Situation) -> Cost:
    """`ServedTeacher`: the likeliest tokens of every position with a label, as JSON; asked for one step ahead."""
    problem = _unfit(s, "bins") or ("it gives no hidden states" if s.taps else "")
    if not problem and s.temperatures - {1.0}:
        problem = "it gives probabilities at temperature 1 alone"
    network = Figure(s.labels * min(SERVED_K, s.classes) * ENTRY_BYTES)
    return Cost(f"served, k: {SERVED_K}", network=network, seconds=s.per_step, problem=problem)


def _unfit(s: Situation, support: Support) -> str:
    if support in s.allowed:
        return ""
    return "a term needs all classes" if "bins" not in s.allowed else "a term is wrong on draws"


def recommend(s: Situation) -> str:
    """Which source to take, and the rule that says so.

    1. What nothing else can give, or of which nothing is known, stays as it is; and a store that is written is used.
    2. A teacher that fits is cached where the run sees the rows more than about twice: one pass is written, the others are saved. Where
       they are seen less often, or no store can be had, it is online.
    3. One that does not fit is cached if it fits alone, to be asked; else in 8 bits if that fits; else `serve` runs it elsewhere.
    """
    if s.support == "text" or s.weights is None:
        why = (
            "only a model in memory tells texts in other tokens"
            if s.support == "text"
            else "only its server knows how large the teacher is"
        )
        return f"Take it as it is: {why}."
    if s.store is not None:
        return "Take the store: it is written, and a step from it waits for no teacher."
    memory = f"{_bytes(s.weights.value)} beside {_bytes(s.others)} of {_bytes(s.room)}"
    store = next((c for c in stores(s) if not c.problem and c.disk is not None and c.disk.value <= s.disk), None)
    if s.fits(s.weights.value):
        return _where_it_fits(s, store, memory)
    if store and s.weights.value <= ROOM * s.room:
        return f"Take {store.name}: the teacher does not fit beside the student ({memory}), but alone it does, to write the store."
    if s.int8 is not None and s.fits(s.int8):
        few = f"in 8 bits ({_bytes(s.int8)}) the teacher fits, as it is ({memory}) it does not"
        return f"Take online, quantize: int8: {few}, and {_no_store(s, store)}."
    return f"Take remote: the teacher does not fit ({memory}), `python train.py serve` runs it where there is room; {_no_store(s, store)}."


def _where_it_fits(s: Situation, store: Cost | None, memory: str) -> str:
    seen = f"the run sees the rows {s.epochs:.1f} times"
    if store and s.epochs > OFTEN:
        saved = (s.per_step or Figure(0.0)).value * s.steps - (store.writing or Figure(0.0)).value
        return f"Take {store.name}: {seen}, more than about twice, and a store saves ≈ {_seconds(saved)} of the teacher's time."
    why = _no_store(s, store) if s.epochs > OFTEN else f"{seen}, not more than about twice, so that a store would hardly pay"
    return f"Take {'it as it is' if s.source == 'other' else 'online'}: the teacher fits ({memory}), and {why}."


def _no_store(s: Situation, store: Cost | None) -> str:
    if store:
        return "alone it does not fit either, so a store must be written elsewhere"
    tried = stores(s)
    if possible := [c.disk.value for c in tried if not c.problem and c.disk is not None]:
        return f"a store of {_bytes(min(possible))} has no room on the disk ({_bytes(s.disk)} are free)"
    return f"a store cannot be had: {tried[-1].problem}" if tried else "no store is written of a teacher that knows some classes alone"


def table(s: Situation) -> Table:
    """One row a source; `≈` before what is estimated; below it what the estimates rest on, and what the terms cannot have."""
    found = costs(s)
    notes = [] if s.forward is None else [f"for one micro-batch the teacher took {_seconds(s.forward.value)}, measured once"]
    notes += ["≈ estimated, without it measured; a step from a store waits for nothing, as rows are decoded ahead by threads"]
    notes += [f"{c.name}: not with these terms, {c.problem}" for c in found if c.problem]
    title, caption = "Sources of the signal", "\n".join(notes)
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    out.add_column("", no_wrap=True)
    for head in ("memory", "disk", "network/step", "s/step", "writing", "pays after"):
        out.add_column(head, justify="right", no_wrap=True)
    for c in found:
        cells = [_shown(c.memory, _bytes), _shown(c.disk, _bytes), _shown(c.network, _bytes), _shown(c.seconds, "{:.3g}".format)]
        out.add_row(c.name, *cells, _shown(c.writing, _seconds), _shown(c.pays_after, "{:.1f} epochs".format))
    return out


def _shown(figure: Figure | None, form: Callable[[float], str]) -> str:
    return "" if figure is None else f"{'' if figure.measured else '≈ '}{form(figure.value)}"


def _bytes(value: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _seconds(value: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if value >= 2 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} s"
