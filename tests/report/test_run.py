"""The banner's rows, and what a run keeps across a resume."""

from collections import Counter
from pathlib import Path

from transformers import AutoModelForCausalLM

from distill.losses.divergence import ForwardKL
from distill.losses.features import HiddenMSE
from distill.report.run import Run, describe, describe_classes, describe_losses
from distill.students.load import Pretrained
from distill.students.lora import LoRA
from distill.teachers.ensemble import Ensemble
from distill.teachers.online import OnlineTeacher
from distill.teachers.own import SelfTeacher
from tests import pair


def test_the_banner_counts_by_hand(tmp_path: Path) -> None:
    data, module = pair.data(tmp_path, batch_size=2), pair.module(tmp_path)
    trainer = pair.trainer(max_steps=1, accumulate_grad_batches=3)
    trainer.fit(module, data)
    rows = describe(trainer, module)
    student, teacher = (sum(p.numel() for p in m.parameters()) for m in (module.student, module.teacher.model))
    assert f"{student:,} parameters" in rows["student"]
    assert "float32 · 100% trainable" in rows["student"]
    assert f"{teacher:,} parameters" in rows["teacher"]
    assert f"{teacher / student:.1f}× the student" in rows["teacher"]
    assert rows["losses"] == "0.3 × ce (CrossEntropy) + 0.7 × kd (ForwardKL)"
    assert rows["batch"] == "6 = 2 × 3 accumulated × 1 ranks"
    assert rows["tokens per step"] == f"{6 * 32:,} at most"
    assert rows["steps"] == "1"


def test_the_banner_of_several_teachers_and_of_a_student_that_teaches_itself(tmp_path: Path) -> None:
    data, folder = pair.data(tmp_path, batch_size=2), str(tmp_path / "teacher")
    student = LoRA(Pretrained(folder), r=2)
    seen = []
    for teacher in (Ensemble([OnlineTeacher(folder), SelfTeacher()], [3, 1]), SelfTeacher()):
        module, trainer = pair.module(tmp_path, teacher=teacher, student=student), pair.trainer(max_steps=1)
        trainer.fit(module, data)
        seen.append(describe(trainer, module)["teacher"])
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert seen[0].startswith(f"0.75 × {folder} + 0.25 × the student without its adapters · {count:,} parameters · ")
    assert seen[1] == "the student without its adapters · no weights of its own"


def test_figures_of_the_start_survive_a_resume(tmp_path: Path) -> None:
    first, second = Run(tmp_path / "a", ""), Run(tmp_path / "a", "", resume=True)
    first.before, first.seconds = {"count": 5.0, "loss": 2.0}, 12.0
    second.load_state_dict(first.state_dict())
    assert (second.before, second.seconds) == ({"count": 5.0, "loss": 2.0}, 12.0)


def test_what_the_terms_settled_and_the_classes_are_told(tmp_path: Path) -> None:
    data = pair.data(tmp_path, batch_size=2)
    module = pair.module(tmp_path, losses={"kd": ForwardKL(), "hidden": HiddenMSE("last")}, balancer=None)
    trainer = pair.trainer(max_steps=1)
    trainer.fit(module, data)
    assert describe(trainer, module)["  hidden"] == "student layer 1 ↔ teacher layer 2, linear 16→24"
    told = describe_losses(module)
    assert told["hidden"] == {"class": "HiddenMSE", "weight": 1.0, "settled": ["student layer 1 ↔ teacher layer 2, linear 16→24"]}
    assert told["kd"]["settled"] == []
    labels = [int(label) for row in data.train_set for label in row["labels"] if label != -100]
    classes = describe_classes(data)
    assert (classes["classes"], classes["most"]) == (data.num_classes, max(Counter(labels).values()))
    assert classes["never"] == data.num_classes - len(set(labels))
    assert "counts" not in classes, "a vocabulary is not listed"
