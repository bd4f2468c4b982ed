"""The decision tree: from a situation to what to do. A pure function; nothing is measured or read here."""

from collections.abc import Sequence

from distill.advise.parts import Advice, Budget, Form, Kind, Leaf, Situation, Step

GAIN = 1.05  # × the time before: what gains less is noise here
WHAT: dict[Kind, str] = {
    "keep": "Ship the teacher",
    "ptq": "Export without training",
    "qat": "Train it in the integers that it will have, taught by itself",
    "prune": "Prune neurons while it is taught by itself",
    "distil": "Distil a smaller student, cut out of the teacher",
    "combine": "Combine: a smaller student in few bits",
}


def decide(s: Situation) -> Advice:
    """Choose the first form that meets the budget in the time there is.

    The forms come in order of how much they change, so the tree is: nothing; rounding and other runtimes, which take minutes; and where
    these do not do, training: in few bits, without neurons, of a smaller student, and of several of these at once. For a budget of quality
    it is the smallest form that loses no more. Since the order does not depend on the budget, a smaller budget never leads to a larger
    model: what it is led away from no longer meets it.
    """
    ruled = dict(s.missing)
    forms = [form for form in s.forms if _of_use(form, s, ruled)]
    meeting = [form for form in forms if meets(form, s.budget)]
    in_time = [form for form in meeting if _in_time(form, s.hours)]
    if not meeting:
        return _impossible(s, forms, ruled)
    if not in_time:
        return _too_short(s, forms, meeting, ruled)
    chosen = min(in_time, key=lambda form: form.bytes.value) if s.target == "quality" else in_time[0]
    return Advice(chosen.kind, _headline(s, chosen), tuple(_steps(s, chosen, in_time, forms)), ruled | _passed_over(s, chosen, forms))


def value(form: Form, budget: Budget) -> float | None:
    """What the budget limits, of a form; None where it is not known."""
    if budget.unit == "bytes":
        return form.bytes.value
    if budget.unit == "ms":
        return None if form.ms is None else form.ms.value
    return form.loss.value if form.loss is not None and form.loss.unit == budget.unit else None


def meets(form: Form, budget: Budget) -> bool:
    """Whether a form is known to be within the budget."""
    found = value(form, budget)
    return found is not None and found <= budget.limit


def shown(number: float, unit: str) -> str:
    """A quantity for people."""
    if unit == "bytes":
        size, name = next(((size, name) for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if number >= size), (1.0, "B"))
        return f"{number / size:.3g} {name}"
    if unit == "hours":
        size, name = next(((size, name) for size, name in ((24.0, "days"), (1.0, "h"), (1 / 60, "min")) if number >= size), (1 / 3600, "s"))
        return f"{number / size:.2g} {name}" if number < 100 * size else f"{number / size:,.0f} {name}"
    return f"{number:.3g} {unit}" if number < 1000 else f"{number:,.0f} {unit}"


def _in_time(form: Form, hours: float | None) -> bool:
    return not form.trained or hours is None or (form.hours is not None and form.hours.value <= hours)


def _of_use(form: Form, s: Situation, ruled: dict[str, str]) -> bool:
    """Whether a form is worth looking at: one for speed must be faster than the teacher."""
    if s.target != "latency" or form.kind == "keep" or form.ms is None:
        return True
    before = s.forms[0].ms
    assert before is not None, "the teacher is timed before anything is decided on its time"
    gain = before.value / form.ms.value
    if gain < GAIN:
        ruled.setdefault(form.name, f"{gain:.2f} × the speed here: it gains nothing on this machine")
    return gain >= GAIN


def _steps(s: Situation, chosen: Form, in_time: Sequence[Form], forms: Sequence[Form]) -> list[Step]:
    found = value(chosen, s.budget)
    assert found is not None
    limit = shown(s.budget.limit, s.budget.unit)
    within = f"{shown(found, s.budget.unit)} of the {limit} allowed"
    if chosen.kind == "keep":
        return [Step(WHAT["keep"], f"it is within the budget: {within}", chosen)]
    steps = []
    if chosen.trained:
        first = _best_untrained(s, forms)
        if first is not None:
            steps.append(
                Step(WHAT["ptq"], f"minutes, and something to compare with; not enough alone: {_short_of(first, s.budget)}", first)
            )
        why = f"no form without training is within {limit}; this one is: {within}" if s.target != "quality" else f"the smallest: {within}"
        steps.append(Step(WHAT[chosen.kind], why, chosen))
        return steps
    steps.append(Step(WHAT["ptq"], f"no training, and within the budget: {within}", chosen))
    healed = next((form for form in in_time if form.kind == "qat" and form.export == chosen.export), None)
    if healed is not None and chosen.export.endswith("int4"):
        steps.append(
            Step(WHAT["qat"], "only if 4 bits lose too much on your data: training wins back most of it, at the same bytes", healed)
        )
    return steps


