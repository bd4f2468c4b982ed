"""The same text in two tokenizers' tokens: against what the tokenizers' library decodes, by hand, and in a training."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from distill.balance.fixed import FixedWeights
from distill.data import packing
from distill.data.packing import Document
from distill.data.text import TextData
from distill.losses.base import Term
from distill.losses.cross_tokenizer import ULD, AcrossTokenizers, SpanLikelihood
from distill.losses.divergence import ForwardKL
from distill.losses.hard import CrossEntropy
from distill.module import DistillModule
from distill.optim import AdamW
from distill.spans import Alignment
from distill.students.load import FromConfig
from distill.tasks import CausalLM, SequenceClassification
from distill.teachers.ensemble import Ensemble
from distill.teachers.online import OnlineTeacher
from distill.teachers.other_tokenizer import OtherTokenizer
from distill.teachers.retold import Reteller, Retold, readable
from distill.teachers.spelling import spelling
from distill.types import Batch, ConfigError
from tests import models
from tests.losses.dense import setting
from tests.pair import STUDENT, Gradients, trainer
from tests.teachers import vocabularies
from tests.teachers.vocabularies import MARK, byte_bpe, document, gpt2, has, sentence_piece, stories

PAIRS = {
    "bytes, SentencePiece": (byte_bpe, sentence_piece),
    "SentencePiece, bytes": (sentence_piece, byte_bpe),
    "bytes, larger bytes": (byte_bpe, lambda: byte_bpe(340)),
    "SentencePiece, without bos": (sentence_piece, lambda: sentence_piece(90, bos=False)),
    "GPT-2, Llama 512": (gpt2, stories),
    "Llama 512, GPT-2": (stories, gpt2),
}
REAL = pytest.mark.skipif(not has("gpt2_tokenizer", "stories260K"), reason="the published tokenizers are not here")
pairs = pytest.mark.parametrize("pair", [pytest.param(name, marks=REAL if "GPT" in name else ()) for name in PAIRS])
CHARS = st.sampled_from([*"abcthe  \n\t,.12", "é", "ï", "e\u0301", "世", "界", "猫", "🙂", "👩‍🚀", "the cat", " sat", "   "])
TEXTS = st.lists(CHARS, min_size=1, max_size=25).map("".join)


def reteller(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, longest: int | None = None) -> Reteller:
    return Reteller(spelling(student, "data.tokenizer"), teacher, longest)


def padded(documents: list[Document], pad: int = 0) -> dict[str, Tensor]:
    return packing.pad([{"input_ids": d.ids, "labels": d.labels} for d in documents], pad)


def spans(
    told: Retold, batch: Batch, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> list[tuple[list[str], list[str]]]:
    """The tokens of each span, as the vocabularies write them."""
    a, labels = told.alignment, batch["labels"].flatten()
    assert (labels[a.student_at] != -100).all()
    found = []
    for k in range(int(a.student_span[-1]) + 1 if len(a.student_span) else 0):
        ours, theirs = labels[a.student_at[a.student_span == k]], a.teacher_labels[a.teacher_span == k]
        found.append((student.convert_ids_to_tokens(ours.tolist()), teacher.convert_ids_to_tokens(theirs.tolist())))
    return found


@functools.cache
def made(pair: str) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase, Reteller]:
    student, teacher = (make() for make in PAIRS[pair])
    return student, teacher, reteller(student, teacher)


# ---- any text


def beginnings(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What the first k tokens decode to, for k from 1; behind another token, for a decoder may drop the space that a text begins with."""
    anchor = tokenizer.convert_tokens_to_ids("a")
    return [tokenizer.decode([anchor, *ids[: k + 1]], clean_up_tokenization_spaces=False)[1:] for k in range(len(ids))]


