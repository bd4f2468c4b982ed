"""Messages of the parser, shortened. The strings are jsonargparse's own; `test_command` holds the same through the real parser."""

import pytest

from distill.usage import explain, our_classes

KEYS = ["trainer.max_steps", "model.losses", "logger", "data"]

CASES = [
    ("unrecognized arguments: --trainer.max_stps=3", "does not accept option 'trainer.max_stps'. Did you mean 'trainer.max_steps'?"),
    ("Subcommand 'fit' does not accept option 'loger'", "does not accept option 'loger'. Did you mean 'logger'?"),
    (
        "the following arguments are required: fit.model.student",
        "these keys have no value: model.student; give a config, e.g. --config kd_llama.yaml",
    ),
    (
        "Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: many",
        "trainer.max_steps: must be of type int; got 'many'",
    ),
    (
        "Parser key \"logger\":\n  Expected a typing.Literal['jsonl', 'wandb']. Got value: wandbb",
        "logger: must be one of jsonl, wandb; got 'wandbb'. Did you mean 'wandb'?",
    ),
    (
        "Parser key \"model.losses\":\n  Option 'temprature' is not accepted",
        "model.losses: does not accept option 'temprature'. Did you mean 'temperature'?",
    ),
    (
        "Parser key \"model.losses\":\n  Problem with given class_path 'my.Mine':\n    No module named 'my'",
        "model.losses: cannot use 'my.Mine': No module named 'my'",
    ),
    (
        'Parser key "rows":\n  Not of type PositiveInt: 0 does not conform to restriction v>0',
        "rows: must be a whole number of at least 1; got '0'",
    ),
    (
        "Parser key \"rows\":\n  Not of type PositiveInt: invalid literal for int() with base 10: 'many'",
        "rows: must be a whole number of at least 1; got 'many'",
    ),
    (
        'Parser key "group_size":\n  Does not validate against any of the Union subtypes\n'
        "  Subtypes: [<class 'jsonargparse.typing.PositiveInt'>, typing.Literal['row'], <class 'NoneType'>]\n"
        "  Errors:\n    - Not of type PositiveInt: does not conform to restriction v>0\n    - Expected a typing.Literal['row']\n"
        "    - Expected a <class 'NoneType'>\n  Given value type: <class 'str'>\n  Given value: 0",
        "group_size: must be a whole number of at least 1 or row; got '0'",
    ),
    ("something nobody\n  has seen", "something nobody has seen"),
]


@pytest.mark.parametrize(("message", "said"), CASES)
def test_one_line_with_key_value_and_fix(message: str, said: str) -> None:
    assert explain(message, KEYS) == said


def test_an_unknown_class_offers_ours() -> None:
    said = explain('Parser key "model.losses":\n  Expected a dot import path string: FowardKL', KEYS)
    assert said.startswith("model.losses: no class 'FowardKL'. Did you mean 'ForwardKL'?")


def test_every_concrete_class_is_found_and_no_abstract_one() -> None:
    names = {cls.__name__ for cls in our_classes()}
    assert {
        "ForwardKL",
        "CrossEntropy",
        "OnlineTeacher",
        "FromConfig",
        "Pretrained",
        "LoRA",
        "FixedWeights",
        "AdamW",
        "StdlibText",
    } <= names
    assert not {"TokenLoss", "Divergence", "Teacher", "Student", "DistillData"} & names