def _best_untrained(s: Situation, forms: Sequence[Form]) -> Form | None:
    """The one nearest to the budget; among those for quality there is none."""
    known = [(found, form) for form in forms if form.kind == "ptq" and (found := value(form, s.budget)) is not None]
    return min(known, key=lambda pair: pair[0])[1] if known and s.target != "quality" else None


def _short_of(form: Form, budget: Budget) -> str:
    found = value(form, budget)
    return "not known" if found is None else f"{shown(found, budget.unit)}, and {shown(budget.limit, budget.unit)} are allowed"


def _headline(s: Situation, chosen: Form) -> str:
    whole, found = s.forms[0], value(chosen, s.budget)
    assert found is not None
    limit = shown(s.budget.limit, s.budget.unit)
    if chosen.kind == "keep":
        rest = "nothing smaller is known to lose as little" if s.target == "quality" else "there is nothing to do"
        return f"The teacher is within {limit} as it is: {rest}."
    smaller = f"{shown(chosen.bytes.value, 'bytes')} ({chosen.bytes.value / whole.bytes.value:.0%} of the teacher's bytes)"
    speed = "" if chosen.ms is None or whole.ms is None else f", {whole.ms.value / chosen.ms.value:.2g} × its speed"
    hours = "" if chosen.hours is None else f"about {shown(chosen.hours.value, 'hours')} of "
    time = f"{hours}training" if chosen.trained else "no training"
    return f"{WHAT[chosen.kind]}: {chosen.name}. {smaller}{speed}; {time}."


def _passed_over(s: Situation, chosen: Form, forms: Sequence[Form]) -> dict[str, str]:
    """Why the forms that come before were not taken; of those that differ in their sizes alone, the nearest speaks for all."""
    groups: dict[tuple[str, str, str | None], list[Form]] = {}
    for form in forms[: list(forms).index(chosen)]:
        if form.kind != "keep" and (form.kind, form.export, form.scheme) != (chosen.kind, chosen.export, chosen.scheme):
            groups.setdefault((form.kind, form.export, form.scheme), []).append(form)
    ruled = {}
    for found in groups.values():
        nearest = min(found, key=lambda form: _order(value(form, s.budget)))
        ruled[nearest.name + (f", the nearest of {len(found)} sizes" if len(found) > 1 else "")] = _why_not(nearest, s)
    return ruled


def _why_not(form: Form, s: Situation) -> str:
    if value(form, s.budget) is None:
        advice = "; give a text of yours with --data" if s.target == "quality" and not form.trained else ""
        return f"nobody has measured what it costs in {s.budget.unit}{advice}"
    if not meets(form, s.budget):
        return _short_of(form, s.budget)
    return _too_long(form, s.hours) if not _in_time(form, s.hours) else "it is larger"


def _order(found: float | None) -> float:
    return float("inf") if found is None else found


def _too_long(form: Form, hours: float | None) -> str:
    takes = "an unknown time" if form.hours is None else f"about {shown(form.hours.value, 'hours')}"
    return f"takes {takes} of training, and there are {shown(hours, 'hours')}" if hours is not None else f"takes {takes} of training"


def _too_short(s: Situation, forms: Sequence[Form], meeting: Sequence[Form], ruled: dict[str, str]) -> Advice:
    """The budget can be met, but not in the time there is."""
    known = [form for form in meeting if form.hours is not None]
    quickest = min(known, key=lambda form: form.hours.value if form.hours else 0.0) if known else meeting[0]
    now = _best_untrained(s, forms)
    limit = shown(s.budget.limit, s.budget.unit)
    steps = [] if now is None else [Step(WHAT["ptq"], f"what the time allows, and the nearest to {limit}: {_short_of(now, s.budget)}", now)]
    steps.append(Step(WHAT[quickest.kind], f"the quickest that is within {limit}: {_too_long(quickest, s.hours)}", quickest))
    headline = (
        f"Nothing is within {limit} in {shown(s.hours or 0.0, 'hours')}: {quickest.name} would be, and {_too_long(quickest, s.hours)}."
    )
    return Advice("too short", headline, tuple(steps), ruled)


def _impossible(s: Situation, forms: Sequence[Form], ruled: dict[str, str]) -> Advice:
    """Nothing known meets the budget: the nearest is said."""
    known = [(found, form) for form in forms if (found := value(form, s.budget)) is not None and _in_time(form, s.hours)]
    limit = shown(s.budget.limit, s.budget.unit)
    if not known:
        return Advice("impossible", f"Nothing is known of any form's {s.budget.unit}: give a text of yours with --data.", (), ruled)
    found, nearest = min(known, key=lambda pair: pair[0])
    leaf: Leaf = "impossible"
    headline = f"Nothing known here is within {limit}. The nearest: {nearest.name}, {shown(found, s.budget.unit)}."
    step = Step(WHAT[nearest.kind], f"the nearest to {limit}: {shown(found, s.budget.unit)}", nearest)
    return Advice(leaf, headline, (step,), ruled)
