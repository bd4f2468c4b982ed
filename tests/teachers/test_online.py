import functools
import hashlib
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from distill import hub
from distill.losses.chunked import chunked_objective
from distill.losses.divergence import ForwardKL
from distill.tasks import CausalLM, SequenceClassification
from distill.teachers import online
from distill.teachers.online import OnlineTeacher
from distill.types import ConfigError, Outputs
from tests import pair
from tests.models import LABELS, VOCAB, causal_lm, classifier, expected_labels, save, tokenizer, tokens
from tests.ranks import run_ranks

CPU = torch.device("cpu")
TOKENS = {"vocab_size": VOCAB}


def ready(folder: Path, dtype: torch.dtype = torch.float32) -> OnlineTeacher:
    teacher = OnlineTeacher(save(causal_lm(), folder))
    teacher.setup(CausalLM(), CPU, dtype)
    return teacher


def fingerprint(model: nn.Module) -> str:
    state = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(name.encode() + value.numpy().tobytes() for name, value in state)).hexdigest()


def test_frozen_and_evaluating(tmp_path: Path) -> None:
    teacher = ready(tmp_path)
    assert teacher.model is not None
    assert not any(module.training for module in teacher.model.modules())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    teacher.assert_frozen()


@pytest.mark.parametrize("spoil", [lambda model: model.train(), lambda model: model.requires_grad_(True)])
def test_assert_frozen_can_fail(spoil: object, tmp_path: Path) -> None:
    teacher = ready(tmp_path)
    spoil(teacher.model)  # type: ignore[operator]
    with pytest.raises(AssertionError, match="the teacher"):
        teacher.assert_frozen()


def test_gives_the_models_own_logits_without_a_graph(tmp_path: Path) -> None:
    teacher = ready(tmp_path)
    out = teacher({"input_ids": tokens()}, ["model.layers.0"])
    torch.testing.assert_close(out.head(out.features), causal_lm()(tokens()).logits)
    assert not out.features.requires_grad
    assert not out.taps["model.layers.0"].requires_grad


def test_asks_for_no_cache(tmp_path: Path) -> None:
    teacher = ready(tmp_path)
    assert teacher.model is not None
    seen = []
    teacher.model.model.register_forward_hook(lambda _module, _inputs, output: seen.append(output.past_key_values))
    teacher({"input_ids": tokens()})
    assert seen == [None]


def test_is_no_part_of_a_module_that_holds_it(tmp_path: Path) -> None:
    teacher = ready(tmp_path)
    holder = nn.Linear(2, 2)
    holder.teacher = teacher  # type: ignore[assignment]
    assert not isinstance(teacher, nn.Module)
    assert list(holder.state_dict()) == ["weight", "bias"]
    holder.train()
    teacher.assert_frozen()


def test_training_a_student_leaves_it_as_it_was(tmp_path: Path) -> None:
    teacher, student = ready(tmp_path), causal_lm(seed=1).train()
    assert teacher.model is not None
    before = fingerprint(teacher.model)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    task, batch, labels = CausalLM(), {"input_ids": tokens()}, tokens()
    values = []
    for _ in range(5):
        total, _, _ = chunked_objective(task.outputs(student, batch), teacher(batch), labels, {"kd": ForwardKL()}, {"kd": 1 / 12}, VOCAB)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert values[-1] < values[0]  # the student moved
    assert fingerprint(teacher.model) == before
    assert all(p.grad is None for p in teacher.model.parameters())


def test_no_gradient_reaches_it_even_where_it_is_made_trainable(tmp_path: Path) -> None:
    teacher, student = ready(tmp_path), causal_lm(seed=1)
    assert teacher.model is not None
    teacher.model.requires_grad_(True)
    batch = {"input_ids": tokens()}
    out = teacher(batch)
    chunked_objective(CausalLM().outputs(student, batch), out, tokens(), {"kd": ForwardKL()}, {"kd": 1.0}, VOCAB)[0].backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert isinstance(out, Outputs)


