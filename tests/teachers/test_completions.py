"""Our OpenAI endpoint gives the log-probabilities that the model itself gives, in vLLM's form."""

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from distill.tasks import CausalLM, SequenceClassification
from distill.teachers import completions
from distill.teachers.completions import Completions
from distill.teachers.online import OnlineTeacher
from distill.teachers.server import TeacherServer
from distill.teachers.wire import KEY
from tests import models
from tests.teachers.serving import url

V, ROWS = models.VOCAB, 48  # tokens; rows of the head, the last 8 of them padding
PROMPTS = [[5, 9, 12, 3], [7], [4, 4, 31, 20, 8, 3, 39], [6, 3]]


@pytest.fixture
def teacher(tmp_path: Path) -> OnlineTeacher:
    made = OnlineTeacher(models.save(models.causal_lm(vocab_size=ROWS), tmp_path / "model"))
    made.setup(CausalLM(), torch.device("cpu"), torch.float32)
    return made


@pytest.fixture
def server(teacher: OnlineTeacher) -> Completions:
    return Completions(teacher, CausalLM(), models.tokenizer())


def ask(server: Completions, prompt: Any = PROMPTS, **more: Any) -> Any:
    return json.loads(server.complete(json.dumps({"prompt": prompt, "max_tokens": 1, "prompt_logprobs": 3, **more}).encode()))


def entries(answer: Any) -> list[Any]:
    return [choice["prompt_logprobs"] for choice in answer["choices"]]


@torch.no_grad()
def reference(teacher: OnlineTeacher, prompt: list[int]) -> torch.Tensor:
    """Log-probabilities of what follows each token, of the tokens alone: `[n, V]`, float64."""
    assert teacher.model is not None
    return teacher.model(input_ids=torch.tensor([prompt])).logits[0, :, :V].double().log_softmax(-1)


def check_entry(entry: dict[str, Any], logp: torch.Tensor, own: int, k: int) -> None:
    order = logp.argsort(descending=True).tolist()
    assert [int(i) for i in entry] == order[:k] + ([own] if own not in order[:k] else [])
    for i, shown in entry.items():
        assert shown["logprob"] == pytest.approx(float(logp[int(i)]), abs=1e-5)
        assert shown["rank"] == order.index(int(i)) + 1
        assert set(shown) == {"logprob", "rank"}


@pytest.mark.parametrize("k", [0, 1, 3, V, -1])
def test_the_likeliest_and_the_prompts_own_token(teacher: OnlineTeacher, server: Completions, k: int) -> None:
    answers = entries(ask(server, prompt_logprobs=k))
    assert [len(answer) for answer in answers] == [len(prompt) for prompt in PROMPTS]
    outside = 0
    for prompt, (first, *rest) in zip(PROMPTS, answers, strict=True):
        assert first is None
        for logp, own, entry in zip(reference(teacher, prompt), prompt[1:], rest, strict=False):
            check_entry(entry, logp, own, V if k == -1 else k)
            outside += len(entry) > k >= 0
    assert outside > 0 or k in (-1, V)


