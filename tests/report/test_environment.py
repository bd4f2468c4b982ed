import getpass
import json
import platform
import socket
from pathlib import Path

import pytest
import torch

from distill.report.environment import environment, private


def test_versions_and_nobodys_name() -> None:
    found = environment()
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == torch.__version__
    assert found["memory_gb"] > 0.1
    assert found["cpu"]
    text = json.dumps(found)
    assert str(Path.home()) not in text
    for name in (socket.gethostname(), getpass.getuser()):
        assert f'"{name}"' not in text
        assert len(name) < 5 or name not in text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/here/runs/a", "runs/a"),
        ("/here", "."),
        ("/hereafter/a", "/hereafter/a"),
        ("/home/ann/data/x.jsonl", "~/data/x.jsonl"),
        ("/home/ann", "~"),
        ("/Users/ann/x", "~/x"),
        ("/root/x", "~/x"),
        ("/rooted/x", "/rooted/x"),
        ("/scratch/home/x", "/scratch/home/x"),
        ("http://ann:secret@node17.cluster:8000/v1", "http://…/v1"),
        ("https://huggingface.co/org/model", "https://huggingface.co/org/model"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("org/model", "org/model"),
        (3, 3),
        (None, None),
        (True, True),
    ],
)
def test_what_others_need_not_know(given: object, shown: object) -> None:
    assert private({"a": {"b": [given]}}, Path("/here")) == {"a": {"b": [shown]}}


def test_the_home_folder_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/people/ann")
    assert private("/srv/people/ann/x and /srv/people/anna/x", Path("/here")) == "~/x and /srv/people/anna/x"


def test_secrets_but_not_what_is_called_alike() -> None:
    given = {"api_key": "k", "hub_token": "t", "password": "", "tokenizer": "gpt2", "pad_token_id": 3, "token": 5, "key_layer": "x"}
    hidden = given | {"api_key": "…", "hub_token": "…"}
    assert private(given, Path("/here")) == hidden
