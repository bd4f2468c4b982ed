"""Make the story experiment's folder from a published Llama of 260,032 parameters and samples that it wrote.

    python scripts/experiments/make_stories.py --source ../shared/data/stories260K --out runs/experiments/stories

The source holds `hf/` (the model) and `teacher_samples_int16.npy` (`[rows, 192]` tokens). The model's tokens have no tokenizer of
transformers, so one is made whose text is the tokens' numbers: `<s> t403 t287 …`; nothing but their identity matters here.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

HELD_OUT = 192  # rows of the 1,792
# special tokens are found inside words too: one called t1 would be cut out of t12
NAMES = {0: "<unk>", 1: "<s>", 2: "</s>"} | {i: f"t{i}" for i in range(3, 512)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("../shared/data/stories260K"))
    parser.add_argument("--out", type=Path, default=Path("runs/experiments/stories"))
    args = parser.parse_args()
    teacher = args.out / "teacher"
    shutil.copytree(args.source / "hf", teacher, dirs_exist_ok=True, copy_function=shutil.copyfile)
    words = Tokenizer(WordLevel({name: i for i, name in NAMES.items()}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(teacher)
    rows = np.load(args.source / "teacher_samples_int16.npy")
    for name, part in (("val", rows[:HELD_OUT]), ("train", rows[HELD_OUT:])):
        lines = [json.dumps({"text": " ".join(NAMES[int(token)] for token in row)}) for row in part]
        (args.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{args.out}: teacher, {len(rows) - HELD_OUT} rows to train on, {HELD_OUT} held out")


if __name__ == "__main__":
    main()
