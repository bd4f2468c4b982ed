"""A teacher behind HTTP gives what it gives in memory, and says what is wrong where it cannot."""

import http.client
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytorch_lightning as pl
import torch
import yaml

from distill.cli import main
from distill.losses.divergence import ForwardKL
from distill.losses.features import HiddenMSE
from distill.losses.hard import CrossEntropy
from distill.teachers.http import Client
from distill.teachers.online import OnlineTeacher
from distill.teachers.remote import RemoteTeacher
from distill.teachers.wire import KEY, WEIGHTS
from distill.types import ConfigError, TrainingError
from tests import pair
from tests.parallel.runs import Record
from tests.ranks import run_ranks
from tests.teachers.serving import Serve, scripted, url
from tests.test_command import config


def train(folder: str, teacher: Any, ranks: int = 1, **kwargs: Any) -> list[float]:
    pl.seed_everything(0, verbose=False)
    path, record = Path(folder), Record()
    losses = {"ce": CrossEntropy(), "kd": ForwardKL(2.0), "hidden": HiddenMSE(layers="uniform")}
    module = pair.module(path, losses=losses, balancer=None, teacher=teacher)
    trainer = pair.trainer(max_steps=4, devices=ranks, strategy="ddp" if ranks > 1 else "auto", callbacks=[record], log_every_n_steps=1)
    trainer.fit(module, pair.data(path, batch_size=4 // ranks))
    return record.losses


def train_remotely(folder: str, where: str, ranks: int) -> list[float]:
    return train(folder, RemoteTeacher(where), ranks)


def test_the_losses_are_those_of_a_teacher_in_memory(tmp_path: Path, serve: Serve) -> None:
    server = serve()
    online = train(str(tmp_path), OnlineTeacher(str(tmp_path / "teacher")))
    assert train(str(tmp_path), RemoteTeacher(url(server))) == online
    assert len(set(online)) == 4


def test_two_ranks_ask_one_server(tmp_path: Path, serve: Serve) -> None:
    server = serve()
    online = train(str(tmp_path), OnlineTeacher(str(tmp_path / "teacher")))
    for losses in run_ranks(train_remotely, 2, str(tmp_path), url(server), 2):
        assert losses == pytest.approx(online, abs=1e-5)


def test_a_server_that_comes_later_is_waited_for(tmp_path: Path, serve: Serve) -> None:
    server = serve()
    port = server.server_port
    server.shutdown()
    server.server_close()
    late = threading.Thread(target=serve, kwargs={"port": port, "delay_s": 1.5})
    late.start()
    assert len(train(str(tmp_path), RemoteTeacher(f"http://127.0.0.1:{port}"))) == 4
    late.join()


def test_one_that_never_comes_is_named(tmp_path: Path) -> None:
    pair.data(tmp_path)
    with pytest.raises(ConfigError, match=r"no server at http://127\.0\.0\.1:9 within 0 s .*python train\.py serve"):
        train(str(tmp_path), RemoteTeacher("http://127.0.0.1:9", wait_s=0.0))


def test_one_that_dies_is_asked_again_and_then_named(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    teacher = RemoteTeacher(url(server), retries=2)
    before = teacher.__class__.__call__
    calls = []

    def dying(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            server.shutdown()
            server.server_close()
            self.client = Client(10.0, 2)  # without the connection that is open
        return before(self, *args)

    monkeypatch.setattr(RemoteTeacher, "__call__", dying)
    monkeypatch.setattr("distill.teachers.http.pause", lambda *_: 0.01)
    with pytest.raises(TrainingError, match=r"did not answer, 3 times .* --ckpt_path last"):
        train(str(tmp_path), teacher)


def test_servers_of_different_models_are_refused(tmp_path: Path, serve: Serve) -> None:
    one = serve()
    other = OnlineTeacher(str(tmp_path / "teacher"))
    data = pair.data(tmp_path)
    data.setup()
    other.setup(data.task(), torch.device("cpu"), torch.float32)
    assert other.model is not None
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1
    other.model.save_pretrained(tmp_path / "other")
    pair.word_tokenizer(tmp_path / "other")
    with pytest.raises(ConfigError, match="serve different weights"):
        train(str(tmp_path), RemoteTeacher([url(one), url(serve("other"))]))


def test_another_tokenizer_is_refused(tmp_path: Path, serve: Serve) -> None:
    server = serve()
    server.about["vocabulary"] = {**server.about["vocabulary"], "a": 999}
    with pytest.raises(ConfigError, match=r"model\.teacher and data\.tokenizer have different tokenizers .*'a': 999"):
        train(str(tmp_path), RemoteTeacher(url(server)))


def test_packed_rows_are_refused_by_a_server_that_did_not_look(tmp_path: Path, serve: Serve) -> None:
    teacher = RemoteTeacher(url(serve()))
    data = pair.data(tmp_path)
    data.setup()
    teacher.setup(data.task(), torch.device("cpu"), torch.float32)
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(TrainingError, match=r"refuses: these rows are packed, .* data\.pack=false"):
        teacher({"input_ids": ids, "position_ids": ids})
    with pytest.raises(TrainingError, match=r"refuses: tap 'model\.nothing'"):
        teacher({"input_ids": ids}, ["model.nothing"])


def test_the_key_comes_from_the_environment(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, " sesame\n")  # as `$(cat file)` leaves it
    server = serve()
    assert len(train(str(tmp_path), RemoteTeacher(url(server)))) == 4
    monkeypatch.delenv(KEY)
    with pytest.raises(TrainingError, match=f"wants a key; put it into {KEY}"):
        train(str(tmp_path), RemoteTeacher(url(server)))
    monkeypatch.setenv(KEY, "")  # none: nothing could be sent
    assert serve().key is None


def test_a_server_that_came_back_with_another_model_is_noticed(tmp_path: Path, serve: Serve) -> None:
    server = serve()
    teacher = RemoteTeacher(url(server))
    data = pair.data(tmp_path)
    data.setup()
    teacher.setup(data.task(), torch.device("cpu"), torch.float32)
    server.about["weights"] = "other"
    with pytest.raises(TrainingError, match="holds other weights than those that the student began with"):
        teacher({"input_ids": torch.zeros(1, 4, dtype=torch.long)})


def test_bodies_that_are_no_batch_are_not_read(serve: Serve) -> None:
    server = serve()
    assert httpx.post(url(server) + "/features", content=b"nonsense", headers={WEIGHTS: "x"}).status_code == 400
    for length in ("99999999999", "-1", "abc"):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        connection.putrequest("POST", "/features")
        connection.putheader("Content-Length", length)
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()


def test_what_is_no_teacher_is_named(tmp_path: Path) -> None:
    pair.data(tmp_path)
    with scripted(lambda path, body: (200, {}, b"hello")) as server, pytest.raises(ConfigError, match="is not `python train"):
        train(str(tmp_path), RemoteTeacher(server.url))


def _urls(folder: str, where: list[str]) -> str:
    path = Path(folder)
    teacher = RemoteTeacher(where)
    pair.trainer(max_steps=1, devices=2, strategy="ddp").fit(pair.module(path, teacher=teacher), pair.data(path, batch_size=2))
    return teacher.url


def test_ranks_share_the_servers_out(tmp_path: Path, serve: Serve) -> None:
    where = [url(serve()), url(serve())]
    assert run_ranks(_urls, 2, str(tmp_path), where) == where


@pytest.mark.parametrize("wrong", [{"timeout_s": 0.0}, {"retries": -1}, {"wait_s": -1.0}])
def test_numbers_out_of_range_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is out of range"):
        RemoteTeacher("http://x", **wrong)


def test_an_address_without_a_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be like http://node3:8100, got 'node3:8100'"):
        RemoteTeacher("node3:8100")


def test_told_to_stop_it_leaves_once_nobody_asks(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.teachers.server.LINGER_S", 1.5)
    server = serve()
    teacher = RemoteTeacher(url(server), retries=0)
    data = pair.data(tmp_path)
    data.setup()
    teacher.setup(data.task(), torch.device("cpu"), torch.float32)
    ids = torch.zeros(1, 4, dtype=torch.long)
    teacher({"input_ids": ids})
    server.leave()
    time.sleep(0.7)
    teacher({"input_ids": ids})  # a student that ends its step
    end = time.monotonic() + 60
    while server.leaving and time.monotonic() < end:
        time.sleep(0.1)
    server.server_close()
    teacher.client = Client(10.0, 0)
    with pytest.raises(TrainingError, match="did not answer"):
        teacher({"input_ids": ids})


ONE = {"class_path": "OnlineTeacher", "init_args": {"model": "nothing"}}


@pytest.mark.parametrize(
    ("teacher", "arguments", "words"),
    [
        ("RemoteTeacher", {"url": "http://127.0.0.1:9"}, "is RemoteTeacher (http://127.0.0.1:9), not one model in this process"),
        ("OtherTokenizer", {"source": ONE}, "is OtherTokenizer (nothing), not one model"),  # whose tokens are not the data's
        ("Ensemble", {"teachers": [ONE]}, "is Ensemble (1 × nothing), not one model"),
        ("OnlineTeacher", {"model": "nothing", "sharded": True}, "set sharded: false"),
    ],
)
def test_what_is_no_model_in_this_process_is_not_served(
    teacher: str, arguments: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = config()
    given["model"]["teacher"] = {"class_path": teacher, "init_args": arguments}
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(given))
    assert main(["serve", "--config", "kd.yaml"]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
