"""A teacher behind an endpoint gives what it gives in memory, on k bins, and whatever goes wrong is named."""

import functools
import json
import logging
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml

from distill.cli import main
from distill.data.base import DistillData
from distill.data.loader import Loader
from distill.data.text import PromptData
from distill.export.costs import candidates
from distill.losses.divergence import ForwardKL
from distill.losses.features import HiddenMSE
from distill.losses.hard import CrossEntropy
from distill.tasks import CausalLM, SequenceClassification
from distill.teachers import http
from distill.teachers.base import Teacher
from distill.teachers.completions import Completions
from distill.teachers.online import OnlineTeacher
from distill.teachers.remote import RemoteTeacher
from distill.teachers.served import ServedTeacher
from distill.teachers.wire import KEY
from distill.types import IGNORE_INDEX, ConfigError, TrainingError
from tests import pair
from tests.data.helpers import WORDS
from tests.parallel.runs import Record
from tests.teachers.serving import Answer, Script, Scripted, Serve, as_json, scripted, serving, url
from tests.test_command import config

CPU = torch.device("cpu")
V = len(WORDS)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting before a request is sent again."""
    monkeypatch.setattr(http, "pause", lambda *_: 0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair's teacher and prompts, made once."""
    made = tmp_path_factory.mktemp("served")
    pair.teacher_folder(made / "teacher")
    pair.prompts(made / "prompts.jsonl")
    return made


@pytest.fixture(scope="module")
def at(folder: Path) -> Iterator[str]:
    """The address of our server with that teacher."""
    with serving(folder) as start:
        yield url(start())


@functools.cache
def rows(folder: Path, pack: bool = False) -> DistillData:
    source, tokenizer = str(folder / "prompts.jsonl"), str(folder / "teacher")
    data = PromptData(train_data=source, tokenizer=tokenizer, pack=pack, max_length=32, batch_size=4)
    data.setup()
    return data


def ready(teacher: Any, folder: Path) -> Any:
    data = rows(folder)
    teacher.setup(CausalLM(), CPU, torch.float32)
    teacher.check(data.tokenizer, data.model_config())
    return teacher


@functools.cache
def online(folder: Path) -> OnlineTeacher:
    found: OnlineTeacher = ready(OnlineTeacher(str(folder / "teacher")), folder)
    return found


def batches(folder: Path, pack: bool = False) -> list[dict[str, torch.Tensor]]:
    data = rows(folder, pack)
    return list(Loader(data.train_set, data.collator(), 4))


class Truthful:
    """Answers as our server does, except where it is told otherwise; after vLLM's manner it has no /about."""

    def __init__(self, folder: Path, **instead: Script | Answer) -> None:
        self.completions, self.lock = Completions(online(folder), CausalLM(), rows(folder).tokenizer), threading.Lock()
        self.instead = instead

    def __call__(self, path: str, body: bytes) -> Answer:
        answer = self.instead.get(path.rpartition("/")[2], self.honest)
        return answer(path, body) if callable(answer) else answer

    def honest(self, path: str, body: bytes) -> Answer:
        with self.lock:
            if path == "/v1/models":
                return 200, {}, self.completions.models().encode()
            if path == "/v1/completions":
                return 200, {}, self.completions.complete(body).encode()
            if path == "/tokenize":
                return 200, {}, self.completions.tokenize(body).encode()
        return 404, {}, b'{"detail":"Not Found"}'


def train(folder: Path, teacher: Teacher, pack: bool = False, callbacks: tuple[pl.Callback, ...] = ()) -> tuple[list[float], Any]:
    pl.seed_everything(0, verbose=False)
    record, gradients = Record(), pair.Gradients()
    module = pair.module(folder, losses={"ce": CrossEntropy(), "kd": ForwardKL(1.0)}, teacher=teacher)
    trainer = pair.trainer(max_steps=4, callbacks=[record, gradients, *callbacks], log_every_n_steps=1, accumulate_grad_batches=2)
    trainer.fit(module, rows(folder, pack))
    return record.losses, gradients.steps


@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
def test_loss_and_gradient_are_those_of_a_teacher_in_memory(folder: Path, at: str, pack: bool) -> None:
    losses, gradients = train(folder, OnlineTeacher(str(folder / "teacher")), pack)
    ours, our_gradients = train(folder, ServedTeacher(at, k=V), pack)
    assert ours == pytest.approx(losses, abs=1e-4)
    assert len(set(losses)) == 4
    for one, other in zip(our_gradients, gradients, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert (one[name] - other[name]).abs().max() <= 1e-4
    assert max(value.abs().max() for value in gradients[0].values()) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 3, V - 1, V, 1000])