@pairs
@settings(max_examples=30, deadline=None)
@given(text=TEXTS)
def test_spans_end_exactly_where_both_tokenizers_cut(pair: str, text: str) -> None:
    student, teacher, tell = made(pair)
    batch = padded([document(student, text)])
    told = tell(batch)
    a, ids, inputs = told.alignment, batch["input_ids"][0].tolist(), told.inputs["input_ids"][0].tolist()
    assert told.changed == 0
    assert [ids[t + 1] for t in a.student_at.tolist()] == batch["labels"][0][a.student_at].tolist()
    assert [inputs[t + 1] for t in a.teacher_at.tolist()] == a.teacher_labels.tolist()

    firsts = [len(tokenizer("")["input_ids"]) for tokenizer in (student, teacher)]
    if len(ids) - firsts[0] == 2 and not firsts[0]:  # one token and eos
        assert len(a.student_at) == 0
        return
    ours, theirs = beginnings(student, ids[firsts[0] : -1]), beginnings(teacher, inputs[firsts[1] :])
    if theirs[-1] != ours[-1]:  # a space before the text, which the student does not have
        assert theirs[-1] == " " + ours[-1]
        theirs = [start[1:] for start in theirs]
    ends = [[-1 if "\ufffd" in start else len(start) for start in starts] for starts in (ours, theirs)]  # −1 inside a character
    common = sorted((set(ends[0]) & set(ends[1])) - {-1, 0})
    expected = [common] if all(firsts) else [common[1:]]  # without bos nothing predicts what is in the first span
    if not all(firsts) and all(-1 in side[: side.index(common[0])] for side in ends):
        expected.append(common)  # which may end inside a character

    for at, span, first, starts in ((a.student_at, a.student_span, firsts[0], ours), (a.teacher_at, a.teacher_span, firsts[1], theirs)):
        last = [starts[int(t) + 1 - first] for t, k, after in zip(at, span, [*span[1:], -1][: len(at)], strict=True) if k != after]
        assert [len(start) for start in last if "\ufffd" not in start] in expected


