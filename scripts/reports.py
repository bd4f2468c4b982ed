"""The three runs whose reports the README shows: a language model, a classifier, and a student of 4-bit weights; no network.

    python scripts/reports.py [--only bert] [--screenshots docs]

Runs `kd_llama.yaml`, `kd_bert.yaml` and `kd_llama_qat.yaml` (what is in `runs/` already is not trained again), exports the last one's
student, and makes its report once more with the exports. The texts for `kd_bert.yaml` are functions of Python's standard library, to
be told apart by the package they come from; its teacher and student are BERTs made from a configuration. `--screenshots` draws each
report with Chromium, which must be installed, as must the package playwright.
"""

import argparse
import ast
import csv
import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from tokenizers import BertWordPieceTokenizer
from transformers import BertTokenizer

ROOT = Path(__file__).parents[1]
PACKAGES = ("asyncio", "ctypes", "email", "http", "importlib", "json", "logging", "multiprocessing", "tkinter", "unittest", "urllib", "xml")
BERT = {"model_type": "bert", "vocab_size": 4096, "max_position_embeddings": 128}
TEACHER = BERT | {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
STUDENT = BERT | {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
LENGTH = 64
RELATION_HEADS = 4  # of the relations between queries and keys; kd_bert.yaml has 16, of wider models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["llama", "bert", "qat"], default=None)
    parser.add_argument("--screenshots", type=Path, default=None, help="folder for a picture of each report")
    args = parser.parse_args()
    wanted = [args.only] if args.only else ["llama", "bert", "qat"]
    for name in wanted:
        {"llama": llama, "bert": bert, "qat": qat}[name]()
        if args.screenshots:
            screenshots(Path(f"runs/report-{name}/report.html"), args.screenshots / f"report-{name}")


def llama() -> None:
    """The demo."""
    fit("llama", "--config", "kd_llama.yaml")


def bert() -> None:
    """A classifier."""
    folder = Path("runs/experiments/packages")
    make_texts(folder)
    recipe = yaml.safe_load((ROOT / "configs" / "teacher_bert.yaml").read_text(encoding="utf-8"))
    recipe |= {"name": "teacher_packages"}
    recipe["model"]["student"] = {"class_path": "FromConfig", "init_args": {"config": TEACHER}}
    recipe["model"]["optimizer"]["init_args"]["lr"] = 1e-3  # from nothing, where the recipe fine-tunes
    recipe["trainer"]["max_epochs"] = 8
    recipe["data"]["init_args"] |= texts(folder) | {"max_length": LENGTH}
    (folder / "teacher.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    data = [f"--data.{key}={value}" for key, value in texts(folder).items()] + [f"--data.max_length={LENGTH}"]
    teacher = ["--model.teacher.model=runs/teacher_packages/student", f"--model.teacher.recipe={folder / 'teacher.yaml'}"]
    student = ["--model.student=FromConfig", f"--model.student.config={json.dumps(STUDENT)}", "--model.optimizer.lr=1e-3"]
    fit(
        "bert",
        "--config",
        "kd_bert.yaml",
        "--baseline=true",
        f"--model.losses.relations.relation_heads={RELATION_HEADS}",
        *data,
        *teacher,
        *student,
    )


def qat() -> None:
    """A compressed student, and what is shipped of it."""
    fit("qat", "--config", "kd_llama_qat.yaml")
    config = "runs/report-qat/config.yaml"
    if not Path("runs/report-qat/export").exists():
        run("export", "--config", config, "--format", "[packed:bf16,onnx:int8]")
        report(config)


def fit(name: str, *args: str) -> None:
    """Train, unless the run is there; its report at the end is timed."""
    if not Path(f"runs/report-{name}/report.json").is_file():
        run("fit", *args, f"--name=report-{name}", "--report_rows=0")
    if not Path(f"runs/report-{name}/report.html").is_file():
        report(f"runs/report-{name}/config.yaml")


def report(config: str) -> None:
    """Make a report, and say how long it took."""
    start = time.perf_counter()
    run("report", "--config", config, "--report_rows=512")
    print(f"{Path(config).parent}: its report took {time.perf_counter() - start:.0f} s, the start of the process included", flush=True)


def run(*args: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "train.py"), *args], check=True)


def texts(folder: Path) -> dict[str, str]:
    """The keys of `data`."""
    return {"train_data": str(folder / "train.tsv"), "val_data": str(folder / "val.tsv"), "tokenizer": str(folder / "tokenizer")}


def make_texts(folder: Path) -> None:
    """Write functions with the package that each comes from, and a tokenizer made of the training part; a fifth is held out."""
    if (folder / "tokenizer").is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "val": []}
    for package in PACKAGES:
        home = Path(sysconfig.get_path("stdlib"))
        for file in sorted((home / package).rglob("*.py")):
            place = file.relative_to(home)
            if {"test", "tests"} & set(place.parts):
                continue
            for text in functions(file):
                rows["val" if hashlib.sha256(text.encode()).digest()[0] < 51 else "train"].append((text, package))
    for name, part in rows.items():
        with (folder / f"{name}.tsv").open("w", encoding="utf-8", newline="") as out:
            csv.writer(out, delimiter="\t").writerows([("text", "label"), *part])
    print(f"{folder}: {len(rows['train']):,} functions to train on, {len(rows['val']):,} held out, of {len(PACKAGES)} packages", flush=True)
    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator([text for text, _ in rows["train"]], vocab_size=BERT["vocab_size"], show_progress=False)
    made = folder / "making"
    made.mkdir(exist_ok=True)
    pieces.save_model(str(made))
    BertTokenizer(str(made / "vocab.txt"), model_max_length=128).save_pretrained(folder / "tokenizer")
    shutil.rmtree(made)


def functions(file: Path) -> Iterator[str]:
    """The source of every function of a file, on one line, without what is longer than a few hundred characters."""
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join(" ".join(lines[node.lineno - 1 : node.end_lineno]).split())
            if len(text) > 40:
                yield text[:400]


def screenshots(page: Path, out: Path) -> None:
    """Draw a report as a desk and a phone show it."""
    from playwright.sync_api import sync_playwright

    out.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for suffix, width, height in (("", 1440, 1600), ("-phone", 390, 1600)):
            tab = browser.new_page(viewport={"width": width, "height": height})
            tab.goto(page.resolve().as_uri())
            tab.screenshot(path=f"{out}{suffix}.png")
        browser.close()


if __name__ == "__main__":
    main()