def test_targets_are_the_k_likeliest_and_the_rest(folder: Path, at: str, k: int) -> None:
    """Against the model's own logits in float64, document by document."""
    teacher, model = ready(ServedTeacher(at, k=k, request_tokens=40), folder), online(folder).model
    assert model is not None
    looked_at = 0
    for batch in (batches(folder)[0], batches(folder, pack=True)[0]):
        found = teacher(batch)
        width = min(k, V)
        assert found.ids.shape == (*batch["input_ids"].shape, width)
        for row, start, stop in documents(batch):
            logits = model(input_ids=batch["input_ids"][row : row + 1, start:stop]).logits[0, :, :V].double()
            for t in range(start, stop):
                if batch["labels"][row, t] == IGNORE_INDEX:
                    continue
                probs, ids = logits[t - start].softmax(-1).topk(width)
                assert found.ids[row, t].tolist() == ids.tolist()
                assert torch.allclose(found.probs[row, t].double(), probs, atol=1e-6)
                assert found.tail[row, t] == pytest.approx(1 - float(probs.sum()), abs=1e-6)
                looked_at += 1
    assert looked_at > 50


def documents(batch: dict[str, torch.Tensor]) -> Iterator[tuple[int, int, int]]:
    for row, ids in enumerate(batch["input_ids"]):
        if "position_ids" in batch:
            starts = [*(batch["position_ids"][row] == 0).nonzero()[:, 0].tolist(), len(ids)]
            yield from ((row, start, stop) for start, stop in pairwise(starts))
        else:
            yield row, 0, int(batch["attention_mask"][row].sum())


# ---- ahead of the student


def test_what_is_asked_ahead_is_not_asked_again(folder: Path) -> None:
    with scripted(Truthful(folder)) as server:
        teacher = ready(ServedTeacher(server.url, k=3), folder)
        first, second, third, fourth = batches(folder)[:4]
        count = lambda: sum(path == "/v1/completions" for path, _, _ in server.asked)
        before = count()
        for batch in (first, second, third):
            teacher.ahead(batch)
        expected = ready(ServedTeacher(server.url, k=3), folder)
        asked = 3 + 1  # the other teacher looks once whether all is well
        for batch in (first, third, fourth):  # the second was left out, the fourth comes unannounced
            ours, theirs = teacher({**batch, "num_valid": torch.tensor(1)}), expected(batch)
            assert torch.equal(ours.ids, theirs.ids)
            assert torch.equal(ours.probs, theirs.probs)
        assert count() - before == asked + 3 + 1
        assert not teacher._coming


def test_asking_ahead_does_not_wait(folder: Path) -> None:
    go = threading.Event()
    truthful = Truthful(folder)

    def late(path: str, body: bytes) -> Answer:
        if path == "/v1/completions" and len(json.loads(body)["prompt"]) > 1:
            assert go.wait(120)
        return truthful.honest(path, body)

    with scripted(late) as server:
        teacher = ready(ServedTeacher(server.url, k=3), folder)
        batch = batches(folder)[0]
        teacher.ahead(batch)  # would never return
        go.set()
        assert teacher(batch).ids.shape[-1] == 3


def test_a_batch_is_split_into_requests_that_go_together(folder: Path) -> None:
    truthful, meet = Truthful(folder), threading.Barrier(2, timeout=120)
    parts: list[int] = []

    def together(path: str, body: bytes) -> Answer:
        if path == "/v1/completions" and len(asked := json.loads(body)["prompt"][0]) > 2:
            parts.append(len(asked))
            meet.wait()
        return truthful.honest(path, body)

    with scripted(together) as server:
        teacher = ready(ServedTeacher(server.url, k=3, connections=2, request_tokens=1), folder)
        batch = batches(folder)[0]
        assert teacher(batch).ids.shape[0] == 4
    assert len(parts) == 4


# ---- what goes wrong on the way


def failing(folder: Path, *failures: Answer | Script) -> Script:
    """Fail in these ways, one after the other, from the second request for completions on: the first is asked at setup."""
    truthful, left, seen = Truthful(folder), list(failures), []

    def script(path: str, body: bytes) -> Answer:
        if path == "/v1/completions":
            seen.append(body)
            if len(seen) > 1 and left:
                failure = left.pop(0)
                return failure(path, body) if callable(failure) else failure
        return truthful.honest(path, body)

    return script


def without_a_token(folder: Path) -> Script:
    truthful = Truthful(folder)

    def script(path: str, body: bytes) -> Answer:
        answer = json.loads(truthful.completions.complete(body))
        answer["choices"][0]["prompt_logprobs"].pop()
        return as_json(answer)

    return script


@pytest.mark.parametrize("failure", [(429, {"Retry-After": "0"}, b""), (503, {}, b""), None], ids=str)
def test_what_passes_is_not_noticed(folder: Path, failure: Answer) -> None:
    batch = batches(folder)[0]
    with scripted(failing(folder, failure, failure)) as server:
        teacher = ready(ServedTeacher(server.url, k=3), folder)
        assert torch.equal(teacher(batch).ids, ready(ServedTeacher(server.url, k=3), folder)(batch).ids)


