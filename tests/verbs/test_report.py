"""`report`, as a person meets it: at the end of a run, of a run's folder, of a checkpoint, of several runs; and what cannot cost a run."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill import signals
from distill.cli import main
from distill.report import gather
from distill.report.sections.fidelity import Fidelity
from distill.report.sections.quality import Quality
from distill.report.sections.robustness import Robustness
from tests import browser, pair
from tests.browser import VIEWS, problems
from tests.disk import largest_file
from tests.ranks import run_ranks
from tests.test_command import config

CHAPTERS = ["summary", "quality", "tasks", "fidelity", "calibration", "robustness", "cost", "training", "provenance"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, data, and a run with its report, `runs/a`."""
    folder = tmp_path_factory.mktemp("report")
    pair.teacher_folder(folder / "teacher")
    pair.prompts(folder / "prompts.jsonl", 80)
    (folder / "kd.yaml").write_text(yaml.safe_dump(config() | {"report_rows": 16}))
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["fit", "--config", "kd.yaml", "--name", "a"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the chapters out that take seconds."""
    monkeypatch.setattr("distill.report.whole.all_sections", lambda: [Quality(), Fidelity()])


def report(folder: str, suffix: str = "") -> dict[str, Any]:
    read: dict[str, Any] = json.loads(Path("runs", folder, f"report{suffix}.json").read_text())
    return read


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as running:
        yield running


@pytest.mark.slow
def test_a_run_ends_with_its_report_which_looks_right_everywhere(here: Path, chromium: Any, tmp_path: Path) -> None:
    found = report("a")
    assert list(found["sections"]) == CHAPTERS[1:]
    assert {name for name, figures in found["sections"].items() if "missing" in figures} == {"tasks"}
    assert set(found["models"]) == {"teacher", "student before", "student distilled"}  # what was there before the chapters stays
    assert "NaN" not in Path("runs/a/report.json").read_text()
    assert not [path.name for path in Path("runs/a").iterdir() if path.name.startswith(".")]
    for view in VIEWS:
        assert problems(chromium, Path("runs/a/report.html"), CHAPTERS, view) == []


def test_of_a_folder_wherever_it_lies(here: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move("runs/a", "elsewhere")
    before = json.loads(Path("elsewhere/report.json").read_text())
    assert main(["report", "elsewhere"]) == 0
    after = json.loads(Path("elsewhere/report.json").read_text())
    assert "The report is elsewhere/report.html" in capsys.readouterr().out
    assert after["sections"]["quality"] == before["sections"]["quality"]  # the same rows, models and seed
    assert after["sections"]["fidelity"]["models"] == before["sections"]["fidelity"]["models"]
    assert not Path("runs/a").exists()


def test_of_a_checkpoint_beside_the_other(here: Path, quick: None) -> None:
    before = Path("runs/a/report.json").read_bytes()
    assert main(["report", "--config", "runs/a/config.yaml", "--ckpt_path", "last"]) == 0
    assert Path("runs/a/report.json").read_bytes() == before
    of_it, final = report("a", "-step-00000006")["sections"]["quality"]["models"], report("a")["sections"]["quality"]["models"]
    assert of_it["student at step-00000006"]["accuracy"] == final["student distilled"]["accuracy"]  # it is the last step's
    assert Path("runs/a/report-step-00000006.html").is_file()
    assert Path("runs/a/report_rows-step-00000006.npz").is_file()


def test_runs_side_by_side_each_with_rows_of_its_own(here: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("runs/a", "runs/b")
    Path("other.jsonl").write_text("\n".join(json.dumps({"prompt": "a b", "completion": "c d e"}) for _ in range(5)))
    assert main(["report", "runs/b", "--data.val_data=other.jsonl", "--data.val_fraction=0"]) == 0
    assert main(["report", "--out", "there/is/none.html", "runs/a", "runs/b"]) == 0
    assert "The comparison is there/is/none.html" in capsys.readouterr().out
    assert "They were measured on different held-out rows" in Path("there/is/none.html").read_text()
    Path("runs/b/report.json").write_text(json.dumps({"models": {}}))
    assert main(["report", "runs/a", "runs/b"]) == 2
    assert "'runs/b/report.json' has no chapters yet; write them first: python train.py report runs/b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "which run? Give its folder: report runs/NAME"),
        (["runs/none"], "there is no run in 'runs/none', for there is no 'runs/none/config.yaml'"),
        (["--config", "kd.yaml"], "which run? Give its folder"),
        (["--config", "kd.yaml", "--name", "none"], "there is no run in 'runs/none'; train it first"),
        (["runs/a", "--ckpt_path", "none.ckpt"], "no checkpoint 'none.ckpt'"),
        (["runs/a", "--ckpt_path", "prompts.jsonl"], "the checkpoint 'prompts.jsonl' is of another run than 'runs/a'"),
        (["runs/a", "--ckpt_path", "runs/a/metrics.jsonl"], "runs/a/metrics.jsonl"),
        (["runs/a", "--data.train_data", "gone.jsonl"], "data.train_data: no file 'gone.jsonl'"),
        (["runs/a", "--model.teacher.init_args.model", "gone"], "model.teacher.model: cannot load 'gone'"),
        (["runs/a", "--data.val_fraction", "0"], "there are no held-out rows to measure on"),
        (["runs/a", "--out", "x.html"], "two runs or more are wanted"),
        (["runs/a", "runs/a"], "are the same run"),
        (["runs/a", "runs/none"], "there is no folder 'runs/none'"),
    ],
)
def test_what_is_wrong_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    kept = sorted(Path("runs").rglob("*"))
    assert main(["report", *args]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert sorted(Path("runs").rglob("*")) == kept


def test_a_run_that_is_not_whole(here: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    log, figures = Path("runs/a/metrics.jsonl"), Path("runs/a/report.json")
    log.write_text(log.read_text()[:-20])
    assert main(["report", "runs/a"]) == 0
    figures.write_text(figures.read_text()[:99])
    assert main(["report", "runs/a"]) == 2
    assert "report.json' is no JSON" in capsys.readouterr().err
    figures.unlink()
    assert main(["report", "runs/a"]) == 2
    assert "the run has not finished, go on with --config runs/a/config.yaml --ckpt_path last" in capsys.readouterr().err
    shutil.rmtree("runs/a/student")
    assert main(["report", "runs/a"]) == 2
    assert "there is no student in 'runs/a/student'; the run has not finished" in capsys.readouterr().err


def test_help_is_short_and_needs_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--help"]) == 0
    assert "python train.py report runs/A runs/B --out FILE" in capsys.readouterr().out


# ---- what cannot cost a run, or its report


def again(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> int:
    """Go on with `runs/a` for a step, where `act` is called in the chapter on fidelity; give the exit status."""
    figures = Fidelity.figures

    def acting(self: Fidelity, evidence: Any) -> dict[str, Any]:
        act()
        return figures(self, evidence)

    monkeypatch.setattr(Fidelity, "figures", acting)
    return main(["fit", "--config", "runs/a/config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "7"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGUSR1, 0)])
def test_a_signal_stops_the_report_of_a_complete_run_at_once(
    here: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int, status: int
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # which must not be put back into the queue: there is no scontrol here
    assert again(monkeypatch, lambda: os.kill(os.getpid(), number)) == status
    said = capfd.readouterr().err
    assert (
        f"The run is complete; its report was stopped by {signal.Signals(number).name}, write it with: python train.py report runs/a"
        in said
    )
    assert "training stops" not in said
    assert report("a")["steps"] == 7
    assert "sections" not in report("a")
    assert signals.received() == number  # for a run that this one is a part of


def test_a_chapter_that_fails_or_cannot_be_shown_takes_no_other_along(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Unshown(Robustness):
        def figures(self, evidence: Any) -> dict[str, Any]:
            return {"some": 1}

    monkeypatch.setattr("distill.report.whole.all_sections", lambda: [Quality(), Fidelity(), Unshown()])

    def fail() -> None:
        raise KeyError("broken")

    assert again(monkeypatch, fail) == 0
    assert report("a")["sections"]["fidelity"] == {"missing": "this chapter failed: KeyError: 'broken'"}
    assert "models" in report("a")["sections"]["quality"]
    assert "its figures are in report.json, but could not be shown" in Path("runs/a/report.html").read_text()
    assert capsys.readouterr().err.count("Traceback") == 2


def test_a_full_disk_leaves_the_run_and_what_was_there(
    here: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = gather.series.read  # after the models are asked, just before the chapters
    with ExitStack() as full:

        def last(path: Path) -> Any:
            found = read(path)
            full.enter_context(largest_file(2000))
            return found

        monkeypatch.setattr(gather.series, "read", last)
        assert again(monkeypatch, lambda: None) == 0
    said = capsys.readouterr().err
    assert "The run is complete, its report is not: [Errno 27]" in said
    assert "Traceback" not in said
    assert report("a")["steps"] == 7


def test_an_export_that_is_broken_is_named(here: Path, quick: None) -> None:
    for name in ("onnx-int8", "onnx-none", "hf-fp32"):
        folder = Path("runs/a/export", name)
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(b"x")
    assert main(["report", "runs/a"]) == 0
    models = report("a")["sections"]["quality"]["models"]
    for name in ("onnx-int8", "onnx-none", "hf-fp32"):
        assert models[name]["missing"].startswith("it cannot be loaded: ")
    assert "value" in models["student distilled"]["accuracy"]


def _rank(folder: str) -> tuple[int, bool]:
    os.chdir(folder)
    given = ["fit", "--config", "kd.yaml", "--name", "two", "--trainer.devices=2", "--trainer.strategy=ddp", "--watchdog_s=20"]
    status = main(given)
    return status, Path("runs/two/report.html").exists()


@pytest.mark.slow
def test_the_first_of_two_ranks_writes_it_and_the_other_does_not_wait(here: Path) -> None:
    (one, written), (other, _) = run_ranks(_rank, 2, str(here), timeout_s=240)
    assert (one, other, written) == (0, 0, True)
    assert list(report("two")["sections"]) == CHAPTERS[1:]


def test_no_held_out_rows_no_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "kd.yaml", "--name", "none", "--data.val_fraction", "0", "--trainer.max_steps", "1"]) == 0
    assert not Path("runs/none/report.html").exists()
    assert "No validation data, nothing measured" in capsys.readouterr().out


def test_two_rows_and_no_teacher(here: Path, quick: None) -> None:
    given = config() | {"report_rows": 2, "model": {"student": config()["model"]["student"], "losses": {"ce": "CrossEntropy"}}}
    Path("plain.yaml").write_text(yaml.safe_dump(given))
    assert main(["fit", "--config", "plain.yaml", "--name", "plain", "--trainer.max_steps", "1"]) == 0
    sections = report("plain")["sections"]
    assert "trained without a teacher" in sections["quality"]["models"]["teacher"]["missing"]
    assert "missing" in sections["fidelity"]
