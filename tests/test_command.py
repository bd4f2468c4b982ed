"""The command, as a person meets it: what a run leaves behind, what goes on, and what a mistake is answered with."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.cli import main
from distill.report import run
from tests import pair

MINE = '''
from distill.losses.base import TokenLoss

class Mine(TokenLoss):
    """Reverse KL."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, student, teacher, labels_N):
        return self.scale * (student.logp().exp() * (student.logp() - teacher.logp())).sum(-1)
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a teacher, data, and `kd.yaml` that pairs them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)  # of another test's folder
    pair.teacher_folder(tmp_path / "teacher")
    pair.prompts(tmp_path / "prompts.jsonl", 80)
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(config()))
    return tmp_path


ROOT = Path(__file__).parents[1]


def config() -> dict[str, Any]:
    return {
        "report_rows": 0,
        "model": {
            "teacher": {"class_path": "OnlineTeacher", "init_args": {"model": "teacher"}},
            "student": {"class_path": "FromConfig", "init_args": {"config": dict(pair.STUDENT)}},
            "losses": {"ce": "CrossEntropy", "kd": {"class_path": "ForwardKL", "init_args": {"temperature": 2.0}}},
            "balancer": {"class_path": "FixedWeights", "init_args": {"weights": {"ce": 0.3, "kd": 0.7}}},
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {
            "class_path": "PromptData",
            "init_args": {
                "train_data": "prompts.jsonl",
                "tokenizer": "teacher",
                "pack": False,
                "max_length": 32,
                "val_fraction": 0.2,
                "batch_size": 4,
            },
        },
        "trainer": {"accelerator": "cpu", "max_steps": 6, "max_epochs": -1, "log_every_n_steps": 2},
        "save_every": 2,
    }


def fit(*args: str) -> int:
    return main(["fit", "--config", "kd.yaml", *args])


def test_a_run_leaves_student_report_metrics_config_and_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--name", "a", "--model.losses.kd.temperature=4") == 0
    run = here / "runs" / "a"
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.yaml", "metrics.jsonl", "report.json", "student"]
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["losses"]["kd"]["init_args"]["temperature"] == 4.0
    report = json.loads((run / "report.json").read_text())
    assert list(report["models"]) == ["teacher", "student before", "student distilled"]
    after, teacher = report["models"]["student distilled"], report["models"]["teacher"]
    assert after["loss"] < report["models"]["student before"]["loss"]
    assert after["retention"] == pytest.approx(after["accuracy"] / teacher["accuracy"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"train/loss", "train/ce", "train/kd", "train/lr", "train/kd_temperature"} <= lines[0].keys()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "student"), AutoTokenizer.from_pretrained(run / "student")
    saved = torch.load(run / "checkpoints" / "step-00000006.ckpt", weights_only=False)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[f"student.{name}"])
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained("teacher").get_vocab()
    printed = capsys.readouterr().out
    assert "student distilled" in printed
    assert "runs/a/student" in printed


def test_the_report_agrees_with_transformers_by_hand(here: Path) -> None:
    assert fit("--name", "a") == 0
    report = json.loads((here / "runs/a/report.json").read_text())["models"]
    data = pair.data(here, rows=80)
    data.val_fraction = 0.2
    data.setup("fit")
    student, teacher = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64).eval() for p in ("runs/a/student", "teacher"))
    loss = kl = agree = count = 0.0
    for row in data.val_set:
        ids, labels = torch.tensor(row["input_ids"])[None], torch.tensor(row["labels"])
        valid = labels != -100
        q, p = (m(input_ids=ids).logits[0][valid].log_softmax(-1) for m in (student, teacher))
        loss -= q[torch.arange(len(q)), labels[valid]].sum().item()
        kl += (p.exp() * (p - q)).sum().item()
        agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
        count += int(valid.sum())
    got = report["student distilled"]
    assert got["count"] == count
    assert [got["loss"], got["kl"], got["agreement"]] == pytest.approx([loss / count, kl / count, agree / count], rel=1e-5)


