"""A run on dialogues: answers are learnt, given at the end, shown, and asked for afterwards."""

import io
import json
import sys

import numpy as np
import pytest

from fedspine import Recipe, export, load_model, predict, run
from fedspine.core.errors import BadInput
from fedspine.data.dataset import Dialogue
from fedspine.execution.answers import questions_of
from fedspine.exports import predict as predicting
from fedspine.exports.predict import ChatAnswer
from fedspine.lm.decoding import Decoding
from fedspine.lm.dialogues import PLAIN, encode_dialogues, prompt_ids
from fedspine.lm.tiny import write_tiny
from fedspine.methods import find
from fedspine.runs.assemble import assemble
from fedspine.ui import chat, cli

POSITIONS = 128  # of the tiny model
WORDS = ("the", "good", "bad", "small", "very", "not", "of", "to", "in", "is")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    write_tiny(folder / "model", "llama")
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": " ".join(rng.choice(WORDS, n % 4 + 1)), "completion": "not very good"}
        for n in range(40)
    ]
    rows += [{"prompt": "good " * 40, "completion": "bad"}] * 5  # which fill the window
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(place, **changed):
    settings = {
        "method": find("fedspine").toy(),
        "model": str(place / "model"),
        "data": str(place / "rows.jsonl"),
        "kind": "causal-lm",
        "max_tokens": 32,
        "pack": True,
        "devices": 2,
        "per_round": 2,
        "rounds": 2,
        "answers": 3,
        "answer_tokens": 5,
        "precision": "fp32",
        "workers": 1,
    }
    return Recipe(**settings | changed)


@pytest.fixture(scope="module")
def result(place):
    return run(recipe(place), place / "run")


def records(result, kind):
    rows = map(json.loads, (result.folder / "records.jsonl").read_text().splitlines())
    return [row for row in rows if row["row"] == kind]


def test_models_answer_at_the_end(result):
    assert result.summary["answers"] == 3
    scores = result.summary["answer_scores"]
    assert list(scores) == ["untuned", "unpruned", "pruned"]
    rows = records(result, "answer")
    assert len(rows) == 3 and {row["reference"] for row in rows} == {"not very good"}
    for row in rows:
        assert list(row["answers"]) == list(scores) and row["prompt"]
    assert all(0 <= each["rouge_l"] <= 1 for each in scores.values())
    page = result.report.read_text()
    assert "<h2>Answers</h2>" in page and "not very good" in page and "ROUGE-L" in page


@pytest.fixture(scope="module")
def exported(result, place):
    export(result, place / "exported", device="global")
    return place / "exported"


def test_the_exported_model_answers(result, exported, capsys, monkeypatch):
    loaded = load_model(exported)
    assert loaded.chat and loaded.tokenizer.chat_template == PLAIN
    rows = records(result, "answer")
    found = predict(loaded, [row["prompt"] for row in rows], new_tokens=5)
    assert [each.answer for each in found] == [row["answers"]["pruned"] for row in rows]
    assert all(isinstance(each, ChatAnswer) for each in found)
    assert predict(loaded, ["good"], temperature=2.0, seed=1, new_tokens=5) == predict(
        loaded, ["good"], temperature=2.0, seed=1, new_tokens=5
    )

    asked = []
    write = predicting.written

    def watched(module, prompts, *others, **options):
        asked.append(prompts[0])
        return write(module, prompts, *others, **options)

    monkeypatch.setattr(predicting, "written", watched)
    decoding = Decoding(new_tokens=5)
    chat.converse(loaded, ["good\n", "bad\n", "\n", "bad\n"], decoding)
    first, second, third = capsys.readouterr().out.splitlines()
    said = [("user", "good"), ("assistant", first.strip()), ("user", "bad")]
    assert asked[1] == prompt_ids(loaded.tokenizer, said)
    assert asked[2] == prompt_ids(loaded.tokenizer, said[2:])  # after an empty line
    chat.answer_each(loaded, ["bad"], decoding)
    assert capsys.readouterr().out.splitlines() == [third]
    assert second

    # what the model has no positions for is forgotten, the oldest first
    long = [("user", "good " * 125), ("assistant", "bad"), ("user", "bad")]
    predicting.answered(loaded, long, decoding)
    assert asked[-1] == asked[2]
    with pytest.raises(BadInput, match="shorten it"):
        predicting.answered(loaded, [("user", "good " * 130)], decoding)

    # answers leave half of the positions to the dialogue, unless fewer tokens are asked for
    assert predicting.decoding_for(loaded, None, 0.0, 0).new_tokens == POSITIONS // 2
    assert predicting.decoding_for(loaded, POSITIONS - 1, 0.0, 0).new_tokens == POSITIONS - 1
    with pytest.raises(BadInput, match="has 128 positions .* at most 127"):
        predict(loaded, ["good"], new_tokens=POSITIONS)