@pairs
@settings(max_examples=20, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_both_sides_of_a_span_decode_to_the_same(pair: str, texts: list[str]) -> None:
    student, teacher, tell = made(pair)
    batch = padded([document(student, text) for text in texts])
    a = (told := tell(batch)).alignment
    labels = batch["labels"].flatten()
    for row in range(len(texts)):  # what is compared of a row, as one text; whole characters only where nothing is left out
        ours, theirs = (
            at // inputs.shape[1] == row for at, inputs in ((a.student_at, batch["labels"]), (a.teacher_at, told.inputs["input_ids"]))
        )
        decoded = student.decode(labels[a.student_at[ours]].tolist()), teacher.decode(a.teacher_labels[theirs].tolist())
        if "\ufffd" not in "".join(decoded):
            assert decoded[0].strip(" ") == decoded[1].strip(" ")


# ---- by hand


def test_spans_by_hand() -> None:
    batch = padded([document(byte_bpe(258), "the café")])
    told = reteller(byte_bpe(258), sentence_piece())(batch)
    # a token a byte against ▁the and ▁café; the student has no bos, so nothing predicts its first
    assert spans(told, batch, byte_bpe(258), sentence_piece()) == [(["Ġ", "c", "a", "f", "Ã", "©"], ["▁café"])]
    batch = padded([document(sentence_piece(), "a é,the cat")])
    told = reteller(sentence_piece(), byte_bpe(340))(batch)
    found = spans(told, batch, sentence_piece(), byte_bpe(340))
    # the teacher has no bos, so nothing predicts its first, a space
    assert found == [(["a"], ["a"]), (["▁"], ["Ġ"]), (["é"], ["Ã©"]), ([","], [","]), (["the"], ["the"]), (["▁cat"], ["Ġcat"])]


def test_bytes_meet_within_a_character() -> None:
    student, teacher = byte_bpe(258), sentence_piece()
    batch = padded([document(student, "x🦑")])  # four bytes in either
    told = reteller(student, teacher)(batch)
    found = spans(told, batch, student, teacher)
    assert [theirs for _, theirs in found] == [["<0xF0>"], ["<0x9F>"], ["<0xA6>"], ["<0x91>"]]
    assert [len(ours) for ours, _ in found] == [1, 1, 1, 1]


def test_without_bos_the_first_span_takes_no_part() -> None:
    with_bos, without = sentence_piece(), sentence_piece(bos=False)
    whole = reteller(with_bos, with_bos)(padded([document(with_bos, "the cat")]))
    part = reteller(with_bos, without)(padded([document(with_bos, "the cat")]))
    other = reteller(without, with_bos)(padded([document(without, "the cat")]))
    n = len(whole.alignment.student_at)
    assert [len(part.alignment.student_at), len(other.alignment.student_at)] == [n - 1, n - 1]
    assert whole.special == 1, "the eos"
    assert whole.labels == n + 1


@pytest.mark.parametrize("text", ["the cat", " the cat", "  the cat", " ", "\n the", "   \n"])
@pytest.mark.parametrize("pair", ["bytes, SentencePiece", "SentencePiece, bytes", "SentencePiece, without bos"])
def test_spaces_at_the_start_are_not_lost(pair: str, text: str) -> None:
    student, teacher = (make() for make in PAIRS[pair])
    told = reteller(student, teacher)(padded([document(student, text)]))
    assert told.changed == 0


def test_a_character_cut_by_the_end_of_a_row_is_left_out() -> None:
    student, teacher = byte_bpe(258), sentence_piece()
    ids = document(student, "ab 🦑 the cat").ids  # a token a byte: 🦑 is tokens 3 to 6
    rows = list(packing.pack([Document(ids, np.ones(len(ids), bool))], 5, 0))
    batch = packing.stack(rows)
    told = reteller(student, teacher)(batch)
    first = told.alignment.student_at[told.alignment.student_at < 5].tolist()
    # position 2 predicts the first byte of the squid, and the label of the row's last its third
    assert first == [0, 1]
    assert told.changed >= 3
    second = [ours for ours, _ in spans(told, batch, student, teacher)]
    assert "".join(t for ours in second for t in ours).replace("Ġ", " ").endswith("the cat")


def test_readable() -> None:
    squid = "🦑".encode()
    for k in range(1, 4):
        assert readable(squid[k:] + b"ab" + squid[:k]) == (4 - k, b"ab")
    assert readable(squid) == (0, squid)
    assert readable(b"a\xffb") == (0, b"a")
    assert readable(b"") == (0, b"")
    assert readable(b"\x80\x80") == (2, b"")


def test_the_label_behind_a_cut_is_part_of_the_text() -> None:
    student, teacher = byte_bpe(258), byte_bpe(258)
    ids = document(student, "abcdefgh").ids
    batch = packing.stack(list(packing.pack([Document(ids, np.ones(len(ids), bool))], 4, 0)))
    told = reteller(student, teacher)(batch)
    # b c d and, behind the cut, e; then f g h; nothing predicts a, and e in its own row is predicted above
    assert told.alignment.student_at.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert teacher.convert_ids_to_tokens(told.alignment.teacher_labels.tolist()) == list("bcdefgh")


def test_prompts_take_no_part_nor_spans_with_a_token_of_them() -> None:
    student, teacher = byte_bpe(258), byte_bpe(340)
    batch = padded([document(student, "e cat sat", prompt="the mat, th")])
    told = reteller(student, teacher)(batch)
    # " the" is one token of the teacher, of which the student learns the "e" alone
    assert [theirs for _, theirs in spans(told, batch, student, teacher)] == [["Ġcat"], ["Ġsat"]]
    assert (told.labels, told.special, len(told.alignment.student_at)) == (10, 1, 8)


def test_marks_of_a_chat_stay_marks_and_take_no_part() -> None:
    student, teacher = vocabularies.chat(), vocabularies.chat(340)
    batch = padded([document(student, f"the cat{MARK}the mat")])
    told = reteller(student, teacher)(batch)
    mark = teacher.convert_tokens_to_ids(MARK)
    assert told.inputs["input_ids"][0].tolist().count(mark) == 1
    assert mark not in told.alignment.teacher_labels.tolist()
    assert told.special == 2, "the mark and the eos"
    after = [theirs for _, theirs in spans(told, batch, student, teacher)]
    assert "".join(t for theirs in after for t in theirs).replace("Ġ", " ").endswith("the mat")
    plain = reteller(student, byte_bpe())(batch)  # a teacher that does not know it reads it as text
    assert byte_bpe().decode(plain.inputs["input_ids"][0]) == f"the cat{MARK}the mat"
    labels = batch["labels"].flatten()[plain.alignment.student_at]
    assert student.convert_tokens_to_ids(MARK) not in labels.tolist()


def test_a_mark_of_the_teacher_alone_takes_no_part() -> None:
    student, teacher = byte_bpe(), vocabularies.chat()
    told = reteller(student, teacher)(padded([document(student, f"the cat{MARK}the mat")]))
    mark = teacher.convert_tokens_to_ids(MARK)
    assert mark in told.inputs["input_ids"]
    assert mark not in told.alignment.teacher_labels


def test_a_token_with_the_end_of_a_cut_character_takes_no_part() -> None:
    student = replace(spelling(byte_bpe(258), "data.tokenizer"), tokens=[b"\xa6", b"\x91a", b"b"], lengths=np.array([1, 2, 1]))
    student = replace(student, special=np.zeros(3, bool))
    batch = {"input_ids": torch.tensor([[0, 1, 2, 2]]), "labels": torch.tensor([[1, 2, 2, -100]])}
    told = Reteller(student, sentence_piece(90))(batch)  # which reads "abb", with a bos before it
    assert told.alignment.student_at.tolist() == [1, 2]
    assert sentence_piece(90).convert_ids_to_tokens(told.alignment.teacher_labels.tolist()) == ["<0x62>", "<0x62>"]


def test_text_that_the_teachers_tokenizer_changes_is_left_out_from_there() -> None:
    student, teacher = byte_bpe(), vocabularies.train_tokenizer(vocabularies.CORPUS, 300)
    teacher.backend_tokenizer.normalizer = normalizers.NFC()
    batch = padded([document(student, "the cat caf" + "e\u0301" + " the mat"), document(student, "the cat")])
    told = reteller(student, teacher)(batch)
    found = spans(told, batch, student, teacher)
    assert "mat" not in "".join(t for ours, _ in found for t in ours)
    assert told.changed > 3
    assert (told.alignment.student_at >= batch["labels"].shape[1]).any(), "the next document is compared"
    assert f"{told.changed:,} before text that the teacher's tokenizer does not keep" in told.summary()


def test_a_teacher_with_few_positions_reads_the_beginning() -> None:
    student, teacher = byte_bpe(), sentence_piece()
    batch = padded([document(student, "the cat sat on the mat, and then the cat ran")])
    told, whole = reteller(student, teacher, 6)(batch), reteller(student, teacher)(batch)
    assert told.inputs["input_ids"].shape[1] == 6
    n = len(told.alignment.student_at)
    assert 0 < n < len(whole.alignment.student_at)
    assert torch.equal(told.alignment.student_at, whole.alignment.student_at[:n])


def test_rows_without_anything_to_compare() -> None:
    student, teacher = byte_bpe(), sentence_piece()
    batch = padded([document(student, "the cat"), document(student, "the mat")])
    batch["labels"][1] = -100
    told = reteller(student, teacher)(batch)
    assert told.inputs["attention_mask"].sum(1)[1] == 1
    batch["labels"][:] = -100
    empty = reteller(student, teacher)(batch)
    assert empty.inputs["input_ids"].shape == (2, 1)
    assert [len(index) for index in empty.alignment] == [0] * 5
    assert "0 of 0 valid positions" in empty.summary()


@pytest.mark.parametrize("make", [byte_bpe, sentence_piece, pytest.param(gpt2, marks=REAL), pytest.param(stories, marks=REAL)])
def test_with_one_tokenizer_every_span_is_a_token(make: Any) -> None:
    tokenizer = make()
    batch = padded([document(tokenizer, text) for text in vocabularies.CORPUS[:4]])
    told = reteller(tokenizer, tokenizer)(batch)
    a = told.alignment
    assert torch.equal(a.student_span, a.teacher_span)
    assert a.student_span.tolist() == list(range(len(a.student_span)))
    assert torch.equal(batch["labels"].flatten()[a.student_at], a.teacher_labels)
    assert told.labels == len(a.student_at) + told.special


def test_tokenizers_of_which_the_bytes_are_not_known() -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer: which bytes its tokens stand for is known for byte-level BPE"):
        spelling(models.tokenizer(), "data.tokenizer")
    lower = vocabularies.train_tokenizer(vocabularies.CORPUS, 300)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ConfigError, match=r"spell 'one, two: 3 . 4!', so texts cannot be told from tokens"):
        spelling(lower, "model.teacher.tokenizer")