def test_a_run_folder_is_never_overwritten(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "runs" / "a").mkdir(parents=True)
    (here / "runs" / "a" / "precious").write_text("x")
    assert fit("--name", "a") == 2
    assert "the run folder runs/a exists; take another --name, or resume with --ckpt_path last" in capsys.readouterr().err
    assert [p.name for p in (here / "runs" / "a").iterdir()] == ["precious"]


def test_a_run_goes_on_where_it_stopped_and_ends_like_one_that_never_did(here: Path) -> None:
    assert fit("--name", "whole", "--model.optimizer.schedule=constant") == 0
    assert fit("--name", "half", "--model.optimizer.schedule=constant", "--trainer.max_steps=3") == 0
    (here / "runs/half/report.html").write_text("the page of 3 steps")
    assert main(["--config", "runs/half/config.yaml", "--ckpt_path", "last", "--trainer.max_steps=6"]) == 0
    assert not (here / "runs/half/report.html").exists(), "a page of other figures"
    whole, half = (AutoModelForCausalLM.from_pretrained(here / "runs" / name / "student").state_dict() for name in ("whole", "half"))
    assert all(torch.equal(whole[name], half[name]) for name in whole)
    report = json.loads((here / "runs/half/report.json").read_text())
    assert report["steps"] == 6
    steps = [json.loads(line)["step"] for line in (here / "runs/half/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_finished_run_is_measured_again_by_its_own_config(here: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    extra = ["--data.test_data=prompts.jsonl"] if verb == "test" else []
    assert fit("--name", "a", *extra) == 0
    before = sorted(p for p in (here / "runs").rglob("*"))
    capsys.readouterr()
    assert main([verb, "--config", "runs/a/config.yaml", "--ckpt_path", "last"]) == 0
    printed = capsys.readouterr().out
    if verb == "validate":
        loss = json.loads((here / "runs/a/report.json").read_text())["models"]["student distilled"]["loss"]
        assert f"{loss:.4f}"[:5] in printed
    assert "teacher_loss" in printed
    assert sorted(p for p in (here / "runs").rglob("*")) == before


def test_the_baseline_is_the_same_student_without_its_teacher(here: Path) -> None:
    assert fit("--name", "a", "--baseline=true") == 0
    models = json.loads((here / "runs/a/report.json").read_text())["models"]
    assert list(models) == ["teacher", "student before", "student alone", "student distilled"]
    alone = json.loads((here / "runs/a-alone/report.json").read_text())["models"]
    assert alone["student before"]["loss"] == pytest.approx(models["student before"]["loss"])
    assert alone["student after"]["loss"] == pytest.approx(models["student alone"]["loss"], rel=1e-6)
    assert fit("--name", "b", "--alone=true") == 0
    by_hand = json.loads((here / "runs/b/report.json").read_text())["models"]["student after"]["loss"]
    assert by_hand == pytest.approx(models["student alone"]["loss"], rel=1e-6)


def test_a_missing_teacher_is_made_by_its_recipe_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = config()
    recipe["model"] = {"student": recipe["model"]["student"], "losses": {"ce": "CrossEntropy"}}
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"name": "made"}))
    args = ["--model.teacher.model=runs/made/student", "--model.teacher.recipe=recipe.yaml"]
    assert fit("--name", "dry", *args, "--dry-run") == 0
    assert "recipe.yaml would make it first" in capsys.readouterr().out
    assert not (here / "runs").exists()
    (here / "runs" / "made").mkdir(parents=True)  # of a first try that was killed before its first checkpoint
    assert fit("--name", "a", *args) == 0
    assert "training it first, once, with recipe.yaml" in capsys.readouterr().out
    assert fit("--name", "b", *args) == 0
    assert "training it first" not in capsys.readouterr().out


def test_a_loss_of_ones_own_needs_one_file(here: Path) -> None:
    (here / "my_losses.py").write_text(MINE)
    assert fit("--name", "a", "--model.losses.mine", "my_losses.Mine", "--model.losses.mine.scale=0.5") == 0
    line = json.loads((here / "runs/a/metrics.jsonl").read_text().splitlines()[0])
    assert line["train/mine"] > 0
    assert line["train/loss"] == pytest.approx(0.3 * line["train/ce"] + 0.7 * line["train/kd"] + line["train/mine"], rel=1e-4)