def test_what_does_not_pass_is_named(folder: Path) -> None:
    batch, hang = batches(folder)[0], threading.Event()

    def hanging(path: str, body: bytes) -> Answer:
        hang.wait(120)
        return None

    cases: list[tuple[Answer | Script, str]] = [
        ((500, {}, b'{"error": {"message": "EngineCore died"}}'), r"fails: EngineCore died \(status 500\)"),
        ((400, {}, b'{"error": {"message": "maximum context length is 8"}}'), r"refuses: maximum context length is 8 .*--max-model-len"),
        (hanging, r"did not answer, 1 times \(timed out\); .*--ckpt_path last"),
        (None, r"did not answer, 1 times \(peer closed connection .*received 13 bytes, expected 1000"),
        (without_a_token(folder), r"the teacher's server at http://\S+ gives log-probabilities of \d+ tokens to a prompt of \d+"),
        ((200, {}, b'{"choices": [{"ind'), "bytes that are no completions"),
    ]
    for failure, words in cases:
        with scripted(failing(folder, failure)) as server:
            teacher = ready(ServedTeacher(server.url, k=3, retries=0), folder)
            teacher.timeout_s = teacher.client.timeout_s = 1.0 if failure is hanging else 120.0
            with pytest.raises(TrainingError, match=words):
                teacher(batch)
            assert teacher(batch).ids.shape[-1] == 3, "one failure spoils nothing after it"
    hang.set()


class Restarts(pl.Callback):
    """Stops the server in the middle of training; another takes its port a little later."""

    def __init__(self, server: Scripted) -> None:
        self.server, self.script = server, server.script
        self.next: list[Scripted] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.server.shutdown()
            self.server.server_close()
            self.timer = threading.Timer(1.0, self._start)
            self.timer.start()

    def _start(self) -> None:
        self.next.append(Scripted(self.script, self.server.server_port))
        threading.Thread(target=self.next[0].serve_forever, daemon=True).start()


def test_training_survives_a_restart_of_the_server(folder: Path) -> None:
    script = Truthful(folder)
    with scripted(script) as server:
        undisturbed, _ = train(folder, ServedTeacher(server.url, k=5))
    server = Scripted(script)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    restarts = Restarts(server)
    losses, _ = train(folder, ServedTeacher(server.url, k=5, retries=5000), callbacks=(restarts,))
    assert losses == undisturbed
    assert any(path == "/v1/completions" for path, _, _ in restarts.next[0].asked), "the second server was not needed"
    restarts.next[0].shutdown()
    restarts.next[0].server_close()


# ---- what is wrong from the start


def test_a_tokenizer_that_differs_is_refused(folder: Path, serve: Serve) -> None:
    server = serve()
    server.about["vocabulary"] = {**server.about["vocabulary"], "a": 999}
    with pytest.raises(ConfigError, match=r"model\.teacher and data\.tokenizer have different tokenizers .*'a': 999"):
        ready(ServedTeacher(url(server)), folder)


def test_a_server_that_gives_fewer_than_k_is_refused(folder: Path) -> None:
    """As vLLM answers without --max-logprobs."""
    words = "Requested prompt logprobs of 50, which is greater than max allowed: 20"
    answer = as_json({"error": {"message": words, "type": "BadRequestError", "param": None, "code": 400}}, 400)
    with scripted(Truthful(folder, completions=answer)) as server, pytest.raises(ConfigError, match=f"{words} .*--max-logprobs"):
        ready(ServedTeacher(server.url, k=5), folder)


def test_an_endpoint_without_prompt_logprobs_is_refused(folder: Path) -> None:
    answer = as_json({"choices": [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "length"}]})
    with scripted(Truthful(folder, completions=answer)) as server, pytest.raises(ConfigError, match="gives no prompt_logprobs"):
        ready(ServedTeacher(server.url), folder)


@pytest.mark.parametrize("answer", [(200, {}, b"hello"), as_json({"data": []}), as_json([1]), as_json({"data": [3]})])
def test_what_is_no_such_server_is_named(answer: Answer, folder: Path) -> None:
    with scripted(lambda path, body: answer) as server, pytest.raises(ConfigError, match=r"lists no models at /v1/models; start vLLM"):
        ready(ServedTeacher(server.url), folder)


def test_the_model_is_the_servers_first_or_the_one_that_is_named(folder: Path) -> None:
    listed = as_json({"data": [{"id": "one"}, {"id": "two"}]})
    with scripted(lambda path, body: listed) as server:
        for model, found in ((None, "one"), ("two", "two")):
            teacher = ServedTeacher(f"{server.url}/v1", model)  # with or without /v1, as people have it at hand
            teacher.setup(CausalLM(), CPU, torch.float32)
            assert teacher.name == f"{found} at {server.url}"
        with pytest.raises(ConfigError, match="serves one, two, not 'three'"):
            ServedTeacher(server.url, "three").setup(CausalLM(), CPU, torch.float32)


