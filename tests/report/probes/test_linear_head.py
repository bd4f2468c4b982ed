import pytest
import torch
from torch import nn

from distill.report.evidence import NotMeasured
from distill.report.probes.linear_head import LinearHead, linear_head
from distill.tasks import CausalLM, SequenceClassification
from tests import models
from tests.report.disturbed import plain_logits, rows, texts


def _logits(found: LinearHead) -> torch.Tensor:
    return nn.functional.linear(found.features, found.weight, found.bias)


@pytest.mark.parametrize("kind", ["llama", "granite", "cohere", "gpt2"])
def test_the_head_of_a_language_model_gives_its_logits(kind: str):
    model, batch = models.causal_lm(kind), rows()[0]
    found = linear_head(model, CausalLM(), batch, models.VOCAB)
    torch.testing.assert_close(_logits(found), plain_logits(model, batch))
    few = linear_head(model, CausalLM(), batch, 30)  # the rest pads the vocabulary
    torch.testing.assert_close(_logits(few), plain_logits(model, batch)[:, :30])


def test_a_softcap_moves_no_class_before_another():
    model, batch = models.causal_lm("gemma2"), rows()[0]
    found, logits = _logits(linear_head(model, CausalLM(), batch, models.VOCAB)), plain_logits(model, batch)
    torch.testing.assert_close(2.0 * torch.tanh(found / 2.0), logits)
    assert (found.argsort(1) == logits.argsort(1)).float().mean() > 0.99


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "llama", "gpt2"])
def test_the_last_linear_layer_of_a_classifier_gives_its_logits(kind: str):
    changes = {"pad_token_id": 0} if kind == "gpt2" else {}
    model, batch = models.classifier(kind, **changes).train(), texts(length=6)[0]
    batch["labels"][1] = -100
    found = linear_head(model, SequenceClassification(), batch, len(models.LABELS))
    assert model.training
    model.eval()
    torch.testing.assert_close(_logits(found), plain_logits(model, batch))
    assert len(found.features) == 1


def test_a_head_that_is_not_linear_is_said_to_be():
    model = models.causal_lm()
    model.lm_head = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, models.VOCAB))
    with pytest.raises(NotMeasured, match="no linear layer but Sequential"):
        linear_head(model, CausalLM(), rows()[0], models.VOCAB)
    classifier = models.classifier()
    classifier.classifier = nn.Sequential(nn.Linear(16, 3), nn.Tanh())
    with pytest.raises(NotMeasured, match="no linear layer of BertForSequenceClassification"):
        linear_head(classifier, SequenceClassification(), texts()[0], 3)
