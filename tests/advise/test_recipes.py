"""What people are told to type: every YAML makes its objects in the real command, and every command parses."""

import shlex
from pathlib import Path

import pytest
import yaml

from distill.advise import recipes
from distill.advise.decide import WHAT
from distill.advise.parts import Advice, Form, Step
from distill.cli import main
from distill.verb import parsed
from tests.advise.teachers import LLAMA, forms

TARGETS = ("size", "latency")


def one_of_each(place: Path, kind: str) -> list[Form]:
    found = {(form.kind, form.scheme): form for target in TARGETS for form in forms(place, kind).all(target)}  # type: ignore[arg-type]
    return [form for form in found.values() if form.kind != "keep"]


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal-lm"), ("bert", "classification")])
def test_every_yaml_makes_objects_and_is_of_the_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, task: str) -> None:
    monkeypatch.chdir(tmp_path)
    found = one_of_each(tmp_path / "t", kind)
    assert {form.kind for form in found} == {"ptq", "qat", "prune", "distil", "combine"}
    whole = forms(tmp_path / "t", kind).whole
    for form in found:
        text = recipes.config(form, "t", whole, task, 32, cuda=False)
        Path("advice.yaml").write_text(text)
        module, _ = parsed("advice.yaml")
        assert module.teacher is not None
        document = yaml.safe_load(text)
        assert (document.get("trainer") is None) == (not form.trained)
        if form.kind in ("distil", "combine"):
            config = module.recipe_of_student.blueprint(forms(tmp_path / "t", kind).teacher.task, {"num_labels": 2})
            sizes = form.sizes
            assert sizes is not None
            assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads) == (
                sizes.layers,
                sizes.hidden,
                sizes.intermediate,
                sizes.heads,
            )
        if form.trained:
            assert document["trainer"]["max_steps"] == max(1, (form.tokens or 0) // (8 * 32))


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal-lm"), ("bert", "classification")])
def test_every_command_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, task: str
) -> None:
    monkeypatch.chdir(tmp_path)
    form = next(form for form in one_of_each(tmp_path / "t", kind) if form.kind == "combine" and form.scheme)
    plain = next(form for form in one_of_each(tmp_path / "t", kind) if form.kind == "ptq")
    Path("advice.yaml").write_text(recipes.config(form, "t", forms(tmp_path / "t", kind).whole, task, 32, cuda=False))
    typed = [command for each in (plain, form) for command in recipes.commands(Step("", "", each), "t", "advice.yaml", "advice")]
    assert len(typed) == 5
    Path("runs/advice").mkdir(parents=True)
    Path("runs/advice/config.yaml").write_text(Path("advice.yaml").read_text())
    for command in typed:
        python, train, *args = shlex.split(command)
        assert (python, train) == ("python", "train.py")
        with pytest.raises(SystemExit) as stop:
            main([*(args if args[0] in ("export", "cost") else ["fit", *args]), "--print_config"])
        assert stop.value.code == 0, command
    assert "format" in capsys.readouterr().out


def test_a_teacher_of_the_hub_is_fetched_before_it_is_exported(tmp_path: Path) -> None:
    plain = next(form for form in one_of_each(tmp_path / "t", "llama") if form.kind == "ptq")
    first, second = recipes.commands(Step("", "", plain), "org/model", "a.yaml", "a")
    assert first == "hf download org/model --local-dir models/model"
    assert "--student models/model --out runs/a-as-it-is" in second


def test_the_yaml_is_of_what_is_trained(tmp_path: Path) -> None:
    plain, trained = (next(f for f in one_of_each(tmp_path / "t", "llama") if f.kind == kind) for kind in ("ptq", "qat"))
    keep = forms(tmp_path / "t").keep()
    steps = lambda *found: Advice("ptq", "", tuple(Step(WHAT[f.kind], "", f) for f in found), {})
    assert recipes.of_advice(steps(plain, trained)) is trained
    assert recipes.of_advice(steps(plain)) is plain
    assert recipes.of_advice(steps(keep)) is None
    assert LLAMA["num_hidden_layers"] == 4
    assert "precision: bf16-mixed" in recipes.config(trained, "t", None, "causal-lm", 32, cuda=True)