# ---- the teacher


def folder(path: Path, tokenizer: PreTrainedTokenizerBase, width: int = 24, pad_rows: int = 5) -> str:
    """A random Llama with more rows than its tokenizer has tokens."""
    torch.manual_seed(7)
    sizes = {k: v for k, v in STUDENT.items() if k != "model_type"} | {"hidden_size": width, "max_position_embeddings": 128}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=max(tokenizer.get_vocab().values()) + 1 + pad_rows)).save_pretrained(path)
    return vocabularies.save(tokenizer, path)


def ready(path: Path, student: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> OtherTokenizer:
    teacher = OtherTokenizer(OnlineTeacher(folder(path, tokenizer)))
    teacher.setup(CausalLM(), torch.device("cpu"), torch.float32)
    teacher.check(student, {"vocab_size": 1, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0})
    return teacher


def loss_of(cls: type[AcrossTokenizers], teacher: OtherTokenizer, batch: Batch, size: int) -> Tensor:
    loss = cls()
    loss.prepare(setting(size))
    student = models.causal_lm(vocab_size=size, max_position_embeddings=128).double()
    return loss(CausalLM().outputs(student, batch), teacher(batch), batch)


@pytest.mark.parametrize("cls", [ULD, SpanLikelihood])
def test_packed_rows_separate_rows_and_parts_of_a_batch_sum_up_to_the_same(tmp_path: Path, cls: type[AcrossTokenizers]) -> None:
    student = byte_bpe()
    teacher = ready(tmp_path, student, sentence_piece())
    texts = [*vocabularies.CORPUS[:4], "the cat"]
    documents = [document(student, text) for text in texts]
    packed = packing.stack(list(packing.pack(documents, sum(len(d.ids) for d in documents) + 3, 0)))
    separate = padded(documents)
    apart = sum(loss_of(cls, teacher, padded([d]), 300).item() for d in documents)
    halves = sum(loss_of(cls, teacher, padded(part), 300).item() for part in (documents[:2], documents[2:]))
    value = loss_of(cls, teacher, separate, 300).item()
    assert value > 1
    assert apart == pytest.approx(value, rel=1e-5)
    assert halves == pytest.approx(value, rel=1e-5)
    assert loss_of(cls, teacher, packed, 300).item() == pytest.approx(value, rel=1e-5)
    left = {name: tensor.flip(1) for name, tensor in separate.items()}
    for name in ("input_ids", "labels"):  # padding on the left
        for row, n in enumerate(separate["attention_mask"].sum(1).tolist()):
            left[name][row, -n:] = separate[name][row, :n]
    told = [teacher.reteller(batch).alignment for batch in (left, separate)]
    assert torch.equal(told[0].teacher_labels, told[1].teacher_labels)


def test_the_target_is_the_teachers_own_without_its_padding(tmp_path: Path) -> None:
    student, own = byte_bpe(), sentence_piece()
    teacher = ready(tmp_path, student, own)
    batch = padded([document(student, "the cat sat"), document(student, "naïve")])
    target = teacher(batch)
    a = Alignment.of(target.taps)
    logp = target.head(target.features.flatten(0, 1)[a.teacher_at]).log_softmax(-1)
    assert logp.shape[-1] == max(own.get_vocab().values()) + 1
    model = teacher.models()[0]
    ids = torch.tensor([own("the cat sat")["input_ids"]])
    size = logp.shape[-1]
    expected = model(ids).logits[0, :, :size].log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    mine = logp.gather(-1, a.teacher_labels[:, None])[:, 0][a.teacher_at < target.features.shape[1]]
    assert torch.allclose(mine, expected[-len(mine) :], atol=1e-5)
    assert len(mine) >= len(expected) - 2
    assert teacher.support == "text"
    assert not target.features.requires_grad


def test_what_is_prepared_ahead_is_what_is_taken(tmp_path: Path) -> None:
    student = byte_bpe()
    teacher = ready(tmp_path, student, sentence_piece())
    batches = [padded([document(student, text)]) for text in vocabularies.CORPUS[:4]]
    plain = [teacher(batch) for batch in batches]
    for batch in batches[:3]:
        teacher.ahead(batch)
    again = [teacher(batch) for batch in reversed(batches)][::-1]
    assert not teacher.coming
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a.features, b.features)
        assert all(torch.equal(a.taps[name], b.taps[name]) for name in Alignment._fields)


