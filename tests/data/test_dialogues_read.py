"""Rows with prompts and answers, read as dialogues whose answers are trained on."""

import json

import pytest

from fedspine.core.errors import BadInput
from fedspine.data.tasks import load, load_stated, remarks
from fedspine.runs import read_data
from fedspine.runs.config import Recipe
from fedspine.runs.task_record import record_of

ASK, TELL = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be kind."}
ONE = (("user", "Hi"), ("assistant", "Hello."))


def written(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path, **options):
    return load(path, kind="causal-lm", answers=True, **options)


CASES = {  # a row, and its messages
    "messages": ({"messages": [ASK, TELL]}, ONE),
    "messages up to the last answer": (
        {"messages": [SYSTEM, ASK, TELL, ASK]},
        (("system", "Be kind."), *ONE),
    ),
    "prompt and completion": ({"prompt": "Hi", "completion": "Hello."}, ONE),
    "both of messages": ({"prompt": [ASK], "completion": [TELL]}, ONE),
    "a number": ({"prompt": "2 + 2", "completion": 4}, (("user", "2 + 2"), ("assistant", "4"))),
    "instruction and response": ({"instruction": "Hi", "response": "Hello."}, ONE),
    "with context": (
        {"instruction": "Sum up.", "context": "A. B.", "response": "AB.", "label": 3},
        (("user", "Sum up.\n\nA. B."), ("assistant", "AB.")),
    ),
    "prompt and answer": ({"prompt": "Hi", "answer": "Hello."}, ONE),
    "question and answer": ({"question": "Hi", "answer": "Hello."}, ONE),
    "as Alpaca": (
        {"instruction": "Sum up.", "input": "A. B.", "output": "AB."},
        (("user", "Sum up.\n\nA. B."), ("assistant", "AB.")),
    ),
    "with an empty context": ({"instruction": "Hi", "context": " ", "response": "Hello."}, ONE),
}


@pytest.mark.parametrize("name", CASES)
def test_each_form_is_a_dialogue(tmp_path, name):
    row, messages = CASES[name]
    data = read(written(tmp_path, [row] * 5))
    for split in (data.train, data.test):
        assert {dialogue.messages for dialogue in split.dialogues} == {messages}
        assert len(split.dialogues) == len(split)
    texts = load(written(tmp_path, [row] * 5), kind="causal-lm")
    assert texts.train.dialogues is None and messages[-1][1] in texts.train.texts[0]


def test_a_named_column_of_messages_and_one_of_texts(tmp_path):
    path = written(tmp_path, [{"talk": [ASK, TELL]}] * 5)
    assert read(path, text="talk").train.dialogues[0].messages == ONE
    path = written(tmp_path, [{"text": "a", "messages": [ASK, TELL]}] * 5)
    assert read(path).train.dialogues is None


def test_half_a_dialogue_is_left_out_and_counted(tmp_path):
    rows = [{"prompt": "Hi", "completion": "Hello."}] * 8
    rows += [{"prompt": "Hi", "completion": ""}, {"prompt": None, "completion": "Hello."}]
    data = read(written(tmp_path, rows))
    assert data.left_out == {"no answer": 1, "no prompt": 1}
    assert remarks(data) == ("2 of 10 rows are left out: 1 with no answer, 1 with no prompt",)


def test_messages_with_other_keys_are_not_empty_ones(tmp_path):
    path = written(tmp_path, [{"messages": [{"from": "human", "value": "Hi"}]}] * 5)
    with pytest.raises(BadInput, match=r"row 1 of the train set, found \[\{.*write a message as"):
        read(path)


@pytest.mark.parametrize(
    "row", [{"prompt": "", "completion": " "}, {"prompt": None}, {"completion": []}], ids=str
)
def test_a_row_of_nothing_is_refused_by_its_number(tmp_path, row):
    path = written(tmp_path, [{"prompt": "Hi", "completion": "Hello."}] * 2 + [row])
    with pytest.raises(BadInput, match=r"answer in row 3 of the train set, found both empty"):
        read(path)


def test_a_recipe_says_what_is_learnt(tmp_path):
    path = written(tmp_path, [{"prompt": f"Hi {n}", "completion": "Hello."} for n in range(9)])
    digests = []
    for loss_on in ("answers", "texts"):
        recipe = Recipe(method="fedlora", data=path, kind="causal-lm", model="x", loss_on=loss_on)
        data = read_data.dataset(recipe)
        assert (data.train.dialogues is None) == (loss_on == "texts")
        record = record_of(recipe, data)
        assert record.of_dialogues == (loss_on == "answers")
        digests.append(record.data_sha256)
    assert digests[0] != digests[1]
    rows = load_stated(path, kind="causal-lm", label_names=(), answers=True)
    assert len(rows.dialogues) == 9


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "classification"}, "task.pack puts several texts in one row"),
        ({"kind": "causal-lm", "privacy": {"epsilon": 8.0, "delta": 1e-5}}, "counts single rows"),
    ],
    ids=["classes", "privacy"],
)
def test_packing_where_it_has_no_place_is_refused(settings, said):
    with pytest.raises(BadInput, match=said):
        Recipe(method="fedlora", pack=True, **settings)
