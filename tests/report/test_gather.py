"""Which models a report is of: the teacher that is meant, and nothing that a training still needs is changed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import AutoTokenizer

from distill.report.evidence import BEFORE, TEACHER
from distill.report.gather import Models
from distill.students.load import Pretrained
from distill.students.lora import LoRA
from distill.tasks import CausalLM
from distill.teachers.base import Teacher
from distill.teachers.ensemble import Ensemble
from distill.teachers.online import OnlineTeacher
from distill.teachers.own import SelfTeacher
from tests.models import VOCAB, causal_lm, save, tokens

CPU = torch.device("cpu")


class Elsewhere(OnlineTeacher):
    """Runs in another process: it holds no model here."""

    def models(self) -> list[Any]:
        return []


def collected(teacher: Teacher, recipe: Any, folder: Path) -> Models:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = SimpleNamespace(task=CausalLM, tokenizer=tokenizer, model_config=lambda: {"vocab_size": VOCAB})

    def new_student(dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        return recipe.build(CausalLM(), {"vocab_size": VOCAB}, tokenizer, dtype)

    module = SimpleNamespace(data=data, teacher=teacher, new_student=new_student)
    models = Models(cast(Any, module), folder, CPU)
    for name in ("add_teacher", "add_before"):
        getattr(models, name)()
    return models


def test_a_teacher_that_is_the_student_without_its_adapters_can_be_asked(tmp_path: Path) -> None:
    base = causal_lm()
    models = collected(SelfTeacher(), LoRA(Pretrained(save(base, tmp_path))), tmp_path)
    batch = {"input_ids": tokens()}
    theirs, ours, true = (
        found.features
        for found in (models.subjects[TEACHER].target(batch), models.subjects[BEFORE].target(batch), CausalLM().outputs(base.eval(), batch))
    )
    torch.testing.assert_close(theirs, true)
    torch.testing.assert_close(ours, true)


def test_one_of_several_teachers_does_not_pass_for_all(tmp_path: Path) -> None:
    folder = save(causal_lm(), tmp_path)
    several = Ensemble([OnlineTeacher(folder), Elsewhere(folder)])
    models = collected(several, Pretrained(folder), tmp_path)
    assert len(several.models()) == 1
    assert models.subjects[TEACHER].model is None  # its cost, attacks and weights would be of one part
    assert collected(OnlineTeacher(folder), Pretrained(folder), tmp_path).subjects[TEACHER].model is not None


def test_random_numbers_go_on_as_if_no_report_had_been_made(tmp_path: Path) -> None:
    folder = save(causal_lm(), tmp_path)
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    collected(OnlineTeacher(folder), Pretrained(folder), tmp_path)
    assert torch.equal(torch.rand(3), wanted)


def test_a_teacher_that_ranks_would_share_is_whole_in_one_process(tmp_path: Path) -> None:
    folder = save(causal_lm(), tmp_path)
    teacher = OnlineTeacher(folder, sharded=True)
    assert TEACHER in collected(teacher, Pretrained(folder), tmp_path).subjects

    teacher = OnlineTeacher(folder, sharded=True)
    teacher.is_spread = True  # as `spread` leaves it: each rank holds a part
    for asked in (teacher, Ensemble([teacher, OnlineTeacher(folder)])):
        models = collected(asked, Pretrained(folder), tmp_path)
        assert TEACHER not in models.subjects
        assert "several ranks" in models.absent[TEACHER]
