"""Every export is loaded again and compared before it takes its place; whatever goes wrong, what was there stays."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from distill.compress.integers import recorded
from distill.compress.ptq import ptq
from distill.export import driver
from distill.export.base import ExportError, Format, Run, Source, need
from distill.export.compare import compare
from distill.export.driver import export, parse
from distill.export.grid import grids_of
from distill.report.costs.served import inputs_of, logits_of
from distill.tasks import Task
from distill.types import ConfigError
from tests.disk import disk
from tests.export.sources import VOCAB, batches, bert, byte_bpe, llama, low_rank, source


def test_plain_exports_are_the_student_to_the_bit_and_load_with_stock_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama()
    done = export(source(model), parse(["hf", "hf:bf16", "packed"], None), tmp_path)
    assert [each.name for each in done] == ["hf-fp32", "hf-bf16", "packed-fp32"]
    assert [each.gap.exact for each in done] == [True, False, True]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf-fp32")
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf-bf16", dtype="auto").dtype == torch.bfloat16
    assert (tmp_path / "hf-fp32" / "tokenizer.json").exists()
    parameters = sum(p.numel() for p in model.parameters())
    for each, width in zip(done, (4, 2, None), strict=True):
        weights = next(each.folder.glob("*.safetensors*")).stat().st_size  # type: ignore[union-attr]
        assert weights < (each.bytes or 0) < weights + 2500, "with the configuration, without the tokenizer"
        assert each.ratio == pytest.approx((each.bytes or 0) / (4 * parameters))
        assert width is None or width * parameters < weights < width * parameters * 1.1
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("hf-bf16", "packed-fp32", f"{done[2].bytes:,}", "order-0 entropy of the planes: 0.8"))


class Wrong(Format):
    """Plain weights, but what loads them multiplies the logits."""

    name = "wrong"
    precisions: ClassVar[Mapping[str, float]] = {"any": 1e-6, "exact": 0.0}
    factor = 1.5

    def write(self, source: Source, folder: Path) -> None:
        (folder / "new").write_text("new")

    def load(self, folder: Path, task: Task) -> Run:
        model = llama()
        return lambda batch: self.factor * logits_of(model, batch)


@pytest.mark.parametrize(("precision", "factor"), [("any", 1.5), ("any", math.nan), ("exact", 1 + 1e-6)])
def test_an_export_that_is_not_the_student_is_refused_and_the_one_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, factor: float
) -> None:
    (tmp_path / f"wrong-{precision}").mkdir()
    (tmp_path / f"wrong-{precision}" / "old").write_text("old")
    monkeypatch.setattr(Wrong, "factor", factor)
    with pytest.raises(ExportError, match=r"is not the student: mean KL .* was in .* before is untouched"):
        export(source(llama()), [Wrong(precision)], tmp_path)
    assert [file.name for file in tmp_path.rglob("*")] == [f"wrong-{precision}", "old"]


def test_a_tolerance_lets_it_pass_and_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "wrong-any").mkdir()
    (tmp_path / "wrong-any" / "old").write_text("old")
    export(source(llama()), [Wrong()], tmp_path, tolerance=10.0)
    names = {file.name for file in (tmp_path / "wrong-any").iterdir()}
    assert "new" in names
    assert "old" not in names


def test_a_refusal_says_what_was_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportError, match="wrong-any"):
        export(source(llama()), [*parse(["hf"], None), Wrong()], tmp_path)
    assert "hf-fp32" in capsys.readouterr().out
    assert [folder.name for folder in tmp_path.iterdir()] == ["hf-fp32"]


@pytest.mark.parametrize("left", [60_000, 90_000])
@pytest.mark.parametrize("name", ["hf", "packed", "gguf:f16", "torchao:int8", "onnx:int8", "openvino"])
def test_a_full_disk_leaves_the_export_that_was_there(tmp_path: Path, name: str, left: int) -> None:
    """Whether little is left before, or libraries free what they have begun when they fail."""
    for package in ({"packed": "zstandard", "gguf:f16": "gguf", "onnx:int8": "onnxruntime"}.get(name, name.partition(":")[0]),):
        pytest.importorskip({"hf": "transformers"}.get(package, package), reason="the format needs it")
    wanted, ready = parse([name], None), source(llama())
    with disk(tmp_path / "small", "2M") as folder:
        done = export(ready, wanted, folder)
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        (folder / "more").write_bytes(bytes(2048 * 1024 - sum(map(len, before.values())) - left))
        with pytest.raises(ExportError, match=r"cannot write to .*(No space left|not written whole).*; make room .*is untouched"):
            export(ready, wanted, folder)
        assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "more"} == before
        assert not list(folder.glob(".*")), "what was begun is gone"
        assert done[0].folder is not None
        assert compare(partial(logits_of, ready.model), wanted[0].load(done[0].folder, ready.task), batches()).kl < 0.05


def test_nothing_is_written_where_a_format_cannot_store_the_student(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gguf is for language models of type llama, and this is a BertForSequenceClassification"):
        export(source(bert()), parse(["hf", "gguf"], None), tmp_path)
    assert not list(tmp_path.iterdir())


def test_after_ptq_the_table_compares_with_the_student_and_the_check_with_what_was_quantised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = bert()
    quantised = ptq(model, "int2")
    done = export(source(quantised), parse(["hf"], None), tmp_path, student=model)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf-fp32").eval()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), quantised.parameters(), strict=True))
    assert [each.name for each in done] == ["quantised, not exported", "hf-fp32"]
    assert done[0].gap == done[1].gap
    assert not done[1].gap.exact
    assert "quantised, not exported" in capsys.readouterr().out


def test_the_gap_is_what_is_computed_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    batch = {"input_ids": torch.zeros(2, 1, dtype=torch.long)}
    first, second = (lambda given, values=values: values[: len(given["input_ids"])].log() for values in (p, q))
    found = compare(first, second, [batch])
    row = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found.kl == pytest.approx(2 * row / 3, rel=1e-6)  # the first row comes again, as the half
    assert found.largest == pytest.approx(math.log(2), rel=1e-6)
    assert found.agreement == pytest.approx(1 / 3)


@pytest.mark.parametrize(("classes", "scale"), [(2, 1.5), (3, 1.0), (1000, 1.0)])
def test_a_model_that_knows_nothing_is_refused_at_any_tolerance_and_a_good_one_is_not(classes: int, scale: float) -> None:
    rows = {"input_ids": torch.randint(0, 9, (64, 8))}
    logits = scale * torch.randn(64, classes, generator=torch.Generator().manual_seed(0))
    mean = logits.softmax(-1).mean(0).log()

    def always(constant: torch.Tensor) -> Run:
        return lambda batch: constant.expand(len(batch["input_ids"]), -1)

    def student(batch: Any, noise: float = 0.0) -> torch.Tensor:
        return (logits + noise * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)))[: len(batch["input_ids"])]

    for constant in (torch.zeros(classes), mean):
        gap = compare(student, always(constant), [rows])
        assert gap.kl < 0.6, "of the order of tolerances, which alone would let it pass"
        assert not any(gap.within(tolerance) for tolerance in (0.3, 0.5, 10.0))
    assert compare(student, partial(student, noise=0.2 * scale), [rows]).within(0.1)


def test_the_constant_is_the_best_there_is() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 3.0]])
    batch = {"input_ids": torch.zeros(3, 1, dtype=torch.long)}
    constant = torch.zeros(3, requires_grad=True)
    rows = torch.cat([logits, logits[:1]]).softmax(-1)  # the first comes again, as the half
    optimizer = torch.optim.LBFGS([constant], max_iter=100, tolerance_change=1e-12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (rows * (rows.log() - constant.log_softmax(-1))).sum(-1).mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    gap = compare(lambda given: logits[: len(given["input_ids"])], lambda given: torch.zeros(len(given["input_ids"]), 3), [batch])
    assert gap.constant == pytest.approx(closure().item(), rel=1e-5)
    assert gap.limit(10.0) == gap.constant / 2
    assert gap.limit(0.01) == 0.01


def test_where_the_student_is_a_constant_on_these_rows_rounding_is_no_reason_to_refuse() -> None:
    batch = {"input_ids": torch.zeros(2, 1, dtype=torch.long)}
    first, second = (lambda given, row=row: row.expand(len(given["input_ids"]), -1) for row in torch.tensor([[1.0, 0.0], [1.001, 0.0]]))
    gap = compare(first, second, [batch])
    assert gap.constant == pytest.approx(0, abs=1e-12)
    assert gap.kl > 1e-8
    assert gap.within(0.01)


def test_a_refusal_says_that_a_constant_is_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wrong, "factor", 0.0)
    with pytest.raises(ExportError, match=r"for one constant for all rows is .* nats away. Take .* more calibration rows \(--rows\)$"):
        export(source(llama()), [Wrong()], tmp_path, tolerance=100.0)


@pytest.mark.parametrize(("scheme", "stays"), [("int8", False), ("int4", False), ("ternary", True), (None, False)])
def test_a_cast_keeps_the_record_of_the_grid_only_where_it_is_true(tmp_path: Path, scheme: str | None, stays: bool) -> None:
    pytest.importorskip("torchao", reason="integers are torchao's")
    given = source(ptq(llama(), scheme) if scheme else llama())
    export(given, parse(["hf:bf16", "hf"], None), tmp_path)
    again = {name: grids_of(AutoModelForCausalLM.from_pretrained(tmp_path / f"hf-{name}", dtype="auto")) for name in ("bf16", "fp32")}
    assert again["fp32"].keys() == given.grids.keys(), "the student itself keeps its own"
    assert again["bf16"].keys() == (given.grids.keys() if stays else set())
    assert all(torch.equal(grid.levels, given.grids[name].levels) for name, grid in again["bf16"].items())


def test_a_student_saved_in_half_precision_keeps_its_record(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="integers are torchao's")
    saved = ptq(llama().to(torch.bfloat16), "int4")  # type: ignore[arg-type]
    grids = grids_of(saved)
    export(source(saved.float(), grids), parse(["hf:bf16"], None), tmp_path)
    assert len(grids_of(AutoModelForCausalLM.from_pretrained(tmp_path / "hf-bf16", dtype="auto"))) == 14


def test_in_float32_the_record_of_one_of_half_precision_would_not_be_true(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="integers are torchao's")
    ptq(llama().to(torch.bfloat16), "int4").save_pretrained(tmp_path / "student")  # type: ignore[arg-type]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype="auto").eval()
    grids = grids_of(saved)
    export(source(saved.float(), grids), parse(["hf"], None), tmp_path)
    assert not grids_of(AutoModelForCausalLM.from_pretrained(tmp_path / "hf-fp32"))
    assert len(recorded(saved)) == 14, "the student's own stays"


def test_layers_of_two_factors_are_kept(tmp_path: Path) -> None:
    (done,) = export(source(low_rank()), parse(["hf"], None), tmp_path)
    assert done.gap.exact


def test_padding_does_not_count_and_another_length_does() -> None:
    model = llama()
    run = partial(logits_of, model)

    def padding_differs(batch: Any) -> torch.Tensor:
        return torch.where(inputs_of(batch)["attention_mask"].bool()[..., None], run(batch), 7.0)

    def lengths_are_fixed(batch: Any) -> torch.Tensor:
        return run(batch) if batch["input_ids"].shape == (3, 7) else 0 * run(batch)

    assert compare(run, padding_differs, batches()).exact
    first = [next(iter(batches()))]
    assert not compare(run, lengths_are_fixed, first).exact


def test_a_class_that_is_impossible_on_both_sides_counts_nothing() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf]])
    batch = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
    assert compare(lambda _: logits, lambda _: logits, [batch]).kl == 0


@pytest.mark.parametrize(
    ("wanted", "precision", "said"),
    [
        (["onyx"], None, "there is no 'onyx'; there are"),
        (["hf:fp8"], None, "hf has no 'fp8'; it has fp32, bf16"),
        (["hf", "hf:fp32"], None, "each once"),
        ([], None, "at least one"),
        (["hf"], "int3", "hf has no 'int3'"),
    ],
)
def test_a_wrong_name_is_one_line(wanted: list[str], precision: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(wanted, precision)


def test_all_formats_are_found() -> None:
    assert {"hf", "packed", "torchao", "onnx", "openvino", "gguf"} <= set(driver.all_formats())
    assert [f"{each.name}-{each.precision}" for each in parse(["hf", "hf:fp32"], "bf16")] == ["hf-bf16", "hf-fp32"]


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ConfigError, match=r"onnx needs the package notthere, .* pip install 'distill\[export\]'"):
        need("notthere.more", "onnx")


def test_the_vocabulary_of_these_tests_has_room(tmp_path: Path) -> None:
    assert len(byte_bpe()) <= VOCAB