def test_what_is_asked(folder: Path) -> None:
    with scripted(Truthful(folder)) as server:
        for k, sent in ((3, 3), (V, -1)):
            ready(ServedTeacher(server.url, k=k), folder)
            asked = json.loads(server.asked[-1][2])
            name = str(folder / "teacher")
            assert asked == {"model": name, "prompt": [[0, 0]], "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": sent}


def test_classification_is_refused() -> None:
    with pytest.raises(ConfigError, match="probabilities of the next token, but the data want one class per sample; take OnlineTeacher"):
        ServedTeacher("http://127.0.0.1:9").setup(SequenceClassification(), CPU, torch.float32)


def test_a_term_that_compares_layers_is_refused(folder: Path, at: str) -> None:
    losses = {"kd": ForwardKL(1.0), "hidden": HiddenMSE()}
    module = pair.module(folder, losses=losses, balancer=None, teacher=ServedTeacher(at))
    with pytest.raises(ConfigError, match=r"model\.losses\.hidden compares layers, but model\.teacher shows none; .*RemoteTeacher"):
        pair.trainer(max_steps=1).fit(module, rows(folder))


def test_another_temperature_is_refused(folder: Path, at: str) -> None:
    module = pair.module(folder, teacher=ServedTeacher(at))
    with pytest.raises(ConfigError, match=r"model\.losses\.kd\.temperature is 2, but the teacher's target was made with 1"):
        pair.trainer(max_steps=1).fit(module, rows(folder))


@pytest.mark.parametrize("wrong", [{"k": 0}, {"connections": 0}, {"request_tokens": 0}, {"timeout_s": 0.0}, {"retries": -1}])
def test_numbers_out_of_range_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=rf"model\.teacher\.{next(iter(wrong))} "):
        ServedTeacher("http://x", **wrong)


def test_the_key(folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(KEY, "sesame-1234")
    where = url(serve())
    teacher = ready(ServedTeacher(where), folder)
    assert teacher(batches(folder)[0]).ids.shape[-1] == V
    monkeypatch.setenv(KEY, "other-5678")
    with pytest.raises(TrainingError, match=f"wants a key; put it into {KEY}") as e:
        ready(ServedTeacher(where), folder)
    shown = caplog.text + str(e.value) + repr(teacher) + repr(vars(teacher)) + json.dumps(teacher.describe())
    assert not any(key in shown for key in ("sesame-1234", "other-5678"))


# ---- around it


def test_a_run_ends_with_a_report(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = config()
    given["trainer"] |= {"max_steps": 2}
    given["model"]["losses"]["kd"]["init_args"]["temperature"] = 1.0
    pair.teacher_folder(tmp_path / "teacher")
    pair.prompts(tmp_path / "prompts.jsonl")
    with scripted(Truthful(folder)) as server:  # says nothing of the teacher's size
        given["model"]["teacher"] = {"class_path": "ServedTeacher", "init_args": {"url": server.url, "k": 5}}
        (tmp_path / "kd.yaml").write_text(yaml.safe_dump(given))
        assert main(["fit", "--config", "kd.yaml", "--name", "a"]) == 0
        assert main(["fit", "--config", "kd.yaml", "--name", "b", "--dry-run"]) == 0
    found = json.loads((tmp_path / "runs" / "a" / "report.json").read_text())["models"]
    assert found["student distilled"]["loss"] > 0
    assert "loss" not in found["teacher"]
    assert "kl" not in found["student distilled"]
    printed = " ".join(capsys.readouterr().out.split())  # the table is cut into lines
    assert "of unknown size" in printed
    assert "KL and agreement are not measured" in printed


def test_cost_asks_no_server(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair.teacher_folder(folder / "student")
    for teacher in (RemoteTeacher("http://127.0.0.1:9"), ServedTeacher("http://127.0.0.1:9")):  # nobody is there, for 300 s
        found, _ = candidates(pair.module(folder, teacher=teacher), rows(folder), folder, {})
        assert list(found) == ["student"]
        assert "is http://127.0.0.1:9, no model in this process: it is not measured" in capsys.readouterr().out


def test_the_shipped_configuration_differs_in_the_teacher_alone() -> None:
    folder = Path(__file__).parents[2] / "configs"
    plain, served = (yaml.safe_load((folder / f"kd_llama{name}.yaml").read_text()) for name in ("", "_served"))
    teacher = served["model"].pop("teacher")
    assert plain["model"].pop("teacher") != teacher
    assert served == plain
    assert list(served["model"]) == list(plain["model"])
    RemoteTeacher(**teacher["init_args"])
