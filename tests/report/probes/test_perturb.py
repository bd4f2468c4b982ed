import hashlib
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill.metrics.margin import binary_radius
from distill.report.evidence import NotMeasured
from distill.report.probes.perturb import Probe, at_rest, labels_and_rows, real, some_rows
from distill.tasks import CausalLM, SequenceClassification
from distill.teachers.quantise import quantise
from distill.types import Batch
from tests import models
from tests.report.disturbed import CPU, Linear, LinearTask, kinds, plain_logits, rows, told

KINDS = kinds()


def _probe(kind: str = "language model", batches: list[Batch] | None = None) -> Probe:
    task, model, ours = KINDS[kind]
    return Probe(model, task, batches or ours, models.VOCAB if task.unit == "token" else len(models.LABELS), CPU)


def _digest(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()


def test_rows_are_spread_and_padded_anew():
    batches = rows(count=20, length=8)
    batches[3]["labels"][:] = -100
    chosen = some_rows(batches, rows=6, tokens=1000, pad_id=0)
    singles = [(row, labels) for batch in chosen for row, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
    given = [(row, labels) for batch in batches for row, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
    del given[6:8]
    for (row, labels), index in zip(singles, [0, 3, 6, 9, 12, 15], strict=True):  # ⌊i · 18 / 6⌋
        torch.testing.assert_close(row, given[index][0])
        torch.testing.assert_close(labels, given[index][1])


def test_tokens_bound_the_rows_but_one_is_always_taken():
    batches = rows(count=20, length=8)
    assert sum(len(batch["labels"]) for batch in some_rows(batches, 64, 40, 0)) == 5
    assert sum(len(batch["labels"]) for batch in some_rows(batches, 64, 3, 0)) == 1


def test_rows_of_other_lengths_are_padded_with_what_counts_for_nothing():
    short, long = rows(2, 4)[0], rows(2, 9)[0]
    (batch,) = some_rows([short, long], 64, 1000, pad_id=7)
    assert batch["input_ids"].shape == (4, 9)
    assert (batch["input_ids"][:2, 4:] == 7).all()
    assert (batch["labels"][:2, 4:] == -100).all()
    assert (batch["attention_mask"][:2, 4:] == 0).all()


def test_without_labels_there_is_nothing_to_look_at():
    with pytest.raises(NotMeasured, match="no held-out row has a label"):
        some_rows([{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in rows()], 8, 100, 0)


def test_labels_and_rows_are_in_the_order_of_the_answers():
    batches = rows(4)
    labels, of = labels_and_rows(batches)
    assert labels.tolist() == torch.cat([batch["labels"][batch["labels"] != -100] for batch in batches]).tolist()
    assert of.tolist() == [0] * 6 + [1] * 5 + [2] * 4 + [3] * 6


@pytest.mark.parametrize("kind", KINDS)
def test_undisturbed_it_says_what_the_model_says(kind: str):
    _, model, batches = KINDS[kind]
    top = torch.cat([plain_logits(model, batch).argmax(-1) for batch in batches])
    wanted = top.numpy() == labels_and_rows(batches)[0]
    assert (_probe(kind).clean == wanted).all()
    told_so = _probe(kind, told(model, batches))
    assert told_so.clean.all()
    for unmoved in (told_so.noisy(0.0), told_so.replaced(0.0, []), *told_so.fgsm([0.0]), told_so.pgd(0.0)):
        assert unmoved.all()


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_what_is_added_to_the_embeddings(kind: str):
    _, model, batches = KINDS[kind]
    probe, table = _probe(kind), model.get_input_embeddings()
    every = torch.cat([table(batch["input_ids"])[batch["attention_mask"].bool()] for batch in batches])
    assert probe.scale == pytest.approx(every.square().mean().sqrt().item(), rel=1e-5)
    drawn, right = torch.Generator().manual_seed(5), []
    for batch in batches:
        x = table(batch["input_ids"])
        noise = torch.randn(x.shape, generator=drawn) * 0.8 * probe.scale
        logits = plain_logits(model, batch, x + noise * batch["attention_mask"][..., None])
        right.append(logits.argmax(-1) == batch["labels"][batch["labels"] != -100])
    assert (probe.noisy(0.8, seed=5) == torch.cat(right).numpy()).all()


def _seen(probe: Probe, run: Any) -> list[torch.Tensor]:
    """The embeddings that reach the model while something runs."""
    seen: list[torch.Tensor] = []
    layers = probe.model.base_model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).detach()), with_kwargs=True
    )
    run()
    layers.remove()
    return seen


def test_padding_is_never_moved_and_everything_else_is():
    probe = _probe()
    table = probe.model.get_input_embeddings()
    for size, run in ((0.5, lambda: probe.noisy(0.5)), (0.1, lambda: probe.fgsm([0.1])), (0.1, lambda: probe.pgd(0.1, steps=2))):
        for batch, moved in zip(probe.batches, _seen(probe, run)[-3:], strict=True):
            gap, mask = moved - table(batch["input_ids"]), batch["attention_mask"].bool()
            assert (gap[~mask] == 0).all()
            assert (gap[mask] != 0).any(-1).float().mean() > 0.8  # the last token of a row has no effect, and no gradient
            assert gap.square().mean().sqrt() < 1.5 * size * probe.scale


def _ids(probe: Probe, run: Any) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = probe.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run()
    handle.remove()
    return torch.cat([ids.flatten() for ids in seen])


def test_tokens_are_replaced_by_others_of_the_rows_but_for_special_ones_and_padding():
    batches = rows(count=60, length=12)
    batches[0]["input_ids"][0, 3] = 1
    probe = _probe(batches=batches)
    clean = torch.cat([batch["input_ids"].flatten() for batch in batches])
    mask = torch.cat([batch["attention_mask"].flatten() for batch in batches]).bool()
    some, more = (_ids(probe, lambda share=share: probe.replaced(share, keep=[1])) for share in (0.2, 0.6))
    assert (more[~mask] == 0).all()
    assert (more[mask] != 0).all()  # padding is no word
    assert some[3] == more[3] == 1
    assert set(more.tolist()) <= set(clean.tolist())
    for share, ids in ((0.2, some), (0.6, more)):
        assert (ids != clean)[mask].float().mean().item() == pytest.approx(share * 36 / 37, abs=0.05)  # one of 37 is replaced by itself
    fallen = some != clean
    assert (more[fallen] == some[fallen]).all()


def test_rows_of_special_tokens_alone_cannot_be_replaced():
    with pytest.raises(NotMeasured, match="special"):
        _probe().replaced(0.5, keep=range(models.VOCAB))


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_follows_the_gradient_of_the_cross_entropy(kind: str):
    _, model, batches = KINDS[kind]
    batches = told(model, batches)
    probe, right = _probe(kind, batches), []
    for batch in batches:
        x = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        loss = F.cross_entropy(plain_logits(model, batch, x), batch["labels"][batch["labels"] != -100], reduction="sum")
        sign = torch.autograd.grad(loss, x)[0].sign() * batch["attention_mask"][..., None]
        right.append(plain_logits(model, batch, x + 0.1 * probe.scale * sign).argmax(-1) == batch["labels"][batch["labels"] != -100])
    found, _ = probe.fgsm([0.1, 0.2])
    assert (found == torch.cat(right).numpy()).all()
    assert not found.all()


def test_attacks_hurt_more_than_noise_of_their_size_and_several_steps_more_than_one():
    model = models.causal_lm()
    probe = Probe(model, CausalLM(), told(model, rows(count=24, length=12)), models.VOCAB, CPU)
    (one,), several, noise = probe.fgsm([0.05]), probe.pgd(0.05, steps=5), probe.noisy(0.05)
    assert several.mean() <= one.mean() + 0.02
    assert one.mean() < noise.mean() - 0.1
    assert (probe.pgd(0.05, steps=3, seed=1) == probe.pgd(0.05, steps=3, seed=1)).all()


def test_a_linear_model_falls_where_its_margin_ends():
    model, ids = Linear(), torch.randint(0, models.VOCAB, (60, 3), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 2, (60, 1), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    probe = Probe(model, LinearTask(), [batch], 2, CPU)
    x, w, b = model.embedding(ids).flatten(1).detach(), model.head.weight.detach(), model.head.bias.detach()
    radius = binary_radius(x, w[1] - w[0], float(b[1] - b[0]), 2 * labels[:, 0] - 1).numpy()
    for epsilon in (0.05, 0.2, 0.6):
        wanted = radius > epsilon * probe.scale
        assert 0 < wanted.mean() < 1
        for found in (*probe.fgsm([epsilon]), probe.pgd(epsilon, steps=4)):
            assert (found == wanted).all()


def test_packed_rows_are_real_where_their_document_has_a_label():
    batch = {
        "input_ids": torch.tensor([[5, 6, 1, 7, 1, 0, 0, 0]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]]),
        "labels": torch.tensor([[6, 1, -100, 1, -100, -100, -100, -100]]),
    }
    assert real(batch).tolist() == [[True] * 5 + [False] * 3]
    assert real({"input_ids": batch["input_ids"]}).all()


def _as_found(model: nn.Module) -> Any:
    return (
        _digest(model),
        [(p.requires_grad, p.grad) for p in model.parameters()],
        [m.training for m in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_a_model_is_left_as_it_was(frozen: bool):
    model = models.causal_lm(attention_dropout=0.5).train().requires_grad_(not frozen)
    model.base_model.layers[0].eval()
    before = _as_found(model)
    probe = Probe(model, CausalLM(), rows(), models.VOCAB, CPU)
    first = [probe.clean, probe.noisy(0.5), probe.replaced(0.2, []), *probe.fgsm([0.1]), probe.pgd(0.1)]
    assert _as_found(model) == before
    calm = Probe(model.eval(), CausalLM(), rows(), models.VOCAB, CPU)  # while it is looked at nothing is dropped
    again = [calm.clean, calm.noisy(0.5), calm.replaced(0.2, []), *calm.fgsm([0.1]), calm.pgd(0.1)]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_a_model_that_fails_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch):
    model = models.causal_lm().train()
    before, probe = _as_found(model), Probe(model, CausalLM(), rows(), models.VOCAB, CPU)
    monkeypatch.setattr(model.base_model.layers[1], "forward", lambda *_args, **_kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        probe.fgsm([0.1])
    monkeypatch.undo()
    assert _as_found(model) == before


def test_gradients_are_had_where_none_are_kept():
    with torch.inference_mode():
        batches = [{name: value.clone() for name, value in batch.items()} for batch in KINDS["language model"][2]]
        inside = _probe(batches=batches).fgsm([0.1])[0], _probe(batches=batches).pgd(0.1)
    assert (inside[0] == _probe().fgsm([0.1])[0]).all()
    assert (inside[1] == _probe().pgd(0.1)).all()


@pytest.mark.parametrize("attack", [lambda p: p.fgsm([0.1]), lambda p: p.pgd(0.1)], ids=["fgsm", "pgd"])
def test_rounded_gradients_are_refused(attack: Any):
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(NotMeasured, match="autocast"):
        attack(_probe())
    pytest.importorskip("torchao")
    model = models.causal_lm()
    quantise(model)
    probe = Probe(model, CausalLM(), rows(), models.VOCAB, CPU)
    with pytest.raises(NotMeasured, match="quantised"):
        attack(probe)
    assert len(probe.noisy(0.1)) == len(labels_and_rows(rows())[0])


def test_weights_that_are_elsewhere_are_said_to_be():
    with pytest.raises(NotMeasured, match="only while it runs"):
        Probe(models.causal_lm(), CausalLM(), rows(), models.VOCAB, torch.device("meta"))


def test_embeddings_that_the_model_does_not_ask_for_are_noticed():
    model = models.classifier()
    probe = Probe(model, SequenceClassification(), KINDS["classifier"][2], 3, CPU)
    table = model.get_input_embeddings()
    model.forward = lambda input_ids, **kw: type(model).forward(model, inputs_embeds=table.weight[input_ids], **kw)
    with pytest.raises(NotMeasured, match="asked 0 times"):
        probe.noisy(0.5)


def test_every_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    model[1][0].eval()
    with at_rest(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