def test_nothing_depends_on_how_it_is_cut(server: Completions, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = entries(ask(server))
    widths: list[int] = []
    head = server.task.head(server.model).projection  # type: ignore[attr-defined]  # of LogitHead
    head.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[0]))
    lengths: list[int] = []
    server.model.base_model.register_forward_pre_hook(  # type: ignore[union-attr, operator]
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    ask(server)
    assert (len(widths), len(lengths)) == (1, 1)
    monkeypatch.setattr(completions, "LOGITS", 2 * V)
    monkeypatch.setattr(completions, "POSITIONS", 8)
    widths.clear(), lengths.clear()
    for ours, theirs in zip(entries(ask(server)), whole, strict=True):
        for entry, other in zip(ours[1:], theirs[1:], strict=True):
            assert list(entry) == list(other)
            assert [e["logprob"] for e in entry.values()] == pytest.approx([e["logprob"] for e in other.values()], abs=1e-5)
    assert max(widths) == 2, "more logits at a time than are allowed"
    assert max(lengths) <= 8
    assert len(lengths) == 3


def test_one_prompt_texts_and_empty_continuations(server: Completions) -> None:
    ids = [5, 6, 7]
    by_ids = ask(server, ids)
    assert by_ids["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    (choice,) = by_ids["choices"]
    assert (choice["index"], choice["text"], choice["finish_reason"]) == (0, "", "length")
    assert entries(ask(server, "w5 w6 w7")) == entries(ask(server, ["w5 w6 w7"])) == entries(by_ids)
    assert entries(ask(server, [[5]])) == [[None]]


def test_a_class_that_is_ruled_out_is_sent_as_minus_9999(server: Completions) -> None:
    server.model.lm_head.register_forward_hook(  # type: ignore[union-attr, operator]
        lambda module, args, out: out.index_fill(-1, torch.tensor([7]), float("-inf"))
    )
    ((_, entry),) = entries(ask(server, [[5, 7]], prompt_logprobs=-1))
    assert entry["7"] == {"logprob": -9999.0, "rank": V}
    ((_, entry),) = entries(ask(server, [[5, 7]], prompt_logprobs=1))
    assert list(entry.items())[1] == ("7", {"logprob": -9999.0, "rank": V})


def test_features_may_be_elsewhere_than_the_weights(server: Completions, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of an offloaded model are: here the weights seem to be on `meta`."""
    given: list[Any] = []
    run = OnlineTeacher.__call__
    monkeypatch.setattr(OnlineTeacher, "__call__", lambda self, batch: given.append(batch) or run(self, given[0]))
    expected = entries(ask(server))
    server.device = torch.device("meta")
    assert entries(ask(server)) == expected
    assert given[1]["input_ids"].device == server.device


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "the body is no JSON"),
        (b"[1]", "must be a JSON object, got list"),
        ({"model": "gpt"}, "the model here is .*model, not gpt"),
        ({"max_tokens": 16}, "generates nothing: max_tokens must be 0, got 16"),
        ({"n": 2}, "n must be 1, got 2"),
        ({"stream": True}, "stream must be False, got True"),
        ({"prompt_logprobs": None}, "prompt_logprobs must be from 0 to 40, or -1 for all, got None"),
        ({"prompt_logprobs": 41}, "got 41"),
        ({"prompt_logprobs": -2}, "got -2"),
        ({"prompt": None}, "prompt must be a text, a list of token ids, or a list of those"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": [[]]}, "none of them empty"),
        ({"prompt": [[1, True]]}, "prompt must be"),
        ({"prompt": [[1, 40]]}, "token ids go from 0 to 39; the prompt has 1 to 40"),
        ({"prompt": [[1, -1]]}, "the prompt has -1 to 1"),
    ],
)
def test_what_cannot_be_answered_is_refused(server: Completions, body: Any, words: str) -> None:
    sent = body if isinstance(body, bytes) else json.dumps({"prompt": [[5, 6]], "prompt_logprobs": 1, **body}).encode()
    with pytest.raises(ValueError, match=words):
        server.complete(sent)


def test_a_prompt_of_one_more_token_than_there_are_positions_is_the_longest(tmp_path: Path) -> None:
    teacher = OnlineTeacher(models.save(models.causal_lm("gpt2"), tmp_path / "model"))
    teacher.setup(CausalLM(), torch.device("cpu"), torch.float32)
    server = Completions(teacher, CausalLM(), models.tokenizer())
    assert len(entries(ask(server, [[5] * 33]))[0]) == 33
    with pytest.raises(ValueError, match="has positions for 32 tokens"):
        ask(server, [[5] * 34])


def test_a_classifier_completes_nothing(tmp_path: Path) -> None:
    teacher = OnlineTeacher(models.save(models.classifier(), tmp_path / "model"))
    teacher.setup(SequenceClassification(), torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="predicts one class per sample"):
        ask(Completions(teacher, SequenceClassification(), models.tokenizer()))


def test_over_http(teacher: OnlineTeacher, server: Completions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "sesame")
    with TeacherServer(("127.0.0.1", 0), teacher, CausalLM(), models.tokenizer(), False) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        client = httpx.Client(base_url=url(http), headers={"Authorization": "Bearer sesame"}, trust_env=False)
        assert client.get("/v1/models").json()["data"][0]["id"] == teacher.name
        asked = {"model": teacher.name, "prompt": PROMPTS, "max_tokens": 1, "prompt_logprobs": 2, "temperature": 1.0}
        answer = client.post("/v1/completions", json=asked)
        assert entries(answer.json()) == entries(ask(server, prompt_logprobs=2))
        assert client.post("/tokenize", json={"prompt": "w5 w9 w3"}).json() == {"count": 3, "tokens": [5, 9, 3]}
        assert (client.post("/tokenize", json={"prompt": 3}).status_code, client.post("/nothing").status_code) == (400, 404)
        wrong = client.post("/v1/completions", json=asked | {"prompt_logprobs": 99})
        assert (wrong.status_code, "from 0 to 40" in wrong.text) == (400, True)
        for path in ("/v1/models", "/v1/completions", "/tokenize"):
            method = "GET" if path == "/v1/models" else "POST"
            assert httpx.request(method, url(http) + path, json=asked if method == "POST" else None, trust_env=False).status_code == 401
        http.shutdown()