def test_answers_at_the_end_fit_the_positions(place):
    with pytest.raises(BadInput, match="answer_tokens is 97, .* 96 after a prompt"):
        run(recipe(place, answer_tokens=97), place / "too-long")


@pytest.fixture
def chatting(exported, capsys, monkeypatch):
    """A function that gives `fedspine predict` arguments and what is typed: what it wrote, and the
    lines of its errors.
    """

    def told(*arguments, typed=b"", code=0, terminal=False):
        words = ["fedspine", "predict", str(exported), *arguments, "--tokens", "5"]
        stdin = io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8")
        stdin.isatty = lambda: terminal
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert (left.value.code or 0) == code
        said = capsys.readouterr()
        return said.out, said.err.splitlines()

    return told


def test_lines_that_cannot_be_read(chatting):
    """What came before is answered; a terminal's dialogue goes on."""
    good, _ = chatting("good")
    assert chatting(typed=b"\xef\xbb\xbfgood\r\n") == (good, [])  # a mark of editors
    out, (line,) = chatting(typed=b"good\n\xff\xfe\n", code=2)
    assert out == good and "line 2 of the standard input is not UTF-8" in line
    out, (line,) = chatting(typed="good".encode("utf-16"), code=2)
    assert not out and "line 1 of the standard input is not UTF-8" in line
    _, (line,) = chatting(typed=b"good " * 130 + b"\ngood\n", code=2)
    assert "shorten it" in line
    out, (line,) = chatting(typed=b"good " * 130 + b"\n\ngood\n", terminal=True)
    assert out == f"> > > {good}> \n" and "shorten it" in line


def test_the_command_answers_and_keeps_a_dialogue(chatting):
    def said(*arguments, typed=b""):
        return chatting(*arguments, typed=typed)[0]

    whole = json.loads(said("good", "bad", "--json"))["predictions"]
    texts = [each["answer"] for each in whole]
    assert any(texts)
    assert said("good", "bad").splitlines() == said(typed=b"good\n\nbad\n").splitlines()
    assert [line.strip() for line in said("good", "bad").splitlines()] == texts
    assert said("bad", "--temperature", "5", "--seed", "1") != said("bad")


def test_prompts_that_fill_the_window_are_counted(place):
    assembled = assemble(recipe(place))
    assert "5 of 45 rows are left out: their prompts fill task.max_tokens = 32" in assembled.remarks
    assert assembled.task.train.positions is not None
    assert sum(map(len, assembled.shares)) == len(assembled.task.train) < 36


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"method": find("mergesfl").toy()}, "task.pack is for methods that tune adapters"),
        ({"loss_on": "texts"}, r"run.answers is 3, but the rows of \S+ are not prompts"),
        ({"devices": 36}, r"device \S+ has no row whose prompt leaves room .* = 32; raise it"),
    ],
    ids=["split", "no answers", "no room"],
)
def test_what_cannot_be_is_one_line(place, changed, said):
    with pytest.raises(BadInput, match=said):
        run(recipe(place, **changed), place / "never")
    assert not (place / "never").exists()


def test_each_row_of_a_dialogue_has_its_own_question(place):
    tokenizer = assemble(recipe(place, pack=False)).tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}[SEP]{% endfor %}"
        "{% if add_generation_prompt %}(at) {% endif %}"
    )
    said = Dialogue(
        (("user", "good"), ("assistant", "bad"), ("user", "of"), ("assistant", "to the"))
    )
    test = encode_dialogues(tokenizer, [said], 32)
    questions = questions_of(test, [said], np.arange(2), tokenizer)
    found = [(each.prompt, each.reference) for each in questions]
    assert found == [("good", "bad"), ("of", "to the")]
