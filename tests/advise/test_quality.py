"""What rounding costs, on a text: against losses computed apart."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from distill.advise import quality
from distill.compress.ptq import ptq
from distill.tasks import CausalLM, SequenceClassification
from distill.types import ConfigError, DataError
from tests import models


@pytest.fixture
def text(tmp_path: Path) -> str:
    words = torch.randint(3, 40, (40, 9), generator=torch.Generator().manual_seed(1)).tolist()
    (tmp_path / "t.txt").write_text("\n".join(" ".join(f"w{i}" for i in line) for line in words))
    return str(tmp_path / "t.txt")


def test_a_language_models_loss_rounded_minus_float(tmp_path: Path, text: str) -> None:
    model = models.causal_lm(hidden_size=32, intermediate_size=32, head_dim=16)
    folder = models.save(model, tmp_path / "m")
    found = quality.rounded(CausalLM(), folder, text, 8)
    ids = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(), return_tensors="pt").input_ids[0][: 32 * 8].view(32, 8)

    def loss(each: torch.nn.Module) -> float:
        with torch.no_grad():
            logits = each(input_ids=ids).logits.double()
        return float(F.cross_entropy(logits[:, :-1].reshape(-1, 40), ids[:, 1:].reshape(-1)))

    assert set(found) == {"bf16", "int8", "int4"}
    for scheme in ("int8", "int4"):
        assert found[scheme].value == pytest.approx(loss(ptq(model, scheme)) - loss(model), abs=1e-5)
        assert found[scheme].unit == "nats"
        assert found[scheme].measured
    assert abs(found["int8"].value) < abs(found["int4"].value)
    assert "32 rows" in found["int4"].basis


def test_a_classifier_loses_at_most_the_rows_whose_class_changes(tmp_path: Path, text: str) -> None:
    model = models.classifier(hidden_size=32, intermediate_size=32)
    folder = models.save(model, tmp_path / "m")
    found = quality.rounded(SequenceClassification(), folder, text, 8)["int4"]
    lines, tokenizer, other = Path(text).read_text().splitlines()[:32], AutoTokenizer.from_pretrained(folder), ptq(model, "int4")
    with torch.no_grad():
        inputs = tokenizer(lines, truncation=True, max_length=8, padding=True, return_tensors="pt")
        rows = [each(**inputs).logits.argmax(-1) for each in (model, other)]
    changed = int((rows[0] != rows[1]).sum())
    # 33 rows are compared: half of the first one stands there alone as well
    assert found.value == pytest.approx(100 * changed / 33, abs=100 / 33 + 1e-9)
    assert found.unit == "points"


def test_groups_that_do_not_fit_leave_int4_out(tmp_path: Path, text: str) -> None:
    found = quality.rounded(CausalLM(), models.save(models.causal_lm(), tmp_path / "m"), text, 8)
    assert set(found) == {"bf16", "int8"}


def test_what_cannot_be_read(tmp_path: Path, text: str) -> None:
    folder = models.save(models.causal_lm(), tmp_path / "m")
    with pytest.raises(ConfigError, match=r"--data: there is no file 'nowhere\.txt'; give a plain text"):
        quality.rounded(CausalLM(), folder, "nowhere.txt", 8)
    with pytest.raises(DataError, match="too few for two rows of 300; give a longer text, or a smaller --length"):
        quality.rounded(CausalLM(), folder, text, 300)
    (tmp_path / "one.txt").write_text("w3 w4\n")
    with pytest.raises(DataError, match="has 1 lines of text"):
        quality.rounded(SequenceClassification(), folder, str(tmp_path / "one.txt"), 8)
