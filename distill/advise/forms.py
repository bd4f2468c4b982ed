"""Every form that a teacher can be shipped in, with its figures, in the order in which they are preferred."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from distill.advise import known, shapes, stored, training
from distill.advise.decide import GAIN
from distill.advise.model import Teacher
from distill.advise.parts import Figure, Form, Loss, Target
from distill.advise.shapes import Student
from distill.plan.job import Shape
from distill.plan.models import shape_of
from distill.students.sizes import sizes_of

FLOOR = 0.5  # of the parameters, or layers: as far as published students with small losses go (`known.STUDENTS`)
TOKENS_NEW = 20  # a parameter, of a language model trained from nothing (Hoffmann et al. 2022, arXiv 2203.15556)
TOKENS_HEALING = 0.5  # a parameter: 80 steps of 8 × 192 tokens for 260k parameters (docs/compression.md)
TOKENS_CLASSIFIER = 10_000_000  # about 16,000 texts of 128 tokens, five times
INT8 = {"classification": ("openvino:int8", "onnx:int8"), "causal-lm": ("torchao:int8", "openvino:int8")}
FEW_BITS = ("openvino:int8", "onnx:int8", "onnx:int4", "torchao:int8-dynamic", "torchao:int8", "torchao:int4")
ROUNDS_INPUTS = ("openvino:int8", "onnx:int8", "torchao:int8-dynamic")
INT4 = {"classification": "onnx:int4", "causal-lm": "packed:int4"}
RUN_AS = {"hf:fp32": "fp32", "hf:bf16": "bf16", "packed:int4": "torchao:int4"}  # what an export runs as, among what was timed


@dataclass(frozen=True)
class Measured:
    """What was measured here.

    Attributes:
        teacher_ms: of one row of the whole teacher in PyTorch; None where it does not fit.
        layer_ms: of one layer by form; `fp32` is PyTorch's.
        rate: operations a second of training; None where it could not be measured.
        losses: of rounding this very model, by precision; empty without a text.
        length: positions of a row.
    """

    teacher_ms: float | None
    layer_ms: Mapping[str, float]
    rate: Figure | None
    losses: Mapping[str, Loss]
    length: int


class Forms:
    """Fills in the figures of forms.

    Args:
        teacher: to be made smaller.
        measured: here.
        tokens: of training; None for a rule of thumb.
    """

    def __init__(self, teacher: Teacher, measured: Measured, tokens: int | None) -> None:
        self.teacher, self.measured, self.tokens = teacher, measured, tokens
        self.task, self.layers = teacher.task_name, teacher.config.get_text_config().num_hidden_layers
        self.int8 = [name for name in INT8[self.task] if self._here(name)] or ["torchao:int8"]
        self.shape = shape_of(teacher.model, "--teacher")
        self.reason = shapes.cuttable(teacher.model)
        self.whole = None if self.reason else sizes_of(teacher.model)

    def all(self, target: Target) -> tuple[Form, ...]:
        """The forms, the teacher first."""
        return tuple(self._noted(form) for form in (self._for_speed() if target == "latency" else self._for_size()))

    @property
    def pruning_gains(self) -> bool:
        """Whether a layer with half of its neurons is faster here."""
        times = self.measured.layer_ms
        return "half the neurons" in times and times["fp32"] >= GAIN * times["half the neurons"]

    def _noted(self, form: Form) -> Form:
        if self.task == "causal-lm" and form.export.startswith(("onnx", "openvino")):
            return replace(form, note="an exported graph has no cache of keys and values: it scores texts, and generates slowly")
        if form.export.startswith("packed"):
            return replace(form, note="few bits on the disk; unpacked, and in memory, a byte a weight")
        return form

    def keep(self) -> Form:
        """The teacher as it is."""
        unit = "points" if self.task == "classification" else "nats"
        export = "hf:fp32" if self.teacher.item == 4 else "hf:bf16"
        nothing = Loss(0.0, unit, True, "it is the teacher")  # type: ignore[arg-type]
        w = self.teacher.weights
        return Form("the teacher as it is", "keep", export, self.whole, w.parameters, self.teacher.bytes, self._ms("fp32"), loss=nothing)

    def _for_size(self) -> Iterator[Form]:
        yield self.keep()
        if self.teacher.item > 2:
            yield self._rounded("hf:bf16", "bf16")
        for export in self.int8:
            yield self._rounded(export, "int8")
        four = INT4[self.task]
        if self.teacher.weights.groups and (four == "packed:int4" or self._here(four)):
            yield self._rounded(four, "int4")
            yield self._in_bits(four, "int4")
        if self.teacher.weights.groups:
            yield self._in_bits("packed:int4", "int3")
            yield self._in_bits("packed:int4", "ternary")
        if self.reason:
            return
        students = list(shapes.narrower(self.teacher.model, self.teacher.task))
        yield from (self._distilled(student, self.int8[0]) for student in students if student.share >= FLOOR)
        for scheme, export in (("int4", four), ("ternary", "packed:int4")):
            for student in students:
                if student.weights.groups and (export == "packed:int4" or self._here(export)):
                    yield self._combined(student, export, scheme)

    def _for_speed(self) -> Iterator[Form]:
        yield self.keep()
        for name in ("openvino:fp32", "bf16"):
            if self._here(name):
                yield self._rounded(name if ":" in name else "hf:bf16", name.rpartition(":")[2])
        few_bits = [name for name in FEW_BITS if self._here(name)]
        by_speed = sorted(few_bits, key=lambda name: self.measured.layer_ms[name])
        for name in by_speed:
            yield self._rounded(name, name.rpartition(":")[2])
        if self.reason:
            return
        floats = min((name for name in ("openvino:fp32", "fp32") if self._here(name)), key=lambda name: self.measured.layer_ms[name])
        eight = next((name for name in by_speed if "int8" in name), floats)
        fastest = min((floats, eight), key=lambda name: self.measured.layer_ms[name])
        if self.pruning_gains:
            yield from (self._pruned(runtime) for runtime in dict.fromkeys((floats, fastest)))
        thinner = list(shapes.fewer_layers(self.teacher.model, self.teacher.task))
        yield from (self._distilled(student, _export(fastest)) for student in thinner if student.sizes.layers >= FLOOR * self.layers)
        for student in thinner:
            if student.sizes.layers < FLOOR * self.layers:
                yield self._cut_both_ways(student.sizes.layers, fastest)

    # ---- one form each

    def _rounded(self, export: str, precision: str) -> Form:
        words = {"fp32": "float32", "bf16": "bfloat16"}.get(precision, precision)
        name = f"{words}, {export.partition(':')[0]}"
        loss = self._loss_of_rounding(export, precision)
        w = self.teacher.weights
        ms = self._ms("bf16" if precision == "bf16" else export)
        return Form(name, "ptq", export, self.whole, w.parameters, stored.of(w, export), ms, loss=loss)

    def _in_bits(self, export: str, scheme: str) -> Form:
        tokens, hours = self._hours(self.shape, self._healing(self.teacher.weights.parameters))
        rounded = self.measured.losses.get(scheme)
        loss = known.TRAINED_IN.get((self.task, scheme))
        if rounded is not None:
            back = known.WON_BACK[scheme]
            loss = Loss(
                max(0.0, rounded.value) * (1 - back),
                rounded.unit,
                False,
                f"rounding's, of which {back:.0%} came back (docs/compression.md)",
            )
        w = self.teacher.weights
        size = stored.of(w, export, scheme if export.startswith("packed") else None)
        form = Form(f"QAT {scheme}", "qat", export, self.whole, w.parameters, size, self._ms(export), hours, tokens, loss)
        return replace(form, scheme=scheme)

    def _pruned(self, runtime: str) -> Form:
        student = shapes.half_of_the_neurons(self.teacher.model, self.teacher.task)
        tokens, hours = self._hours(self.shape, self._healing(self.teacher.weights.parameters))
        size = stored.of(student.weights, _export(runtime))
        name = f"half of the neurons, {runtime}"
        ms = self._ms(runtime, "half the neurons")
        form = Form(name, "prune", _export(runtime), self.whole, student.weights.parameters, size, ms, hours, tokens)
        return replace(form, sparsity=0.5)

    def _distilled(self, student: Student, export: str) -> Form:
        tokens, hours = self._hours(student.shape, self._new(student))
        precision = export.partition(":")[2]
        name = f"{_sizes(student)}, {precision}"
        ms = self._ms_of(student, export)
        size = stored.of(student.weights, export)
        return Form(name, "distil", export, student.sizes, student.weights.parameters, size, ms, hours, tokens)

    def _combined(self, student: Student, export: str, scheme: str) -> Form:
        tokens, hours = self._hours(student.shape, self._new(student))
        size = stored.of(student.weights, export, scheme if export.startswith("packed") else None)
        name = f"{_sizes(student)}, QAT {scheme}"
        ms = self._ms_of(student, export)
        form = Form(name, "combine", export, student.sizes, student.weights.parameters, size, ms, hours, tokens)
        return replace(form, scheme=scheme)

    def _cut_both_ways(self, layers: int, runtime: str) -> Form:
        student = shapes.half_of_the_neurons(self.teacher.model, self.teacher.task, layers)
        tokens, hours = self._hours(student.shape, self._new(student))
        name = f"{_sizes(student)}, {runtime.partition(':')[2] or 'float32'}"
        ms = self._ms(runtime, "half the neurons", layers)
        size = stored.of(student.weights, _export(runtime))
        return Form(name, "combine", _export(runtime), student.sizes, student.weights.parameters, size, ms, hours, tokens)

    # ---- figures

    def _here(self, name: str) -> bool:
        return name in self.measured.layer_ms

    def _ms(self, runtime: str, cut: str | None = None, layers: int | None = None) -> Figure | None:
        """`whole − inside + inside · (a layer in this runtime / a layer in PyTorch) · layers left / layers`.

        What is inside layers was timed on two of them. The rest, embeddings and head, is taken to be as slow as it is now.
        """
        whole, inside = self._now()
        if runtime == "fp32" and cut is None and layers is None:
            measured = self.measured.teacher_ms is not None
            return Figure(whole, measured, "the whole model" if measured else f"{self.layers} × a layer")
        name, times = RUN_AS.get(runtime, runtime), self.measured.layer_ms
        if name not in times or (cut is not None and cut not in times):
            return None
        ratio = times[name] / times["fp32"] * (times[cut] / times["fp32"] if cut else 1.0) * (layers or self.layers) / self.layers
        return Figure(whole - inside + inside * ratio, False, f"two layers of it in {name}{' and with ' + cut if cut else ''}, measured")

    def _now(self) -> tuple[float, float]:
        """Milliseconds of the whole teacher, and of them those inside its layers."""
        layers = self.layers * self.measured.layer_ms["fp32"]
        whole = self.measured.teacher_ms or layers
        return whole, min(whole, layers)

    def _ms_of(self, student: Student, export: str) -> Figure | None:
        found = self._ms(export, layers=student.sizes.layers)
        if found is None or self.whole is None or student.sizes.hidden == self.whole.hidden:
            return found
        share = student.weights.blocks / student.sizes.layers / (self.teacher.weights.blocks / self.layers)
        whole, inside = self._now()
        rest = whole - inside
        return Figure(rest + (found.value - rest) * share, False, f"{found.basis}; × its share of the weights, {share:.0%}")

    def _loss_of_rounding(self, export: str, precision: str) -> Loss | None:
        if precision == "fp32":
            return Loss(
                0.0, "points" if self.task == "classification" else "nats", False, "the same numbers; exports are refused beyond 1e-4 nats"
            )
        kind = precision.partition("-")[0]
        measured = self.measured.losses.get(kind)
        if measured is not None and export in ROUNDS_INPUTS:
            measured = measured._replace(measured=False, basis=f"of the weights alone; inputs are rounded too; {measured.basis}")
        return measured or known.ROUNDED.get((self.task, export)) or known.ROUNDED.get((self.task, kind))

    def _healing(self, parameters: int) -> int:
        return self.tokens or (int(TOKENS_HEALING * parameters) if self.task == "causal-lm" else TOKENS_CLASSIFIER)

    def _new(self, student: Student) -> int:
        return self.tokens or (TOKENS_NEW * student.weights.parameters if self.task == "causal-lm" else TOKENS_CLASSIFIER)

    def _hours(self, student: Shape, tokens: int) -> tuple[int, Figure | None]:
        if self.measured.rate is None:
            return tokens, None
        return tokens, training.hours(self.teacher.task, self.shape, student, tokens, self.measured.length, self.measured.rate)


def _export(runtime: str) -> str:
    return {"fp32": "hf:fp32", "bf16": "hf:bf16"}.get(runtime, runtime)


def _sizes(student: Student) -> str:
    s = student.sizes
    return f"{s.layers} × {s.hidden} (FFN {s.intermediate})"