def test_it_says_once_what_is_compared_and_warns_where_much_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, str]] = []
    for how in ("info", "warn"):
        monkeypatch.setattr(f"distill.teachers.other_tokenizer.rank_zero_{how}", lambda text, how=how: said.append((how, text)))
    teacher = ready(tmp_path, byte_bpe(), sentence_piece())
    for _ in range(2):
        teacher(padded([document(byte_bpe(), vocabularies.CORPUS[0] * 2)]))
    assert [how for how, _ in said] == ["info"]
    assert "valid positions are compared" in said[0][1]
    teacher.reteller.longest, teacher.said = 6, False
    teacher(padded([document(byte_bpe(), vocabularies.CORPUS[0] * 2)]))
    assert [how for how, _ in said] == ["info", "warn"]


def test_a_source_that_cannot_be_run_or_has_another_tokenizer(tmp_path: Path) -> None:
    teacher = OtherTokenizer(
        OnlineTeacher(folder(tmp_path / "a", sentence_piece())), tokenizer=vocabularies.save(byte_bpe(), tmp_path / "b")
    )
    with pytest.raises(ConfigError, match="OtherTokenizer is for language models"):
        teacher.setup(SequenceClassification(), torch.device("cpu"), torch.float32)
    teacher.setup(CausalLM(), torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match="different tokenizers"):
        teacher.check(byte_bpe(), {"vocab_size": 300})
    nested = OtherTokenizer(OtherTokenizer(OnlineTeacher(str(tmp_path / "a"))))
    with pytest.raises(ConfigError, match="holds a target on the student's tokens"):
        nested.setup(CausalLM(), torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match=r"made of several teachers \(Ensemble\); take one that runs a model"):
        OtherTokenizer(Ensemble([OnlineTeacher(str(tmp_path / "a"))]))


