import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from distill import hub
from distill.types import ConfigError
from tests.models import causal_lm, save, tokenizer


def test_a_folder_is_loaded(tmp_path: Path) -> None:
    folder = save(causal_lm(), tmp_path / "model")
    assert hub.load(AutoConfig, folder, "model.teacher.model").model_type == "llama"


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing", "runs/teacher/final", "../nothing"])
def test_a_missing_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.teacher\.model: no folder '{name}' here; give the path of a model folder"):
        hub.load(AutoModelForCausalLM, name, "model.teacher.model")


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.student\.model: cannot load .*the folder is there, but not readable as a model"):
        hub.load(AutoModelForCausalLM, str(tmp_path), "model.student.model")


def test_a_folder_whose_config_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(ConfigError, match="the folder is there, but not readable as a model"):
        hub.load(AutoModelForCausalLM, str(tmp_path), "model.student.model")


def test_a_folder_whose_weights_are_cut_short(tmp_path: Path) -> None:
    folder = save(causal_lm(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="the folder is there, but not readable as a model"):
        hub.load(AutoModelForCausalLM, folder, "model.student.model")


@pytest.mark.parametrize(
    ("name", "local"), [("gpt2", False), ("org/model", False), ("./gpt2", True), ("a/b/c", True), ("/a", True), ("~/a", True)]
)
def test_what_can_only_be_a_path(name: str, local: bool) -> None:
    assert hub.looks_local(name) is local


def test_a_folder_here_is_a_path_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.looks_local("org/model")


SCRIPT = """
import signal
from transformers import AutoModelForCausalLM
from distill import hub
from distill.types import ConfigError
signal.alarm(10)  # ends the process
try:
    hub.load(AutoModelForCausalLM, "some-org/some-model", "model.teacher.model")
except ConfigError as error:
    print(error)
"""


UNREACHABLE = pytest.param(
    {"HF_ENDPOINT": "http://127.0.0.1:9"},
    id="unreachable",
)


@pytest.mark.parametrize("variables", [pytest.param({"HF_HUB_OFFLINE": "1"}, id="offline"), UNREACHABLE])
def test_a_hub_that_cannot_be_reached_is_said_soon(variables: dict[str, str], tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=clean | variables | {"HF_HOME": str(tmp_path)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"ended by {done.returncode} (-14: not within 10 s): {done.stderr}"
    assert done.stdout.strip().splitlines()[-1] == (
        "model.teacher.model: cannot load 'some-org/some-model': the hub cannot be reached; "
        "connect to a network, or download the model first and give its folder"
    )


class _Refusing:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def from_pretrained(self, name: str, **kwargs: object) -> None:
        raise OSError("cannot load") from self.error


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        ("401 Client Error. Access to model is restricted", "refuses access; accept the licence"),
        ("403 Client Error: Forbidden", "refuses access; accept the licence"),
        ("404 Client Error: Repository Not Found", "has no such model, or it is private"),
        ("Connection refused", "cannot be reached"),
    ],
)
def test_what_the_hub_answers(cause: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"the hub {said}"):
        hub.load(_Refusing(RuntimeError(cause)), "org/model", "model.teacher.model")


def test_another_error_is_passed_on_in_its_first_line() -> None:
    with pytest.raises(ConfigError, match=r"cannot load 'org/model': cannot load$"):
        hub.load(_Refusing(RuntimeError("something else\nand more")), "org/model", "model.teacher.model")


def test_equal_tokenizers_pass() -> None:
    hub.same_tokens({"a": 0, "b": 1}, {"b": 1, "a": 0}, "model.teacher", "data.tokenizer")


def test_differing_tokenizers_are_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        hub.same_tokens({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 2}, "model.teacher", "data.tokenizer")
    assert str(caught.value) == (
        "model.teacher and data.tokenizer have different tokenizers (3 / 2 tokens, 2 with another id, e.g. 'b': 1 / 2, 'c': 2 / none); "
        "their logits cannot be compared: take models of one family, or set the tokenizer to the model's"
    )


def test_check_tokenizer_compares_and_reads_a_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer().save_pretrained(tmp_path)
    reads = []
    load = hub.load
    monkeypatch.setattr(hub, "load", lambda *args, **kwargs: reads.append(args[1]) or load(*args, **kwargs))
    for _ in range(2):
        hub.check_tokenizer(str(tmp_path), "model.teacher.model", None, tokenizer())
    with pytest.raises(ConfigError, match=r"^model\.teacher and data\.tokenizer have different tokenizers \(40 / 40 tokens, 74 with"):
        hub.check_tokenizer(str(tmp_path), "model.teacher.model", None, tokenizer(first="x"))
    assert reads == [str(tmp_path)]


def test_a_folder_of_the_same_name_elsewhere_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, first in (("a", "w"), ("b", "x")):
        tokenizer(first=first).save_pretrained(tmp_path / place / "teacher")
        monkeypatch.chdir(tmp_path / place)
        hub.check_tokenizer("teacher", "model.teacher.model", None, tokenizer(first=first))


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash_attn is installed, so that nothing is missing")
def test_a_package_that_is_not_installed(tmp_path: Path) -> None:
    folder = save(causal_lm(), tmp_path)
    with pytest.raises(ConfigError, match=r"a package that it needs is not there; install it, or .*FlashAttention2") as caught:
        hub.load(AutoModelForCausalLM, folder, "model.student.model", attn_implementation="flash_attention_2")
    assert "\n" not in str(caught.value)


def test_describe_counts() -> None:
    model = causal_lm()
    model.get_input_embeddings().requires_grad_(False)
    total = sum(p.numel() for p in model.parameters())
    assert hub.describe(model) == {"parameters": total, "trainable": total - 40 * 16, "megabytes": 4 * total / 1e6, "dtype": "float32"}
