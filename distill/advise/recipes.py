"""What to type: the YAML of a form that is trained, and the commands from the teacher to the export."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distill.advise.parts import Advice, Form, Step
from distill.students.sizes import Sizes

BATCH = 8
TRAIN_DATA = {"causal-lm": "data/train.jsonl", "classification": "data/train.tsv"}
HEAD = "# Written by `distill advise`. Set train_data to texts of yours; "
TRAINED = "tune the learning rate on validation data.\n"
UNTRAINED = "nothing is trained: the export calibrates on these rows, and compares on them.\n"


def config(form: Form, teacher: str, whole: Sizes | None, task: str, length: int, cuda: bool) -> str:
    """The YAML that trains a form; for one without training, the YAML that its export reads the data from.

    Args:
        form: what is to become of it.
        teacher: folder or hub id.
        whole: the teacher's sizes.
        task: `causal-lm` or `classification`.
        length: tokens of a row.
        cuda: whether a GPU trains.
    """
    tokens = form.tokens or 0
    source: dict[str, Any] = {"train_data": TRAIN_DATA[task], "tokenizer": teacher, "max_length": length, "batch_size": BATCH}
    trainer: dict[str, Any] = {"max_steps": max(1, tokens // (BATCH * length)), "max_epochs": -1}
    trainer |= {"gradient_clip_val": 1.0} | ({"precision": "bf16-mixed"} if cuda else {})
    if callbacks := _callbacks(form):
        trainer["callbacks"] = callbacks
    weights = {"ce": 0.2, "kd": 0.8}
    document = {
        "seed_everything": 0,
        "model": {
            "teacher": {"class_path": "OnlineTeacher", "init_args": {"model": teacher}},
            "student": _student(form, teacher, whole),
            "losses": {"ce": "CrossEntropy", "kd": {"class_path": "ForwardKL", "init_args": {"temperature": 2.0}}},
            "balancer": {"class_path": "FixedWeights", "init_args": {"weights": weights}},
            "optimizer": {
                "class_path": "AdamW",
                "init_args": {"lr": _rate(form), "weight_decay": 0.01, "warmup": 0.05, "min_lr_ratio": 0.1},
            },
        },
        "data": {"class_path": "TextData" if task == "causal-lm" else "ClassificationData", "init_args": source},
        **({"trainer": trainer} if form.trained else {}),
    }
    return (
        HEAD
        + (TRAINED if form.trained else UNTRAINED)
        + yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)
    )


def commands(step: Step, teacher: str, path: str, name: str) -> list[str]:
    """What to type for a step.

    Args:
        step: of the advice.
        teacher: folder or hub id.
        path: of the YAML.
        name: of the run.
    """
    form = step.form
    if form.kind == "keep":
        return []
    if not form.trained:
        folder = teacher if Path(teacher).is_dir() else f"models/{teacher.rpartition('/')[2]}"
        fetch = [] if Path(teacher).is_dir() else [f"hf download {shlex.quote(teacher)} --local-dir {shlex.quote(folder)}"]
        out = f"--student {shlex.quote(folder)} --out runs/{name}-as-it-is"
        return [*fetch, f"python train.py export --config {path} {out} --format {form.export}"]
    run = f"--config runs/{name}/config.yaml"
    return [
        f"python train.py --config {path} --name {name} --dry-run",
        f"python train.py --config {path} --name {name}",
        f"python train.py export {run} --format {form.export}",
        f"python train.py cost {run}",
    ]


def of_advice(advice: Advice) -> Form | None:
    """The form that the one YAML of an advice is for: the first that is trained, or else the first."""
    forms: Sequence[Form] = [step.form for step in advice.steps if step.form.kind != "keep"]
    return next((form for form in forms if form.trained), next(iter(forms), None))


def _student(form: Form, teacher: str, whole: Sizes | None) -> dict[str, Any]:
    if form.kind not in ("distil", "combine") or form.sizes is None or whole is None:
        return {"class_path": "Pretrained", "init_args": {"model": teacher}}
    s, given = form.sizes, {}
    keys = (("layers", "layers"), ("hidden", "hidden_size"), ("intermediate", "intermediate_size"), ("groups", "num_key_value_heads"))
    for name, key in keys:
        if getattr(s, name) != getattr(whole, name):
            given[key] = getattr(s, name)
    return {"class_path": "Shrunk", "init_args": {"model": teacher, **given, "importance": "activation"}}


def _callbacks(form: Form) -> list[dict[str, Any]]:
    if form.scheme is not None:
        start = {"start": 0.25, "warmup": 0.25} if form.kind == "combine" else {"warmup": 0.1}
        return [{"class_path": "QuantizationAwareTraining", "init_args": {"scheme": form.scheme, **start}}]
    if form.sparsity is not None:
        return [{"class_path": "Pruning", "init_args": {"sparsity": form.sparsity, "structure": "neurons", "begin": 0.1, "end": 0.6}}]
    return []


def _rate(form: Form) -> float:
    """A learning rate to begin with: of the shipped configs of this size, and for a teacher that goes on that of teacher_bert.yaml."""
    if form.kind in ("qat", "prune") and form.parameters >= 10**7:
        return 3e-5
    return 2e-5 if form.parameters >= 10**8 else 2e-4 if form.parameters >= 10**7 else 4e-3