# ---- training


def run(tmp_path: Path, losses: dict[str, Term], steps: int = 1, batch_size: int = 4, window: int = 1, lr: float = 5e-3) -> tuple[Any, Any]:
    """Train a student on a small byte-level BPE beside a teacher on SentencePiece."""
    if not (tmp_path / "teacher").exists():
        folder(tmp_path / "teacher", sentence_piece())
        vocabularies.save(byte_bpe(), tmp_path / "student")
        lines = [f"{text.strip()} {i}" for i, text in enumerate(vocabularies.CORPUS)]
        (tmp_path / "text.jsonl").write_text("".join(f'{{"text": {text!r}}}\n'.replace("'", '"') for text in map(_plain, lines)))
    data = TextData(
        train_data=str(tmp_path / "text.jsonl"), tokenizer=str(tmp_path / "student"), val_fraction=0, max_length=32, batch_size=batch_size
    )
    module = DistillModule(
        student=FromConfig(STUDENT),
        teacher=OtherTokenizer(OnlineTeacher(str(tmp_path / "teacher"))),
        losses=losses,
        balancer=FixedWeights(dict.fromkeys(losses, 1.0)),
        optimizer=AdamW(lr=lr, warmup=0, schedule="constant"),
    )
    gradients = Gradients()
    seen: list[dict[str, float]] = []
    keep = type("Keep", (Gradients,), {"on_train_batch_end": lambda self, trainer, *_: seen.append(dict(trainer.callback_metrics))})()
    trainer(max_steps=steps, accumulate_grad_batches=window, callbacks=[gradients, keep]).fit(module, data)
    return seen, gradients.steps


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").replace('"', "").replace("'", "")


def test_training_lowers_the_terms_and_more_micro_batches_give_the_same_gradient(tmp_path: Path) -> None:
    seen, whole = run(tmp_path, {"kd": SpanLikelihood(), "uld": ULD()}, steps=25)
    first, last = (sum(float(s["train/kd"]) for s in part) / 3 for part in (seen[:3], seen[-3:]))
    assert last < 0.8 * first, (first, last)
    _, parts = run(tmp_path, {"kd": SpanLikelihood(), "uld": ULD()}, batch_size=2, window=2)
    for name, gradient in whole[0].items():
        assert torch.allclose(gradient, parts[0][name], rtol=1e-3, atol=1e-5 * float(gradient.abs().max())), name


def test_terms_on_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.losses\.kd: ForwardKL needs .*but model\.teacher gives a target in the tokens of another"
    ):
        run(tmp_path, {"ce": CrossEntropy(), "kd": ForwardKL()})