def test_the_dry_run_shows_everything_and_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.rglob("*"))
    assert fit("--dry-run") == 0
    printed = capsys.readouterr().out
    for part in ("agree on every token", "16 classes", "⟦", "logits, in chunks", "One real forward and backward: fine", "parameters"):
        assert part in printed
    assert [p for p in sorted(here.rglob("*")) if "cache" not in str(p)] == [p for p in before if "cache" not in str(p)]


def test_seed_changes_initialisation_and_order(here: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert fit("--name", name, f"--seed_everything={seed}", "--trainer.max_steps=2") == 0
    a, b, c = (json.loads((here / f"runs/{n}/report.json").read_text())["models"] for n in "abc")
    assert a["student distilled"]["loss"] == b["student distilled"]["loss"] != c["student distilled"]["loss"]
    assert a["student before"]["loss"] != c["student before"]["loss"]
    assert yaml.safe_load((here / "runs/c/config.yaml").read_text())["seed_everything"] == 2


def test_a_finished_run_cannot_be_written_over_from_another_ones_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--name", "victim", "--trainer.max_steps=2") == 0
    assert fit("--name", "other", "--trainer.max_steps=2") == 0
    before = (here / "runs/victim/report.json").read_text()
    checkpoint = "--ckpt_path=runs/other/checkpoints/step-00000002.ckpt"
    assert fit("--name", "victim", checkpoint, "--trainer.max_steps=4") == 2
    assert "the run folder runs/victim exists" in capsys.readouterr().err
    assert (here / "runs/victim/report.json").read_text() == before
    assert fit("--name", "third", checkpoint, "--trainer.max_steps=4") == 0, "a new run may begin from any checkpoint"


def test_a_baseline_of_another_configuration_is_refused_and_an_interrupted_one_made_again(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "runs" / "a-alone").mkdir(parents=True)  # of a baseline that was killed before its first checkpoint
    assert fit("--name", "a", "--baseline=true") == 0
    shutil.rmtree(here / "runs" / "a")
    assert fit("--name", "a", "--baseline=true") == 0, "a finished baseline of the same configuration is used again"
    shutil.rmtree(here / "runs" / "a")
    assert fit("--name", "a", "--baseline=true", "--trainer.max_steps=9") == 2
    assert "runs/a-alone is the baseline of another configuration (`trainer` differs)" in capsys.readouterr().err


def test_validating_a_run_without_its_checkpoint_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--name", "a", "--trainer.max_steps=2") == 0
    assert main(["validate", "--config", "runs/a/config.yaml"]) == 2
    assert "runs/a has a trained student; say --ckpt_path last to validate it" in capsys.readouterr().err


def test_the_dry_run_is_of_the_run_as_configured(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--dry-run", "--trainer.accumulate_grad_batches=2", "--model.optimizer.warmup=3", "--trainer.min_steps=5"]
    assert fit(*args) == 0
    printed = capsys.readouterr().out
    assert printed.count("One real forward and backward: fine") == 1
    assert any(line.split() == ["steps", "6"] for line in printed.splitlines())


def test_lightnings_own_switches_work(here: Path) -> None:
    assert fit("--name", "a", "--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false", "--trainer.logger=true") == 0
    assert (here / "runs/a/student/model.safetensors").is_file()


def test_a_crash_while_measuring_leaves_the_student(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = run.evaluate

    def second_fails(*args: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return real(*args)

    monkeypatch.setattr(run, "evaluate", second_fails)
    with pytest.raises(RuntimeError, match="no memory"):
        fit("--name", "a")
    AutoModelForCausalLM.from_pretrained(here / "runs/a/student")


def test_a_crash_in_the_first_forward_leaves_no_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> dict[str, float]:
        raise RuntimeError("no memory")

    monkeypatch.setattr(run, "evaluate", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        fit("--name", "a")
    assert not (here / "runs" / "a").exists()


def test_a_mistake_in_a_file_of_ones_own_names_file_and_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "broken_losses.py").write_text("x = (\n")
    assert fit("--name", "a", "--model.losses.mine", "broken_losses.X") == 2
    assert "broken_losses.py" in capsys.readouterr().err


BAD = [
    (["--trainer.max_steps=0"], "nothing to train: trainer.max_steps"),
    (["--trainer.max_steps=-1", "--trainer.max_time=00:00:00:02"], "set trainer.max_steps or trainer.max_epochs above 0"),
    (["--seed_everything=-1"], "-1"),
    (["--model.chunk=-1"], "model.chunk must be at least 1, got -1"),
    (["--model.teacher.model=runs/x/student", "--model.teacher.recipe=kd_lama.yaml"], "Did you mean 'kd_llama.yaml'?"),
    (["--trainer.callbacks=GradientAccumulationScheduler", "--trainer.callbacks.scheduling={0: 1, 1: 2}"], "use trainer.accumulate_grad"),
    (["--trainer.max_stps=3"], "does not accept option 'trainer.max_stps'. Did you mean 'trainer.max_steps'?"),
    (["--data.train_data=promts.jsonl"], "promts.jsonl"),
    (["--data.prompt=promt"], "promt"),
    (["--model.teacher.model=nowhere/at/all"], "model.teacher.model: no folder 'nowhere/at/all'"),
    (["--data.batch_size=1000"], "one optimizer step takes 1000"),
    (["--model.optimizer.lr=-1"], "lr is out of range, got -1.0"),
    (["--model.losses.kd.temperature=0"], "temperature must be > 0, got 0.0"),
    (["--model.balancer.weights.kl=1"], "weights for ['kl'], but model.losses has ['ce', 'kd']"),
    (["--model.teacher=null"], "['kd'] need a teacher"),
    (["--trainer.precision=bf61"], "Did you mean 'bf16'?"),
    (["--trainer.val_check_interval=1000"], "trainer: `val_check_interval` (1000) must be less than or equal to"),
    (["--ckpt_path=last"], "no checkpoint"),
    (["--model.student.config.hidden_size=15"], "hidden size (15) is not a multiple"),
    (["--model.student.config.vocab_size=99"], "vocab_size is 99, but the data say 16"),
    (["--model.student.config.model_type=lama"], "lama"),
    (["--model.optimizer.lr=1e30", "--model.optimizer.warmup=0", "--model.max_skipped_steps=0"], "nan"),
]


@pytest.mark.parametrize(("args", "said"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_a_mistake_is_one_line_exit_2_and_nothing_left(here: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    assert fit("--name", "a", *args) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1
    if "lr=1e30" not in args[0]:
        assert not (here / "runs" / "a").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainer": {"max_stps": 3}}, "max_stps'. Did you mean"),
        ({"modle": {"teacher": None}}, "'modle.teacher'. Did you mean 'model.teacher'?"),
        ({"seed_evrything": 3}, "seed_evrything'. Did you mean 'seed_everything'?"),
        ({"modle": None}, "modle"),
        ({"data": {"class_path": "PromtData"}}, "no class 'PromtData'. Did you mean 'PromptData'?"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_too(here: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str) -> None:
    (here / "kd.yaml").write_text(yaml.safe_dump(config() | change))
    assert fit("--name", "a") == 2
    assert said in capsys.readouterr().err


def test_a_teacher_with_another_tokenizer_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.data import helpers

    other = here / "other"
    pair.teacher_folder(other)
    swapped = list(helpers.WORDS)
    swapped[4], swapped[5] = swapped[5], swapped[4]
    text = (other / "tokenizer.json").read_text().replace('"a": 4', '"a": 5', 1).replace('"b": 5', '"b": 4', 1)
    (other / "tokenizer.json").write_text(text)
    assert fit("--name", "a", "--model.teacher.model=other") == 2
    assert "different tokenizers (16 / 16 tokens, 2 with another id, e.g. 'a': 5 / 4, 'b': 4 / 5)" in capsys.readouterr().err
