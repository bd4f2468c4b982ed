from jsonargparse import ArgumentParser

from distill.data.base import DistillData
from distill.data.embedded import StdlibText  # noqa: F401
from distill.data.language import bos
from tests.data.helpers import BOS, word_tokenizer


def test_yaml_knows_every_option_by_the_short_class_name():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DistillData, "data")
    options = ["train_data=a.txt", "tokenizer=t", "max_length=64", "pack=false", "batch_size=3", "num_workers=1", "text=body"]
    config = parser.parse_args(["--data=TextData", *(f"--data.{option}" for option in options)])
    data = parser.instantiate_classes(config).data
    assert (data.max_length, data.pack, data.batch_size, data.num_workers, data.text) == (64, False, 3, 1, "body")
    config = parser.parse_args(["--data=StdlibText", "--data.vocab_size=300", "--data.seed=4"])
    assert parser.instantiate_classes(config).data.seed == 4


def test_bos(tmp_path):
    from transformers import AutoTokenizer

    assert bos(AutoTokenizer.from_pretrained(word_tokenizer(tmp_path / "a"))) == []
    assert bos(AutoTokenizer.from_pretrained(word_tokenizer(tmp_path / "b", bos=True))) == [BOS]
