import json

import pytest

from distill.data.chat import ChatData
from distill.types import DataError
from tests.data.helpers import EOS, WORDS, A, B, C, D, word_tokenizer

USER, ASSISTANT = WORDS.index("user"), WORDS.index("assistant")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.role }} {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }} <eos>{% endgeneration %}{% else %}{{ m.content }}{% endif %} "
    "{% endfor %}"
)


def turn(role, content):
    return {"role": role, "content": content}


TALK = [turn("user", "a"), turn("assistant", "b c"), turn("user", "d"), turn("assistant", "a")]


def chat(tmp_path, conversations, template=TEMPLATE, **more):
    path, folder = tmp_path / "c.jsonl", tmp_path / "tokenizer"
    path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations))
    word_tokenizer(folder)
    if template is not None:
        (tmp_path / "t.jinja").write_text(template)
        more["chat_template"] = str(tmp_path / "t.jinja")
    data = ChatData(train_data=str(path), tokenizer=str(folder), **{"val_fraction": 0, "pack": False, **more})
    data.setup()
    return data


def test_only_the_assistant_is_trained_on(tmp_path):
    (row,) = chat(tmp_path, [TALK]).train_set.with_format(None).to_list()
    assert row["input_ids"] == [USER, A, ASSISTANT, B, C, EOS, USER, D, ASSISTANT, A, EOS]
    assert row["labels"] == [-100, -100, B, C, EOS, -100, -100, -100, A, EOS, -100]


def test_long_talks_are_cut_and_others_counted(tmp_path):
    data = chat(tmp_path, [TALK, [turn("user", "a a a a"), turn("assistant", "b")], [turn("user", "a")]], max_length=4)
    assert data.skipped == {"the prompt fills all of max_length=4": 1, "nothing to train on": 1}
    assert [row["input_ids"] for row in data.train_set.with_format(None)] == [[USER, A, ASSISTANT, B]]


def test_the_template_goes_with_the_tokenizer(tmp_path):
    assert chat(tmp_path, [TALK]).tokenizer.chat_template == TEMPLATE


def test_no_template(tmp_path):
    with pytest.raises(DataError, match=r"has no chat template; give one as data.chat_template"):
        chat(tmp_path, [TALK], template=None)


def test_a_template_without_generation(tmp_path):
    with pytest.raises(DataError, match=r"does not mark what the assistant says; put {% generation %}"):
        chat(tmp_path, [TALK], template="{% for m in messages %}{{ m.content }}{% endfor %}")


def test_a_span_that_runs_on_to_the_end(tmp_path):
    """Transformers marks all that follows a span whose last character is part of no token: here the user's words too."""
    with pytest.raises(DataError, match=r"marks more than the assistant's turns"):
        chat(tmp_path, [TALK], template=TEMPLATE.replace("<eos>{% endgeneration %}", "<eos> {% endgeneration %}"))


def test_a_template_that_refuses(tmp_path):
    with pytest.raises(DataError, match=r"the chat template refuses .*no system role"):
        chat(tmp_path, [[turn("system", "a"), turn("user", "a")]])


def test_a_missing_template_file(tmp_path):
    with pytest.raises(DataError, match=r"data.chat_template: no file 'nowhere.jinja'"):
        ChatData(train_data="x.jsonl", tokenizer="t", chat_template="nowhere.jinja").setup()


@pytest.mark.parametrize("bad", ["hello", [{"role": "user"}], [{"role": "user", "content": 3}]])
def test_not_a_conversation(tmp_path, bad):
    with pytest.raises(DataError, match=r"row 1: 'messages' must be a list of messages"):
        chat(tmp_path, [bad])
