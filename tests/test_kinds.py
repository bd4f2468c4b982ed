"""One command for every kind of run: classification, LoRA, bf16, two ranks, W&B, no validation data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from distill.cli import main
from tests.data.helpers import WORDS, word_tokenizer
from tests.test_command import ROOT, fit, here

__all__ = ["here"]


def tiny_bert(folder: Path, width: int, labels: list[str]) -> str:
    word_tokenizer(folder)
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    config = BertConfig(
        hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=len(WORDS), pad_token_id=1, **names
    )
    torch.manual_seed(1)
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def bert_args(here: Path, teacher_labels: list[str]) -> list[str]:
    (here / "train.tsv").write_text(
        "text\tlabel\n" + "".join(f"{'abcdefghij'[i % 10]} {'abc'[i % 3]}\t{'xyz'[i % 3]}\n" for i in range(90))
    )
    teacher, student = tiny_bert(here / "teacher_bert", 24, teacher_labels), tiny_bert(here / "student_bert", 16, ["LABEL_0", "LABEL_1"])
    paths = [f"--model.teacher.model={teacher}", f"--model.student.model={student}", f"--data.tokenizer={teacher}"]
    return [
        *paths,
        "--data.train_data=train.tsv",
        "--data.batch_size=8",
        "--data.val_fraction=0.2",
        "--trainer.max_epochs=8",
        "--model.optimizer.lr=5e-3",
        "--model.losses.relations.relation_heads=8",
        "--model.balancer.shares.kd=0.01",  # a random teacher has nothing to teach
        "--model.balancer.shares.relations=0",
    ]


def test_kd_bert_on_a_local_file(here: Path) -> None:
    assert main(["--config", "kd_bert.yaml", "--name", "a", *bert_args(here, ["x", "y", "z"])]) == 0
    models = json.loads((here / "runs/a/report.json").read_text())
    assert models["unit"] == "sample"
    assert models["models"]["student distilled"]["loss"] < models["models"]["student before"]["loss"]
    student = AutoModelForSequenceClassification.from_pretrained(here / "runs/a/student")
    assert student.config.id2label == {0: "x", 1: "y", 2: "z"}


def test_kd_bert_movement_on_a_local_file(here: Path) -> None:
    assert main(["--config", "kd_bert_movement.yaml", "--name", "a", *bert_args(here, ["x", "y", "z"])]) == 0
    student = AutoModelForSequenceClassification.from_pretrained(here / "runs/a/student")
    weights = [layer.weight for name, layer in student.named_modules() if isinstance(layer, torch.nn.Linear) and "encoder" in name]
    assert [float((weight == 0).float().mean()) for weight in weights] == pytest.approx([0.9] * 6, abs=0.002)
    assert not bool((student.bert.pooler.dense.weight == 0).any())


def test_a_teacher_of_other_labels_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "kd_bert.yaml", "--name", "a", *bert_args(here, ["x", "z", "y"])]) == 2
    assert "model.teacher calls class 1 'z', but the data call it 'y'" in capsys.readouterr().err
    assert main(["--config", "kd_bert.yaml", "--name", "a", *bert_args(here, ["x", "z"])]) == 2
    assert "model.teacher has 2 labels, but the data have 3" in capsys.readouterr().err


def test_lora_trains_little_and_saves_a_merged_model_that_loads(here: Path) -> None:
    args = ["--model.student=LoRA", "--model.student.base=Pretrained", "--model.student.base.model=teacher", "--model.student.r=2"]
    assert fit("--name", "a", *args) == 0
    models = json.loads((here / "runs/a/report.json").read_text())["models"]
    assert models["student before"]["kl"] == pytest.approx(0.0, abs=1e-6), "a fresh adapter changes nothing, and the base is the teacher"
    assert models["student before"]["trainable"] < 0.3 * models["student before"]["parameters"]
    assert not (here / "runs/a/student/adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(here / "runs/a/student")


def test_rows_longer_than_the_model_has_positions_for_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--name", "a", "--model.student.config.max_position_embeddings=16") == 2
    assert "model.student has positions for 16 tokens, but data.max_length is 32" in capsys.readouterr().err


def test_an_architecture_that_mixes_packed_documents_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    student = json.dumps({"class_path": "FromConfig", "init_args": {"config": sizes | {"word_embed_proj_dim": 16}}})
    assert fit("--name", "a", f"--model.student={student}", "--data.pack=true") == 2
    assert "model.student: documents packed into one window would see each other" in capsys.readouterr().err
    assert fit("--name", "a", f"--model.student={student}") == 0


def test_bf16_gradient_checkpointing_and_accumulation(here: Path) -> None:
    args = ["--trainer.precision=bf16-mixed", "--model.student.gradient_checkpointing=true", "--trainer.accumulate_grad_batches=2"]
    assert fit("--name", "a", *args) == 0
    assert fit("--name", "b", "--trainer.precision=bf16-true") == 0
    for name, dtype in (("a", torch.float32), ("b", torch.bfloat16)):
        assert AutoModelForCausalLM.from_pretrained(here / f"runs/{name}/student").dtype == dtype


def test_without_validation_data_the_student_is_saved_all_the_same(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--name", "a", "--data.val_fraction=0") == 0
    assert "No validation data, nothing measured" in capsys.readouterr().out
    assert (here / "runs/a/student/model.safetensors").is_file()


def test_wandb_offline_keeps_the_run_and_says_how_to_sync(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(here))
    assert fit("--name", "a", "--logger=wandb") == 0
    assert "wandb sync" in capsys.readouterr().err
    assert list((here / "runs/a/wandb").glob("offline-run-*/*.wandb"))
    assert (here / "runs/a/metrics.jsonl").is_file()


@pytest.mark.slow
def test_two_ranks_from_the_command_line(here: Path) -> None:
    args = ["--name", "two", "--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=2", "--trainer.val_check_interval=3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), "--config", "kd.yaml", *args, "--trainer.check_val_every_n_epoch=null"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert fit("--name", "one") == 0
    two, one = (json.loads((here / f"runs/{name}/report.json").read_text())["models"] for name in ("two", "one"))
    for model in one:
        for key in ("count", "loss", "kl", "accuracy"):
            assert two[model][key] == pytest.approx(one[model][key], rel=1e-4, abs=1e-6)