def test_setup_a_second_time_does_nothing(tmp_path: Path) -> None:
    teacher = ready(tmp_path)
    model = teacher.model
    teacher.setup(CausalLM(), CPU, torch.float32)
    assert teacher.model is model


@pytest.mark.parametrize(("asked", "found"), [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)])
def test_dtype(asked: str, found: torch.dtype, tmp_path: Path) -> None:
    teacher = OnlineTeacher(save(causal_lm(), tmp_path), dtype=asked)  # type: ignore[arg-type]
    teacher.setup(CausalLM(), CPU, torch.bfloat16)
    assert teacher.model is not None
    assert {p.dtype for p in teacher.model.parameters()} == {found}
    assert teacher.describe()["dtype"] == str(found).removeprefix("torch.")
    assert teacher.describe()["trainable"] == 0


def test_check_passes_for_the_same_tokenizer(tmp_path: Path) -> None:
    ready(tmp_path).check(tokenizer(), TOKENS)


def test_check_refuses_another_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.teacher and data\.tokenizer have different tokenizers \(40 / 40 tokens, 74 with"):
        ready(tmp_path).check(tokenizer(first="x"), TOKENS)  # 37 words on each side


def test_check_refuses_other_labels(tmp_path: Path) -> None:
    teacher = OnlineTeacher(save(classifier(), tmp_path))
    teacher.setup(SequenceClassification(), CPU, torch.float32)
    teacher.check(tokenizer(), expected_labels())
    with pytest.raises(ConfigError, match=r"model\.teacher has 3 labels, but the data have 2"):
        teacher.check(tokenizer(), expected_labels(("no", "yes")))
    with pytest.raises(
        ConfigError, match=r"calls class 0 'negative', but the data call it 'positive'; set data\.labels to the model's order"
    ):
        teacher.check(tokenizer(), expected_labels(LABELS[::-1]))


def test_check_does_its_work_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, words, compared = ready(tmp_path), tokenizer(), []
    same_tokens = hub.same_tokens
    monkeypatch.setattr(hub, "same_tokens", lambda *args: compared.append(args) or same_tokens(*args))
    for _ in range(3):
        teacher.check(words, TOKENS)
    assert len(compared) == 1
    for _ in range(2):
        with pytest.raises(ConfigError, match="different tokenizers"):  # other data; and what was refused stays refused
            teacher.check(tokenizer(first="x"), TOKENS)


def test_a_decoder_without_padding_token_takes_the_datas(tmp_path: Path) -> None:
    teacher = OnlineTeacher(save(classifier("gpt2"), tmp_path))
    teacher.setup(SequenceClassification(), CPU, torch.float32)
    teacher.check(tokenizer(), expected_labels() | {"pad_token_id": 0})
    ids = tokens(2, 6)
    ids[1, 4:] = 0
    alone = classifier("gpt2")(input_ids=ids[1:, :4]).logits
    torch.testing.assert_close(teacher({"input_ids": ids}).features[1], alone)


def test_the_head_is_checked_on_the_device_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some kernels run nowhere else; `meta` is a device that every machine has."""
    seen = []
    monkeypatch.setattr(online, "check_head", lambda _task, model, _who: seen.append(model.device.type))
    OnlineTeacher(save(causal_lm(), tmp_path)).setup(CausalLM(), torch.device("meta"), torch.float32)
    assert seen == ["meta"]


def test_a_teacher_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    teacher = OnlineTeacher(save(classifier().bert, tmp_path))
    with pytest.raises(ConfigError, match="head"):
        teacher.setup(SequenceClassification(), CPU, torch.float32)


def test_recipe_is_needed_until_the_folder_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    teacher = OnlineTeacher(str(folder), recipe="configs/teacher.yaml")
    assert teacher.recipe_needed() == "configs/teacher.yaml"
    save(causal_lm(), folder)
    assert teacher.recipe_needed() is None
    assert OnlineTeacher(str(tmp_path / "nothing")).recipe_needed() is None


def test_missing_folder() -> None:
    with pytest.raises(ConfigError, match=r"model\.teacher\.model: no folder './nothing' here"):
        OnlineTeacher("./nothing").setup(CausalLM(), CPU, torch.float32)


def _trained_with(folder: str, sharded: bool) -> tuple[list[float], int]:
    path = Path(folder)
    teacher = OnlineTeacher(str(path / "teacher"), sharded=sharded)
    losses: list[float] = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    module = pair.module(path, teacher=teacher)
    trainer = pair.trainer(max_steps=4, devices=2, strategy="ddp", limit_val_batches=1, val_check_interval=2, callbacks=[Losses()])
    trainer.fit(module, pair.data(path, batch_size=2))
    assert teacher.model is not None
    return losses, sum(p.numel() for p in teacher.model.parameters())


@pytest.mark.slow
def test_a_sharded_teacher_gives_the_same_losses(tmp_path: Path) -> None:
    pair.data(tmp_path)
    (whole, held), _ = run_ranks(_trained_with, 2, str(tmp_path), False)
    (parts, held_in_parts), (other, _) = run_ranks(_trained_with, 2, str(tmp_path), True)
    assert parts == pytest.approx(whole, abs=1e-5)
    assert other == parts
    assert held_in_parts < held


@pytest.mark.parametrize("option", [{"quantize": "int8"}, {"compile": True}, {"offload": True}, {"micro_batch": 1}])
def test_what_a_sharded_teacher_cannot_have(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))} and sharded cannot be had together"):
        OnlineTeacher("x", sharded=True, **option)


def test_options_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="compile and offload cannot be had together"):
        OnlineTeacher("x", compile=True, offload=True)
    with pytest.raises(ConfigError, match=r"micro_batch must be at least 1, got 0"):
        OnlineTeacher("x", micro_batch=0)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_rows_at_a_time_are_all_rows(size: int, tmp_path: Path) -> None:
    teacher, few = ready(tmp_path), OnlineTeacher(str(tmp_path), micro_batch=size)
    few.setup(CausalLM(), CPU, torch.float32)
    assert few.model is not None
    rows: list[int] = []
    few.model.base_model.register_forward_pre_hook(lambda _m, _a, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    mask = torch.ones(5, 6, dtype=torch.long)
    mask[1, 4:] = 0
    batch, taps = {"input_ids": tokens(5), "attention_mask": mask}, ["model.layers.0", "model.layers.1:input"]
    whole, parts = teacher(batch, taps), few(batch, taps)
    assert rows == {1: [1] * 5, 2: [2, 2, 1], 5: [5]}[size]
    torch.testing.assert_close(parts.features, whole.features)
    for tap in taps:
        torch.testing.assert_close(parts.taps[tap], whole.taps[tap])


def test_the_trunk_is_compiled_and_shows_no_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda call, **_: lambda *args, **kwargs: asked.append(call.__self__) or call(*args, **kwargs))
    plain, teacher = ready(tmp_path), OnlineTeacher(str(tmp_path), compile=True)
    teacher.setup(CausalLM(), CPU, torch.float32)
    assert asked == []  # what is tried while it loads is not worth the wait
    assert teacher.model is not None
    assert torch.equal(teacher({"input_ids": tokens()}).features, plain({"input_ids": tokens()}).features)
    assert asked == [teacher.model.base_model]
    with pytest.raises(ConfigError, match=r"activations \(model\.layers\.0\), which a compiled teacher does not show"):
        teacher({"input_ids": tokens()}, ["model.layers.0"])


def test_traced_it_gives_the_same_of_packed_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # traced alone: its code is torch's matter
    folder = save(causal_lm(num_hidden_layers=1), tmp_path)
    plain, teacher = OnlineTeacher(folder), OnlineTeacher(folder, compile=True)
    for each in (plain, teacher):
        each.setup(CausalLM(), CPU, torch.float32)
    for length in (8, 11, 13):  # the second is compiled for any length
        positions = torch.cat([torch.arange(3), torch.arange(length - 3)]).expand(2, length)
        batch = {"input_ids": tokens(2, length), "position_ids": positions}
        torch.testing.assert_close(teacher(batch).features, plain(batch).features, rtol=1e-4, atol=1e-5)
