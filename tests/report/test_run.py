"""The banner's rows, and what a run keeps across a resume."""

from pathlib import Path

from distill.report.run import Run, describe
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


def test_figures_of_the_start_survive_a_resume(tmp_path: Path) -> None:
    first, second = Run(tmp_path / "a", ""), Run(tmp_path / "a", "", resume=True)
    first.before, first.seconds, first.wandb_id = {"count": 5.0, "loss": 2.0}, 12.0, "abc"
    second.load_state_dict(first.state_dict())
    assert (second.before, second.seconds, second.wandb_id) == ({"count": 5.0, "loss": 2.0}, 12.0, "abc")
