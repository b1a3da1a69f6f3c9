"""Rows of every form become samples, and what cannot is named by its row."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
import transformers as hf
from audits import options, run, sentences, tokenizer, write_rows

import influence_fast as inf
from influence_fast.data.loading import read_table
from influence_fast.data.samples import Samples, prepare, task_of
from influence_fast.data.settings import DataSettings

CHAT = "{% for m in messages %}w0 {{ m.content }} w1 {% endfor %}{% if add_generation_prompt %}w0 {% endif %}"


def made(rows: list[dict], model: torch.nn.Module | str = "causal", **settings: object) -> Samples:
    network = CAUSAL if model == "causal" else model
    given = DataSettings(**settings)
    words = tokenizer()
    words.chat_template = CHAT
    table = read_table("train", rows)
    return prepare("train", table, given, task_of("auto", network, table, given.label), network, words)


def causal() -> torch.nn.Module:
    return models.make("llama", "causal")


CAUSAL = causal()


def words(samples: Samples, row: int = 0) -> tuple[str, str]:
    """Inputs, and targets with _ for the others."""
    encode = tokenizer()
    inputs, labels = samples.rows[row]["input_ids"], samples.rows[row]["labels"]
    shown = [
        encode.convert_ids_to_tokens(token) if label != -100 else "_"
        for token, label in zip(inputs, labels, strict=True)
    ]
    return " ".join(encode.convert_ids_to_tokens(inputs)), " ".join(shown)


def test_causal_models_with_prompt_and_answer(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "w1 w2", "answer": f" w{i % 7} w{i}"} for i in range(12)]
    data = write_rows(tmp_path / "train.jsonl", rows)
    changed = options(folder, model=folder / "causal", train=data, queries=data, answer_column="answer")
    code, _, err = run("audit", *changed, "--layers", "attention[1]", "--out", tmp_path / "a")
    assert code == 0, err
    assert json.loads((tmp_path / "a" / "stores" / "train" / "manifest.json").read_text())["loss"] == "causal-lm"


def test_truncation_when_told(folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "long.jsonl", [*sentences(20, 1), {"text": "w1 " * 50, "label": 0, "noise": False}])
    code, _, err = run("audit", *options(folder, train=data), "--truncate", "--layers", "head", "--out", tmp_path / "a")
    assert code == 0, err


FORMS = {
    "prompt": (
        {"prompt": "w2", "completion": "w3"},
        "answer: 'prompt', targets in 'completion'",
        "w2 w3",
        "_ w3",
    ),
    "question": ({"question": "w2", "answer": "w3 w4"}, "targets in 'answer'", "w2 w3 w4", "_ w3 w4"),
    "number": ({"question": "w2", "answer": 7}, "targets in 'answer'", "w2 [UNK]", "_ [UNK]"),
    "text": ({"text": "w2 w3"}, "text: 'text'", "w2 w3", "w2 w3"),
    "messages": (
        {"messages": [{"role": "user", "content": "w2"}, {"role": "assistant", "content": "w3"}]},
        "chat: 'messages'",
        "w0 w2 w1 w0 w3 w1",
        "_ _ _ _ w3 w1",
    ),
    "messages as text": (
        {"messages": '[{"role": "user", "content": "w2"}, {"role": "assistant", "content": "w3"}]'},
        "chat: 'messages'",
        "w0 w2 w1 w0 w3 w1",
        "_ _ _ _ w3 w1",
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "w2"}, {"from": "gpt", "value": "w3"}]},
        "chat: 'conversations'",
        "w0 w2 w1 w0 w3 w1",
        "_ _ _ _ w3 w1",
    ),
    "conversational": (
        {"prompt": [{"role": "user", "content": "w2"}], "completion": [{"role": "assistant", "content": "w3"}]},
        "prompt and answer",
        "w0 w2 w1 w0 w3 w1",
        "_ _ _ _ w3 w1",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_language_models(form: str) -> None:
    row, recognised, inputs, targets = FORMS[form]
    samples = made([row, row])
    assert recognised in samples.form
    assert words(samples) == (inputs, targets)


def test_instructions_with_and_without_input() -> None:
    rows = [
        {"instruction": "w2", "input": "", "output": "w3"},
        {"instruction": "w2", "input": "w4", "output": "w3"},
    ]
    samples = made(rows)
    assert samples.form == "instruction: 'instruction' and 'input', targets in 'output'"
    for row in (0, 1):
        assert words(samples, row)[1].split()[-1] == "w3"
        assert words(samples, row)[1].split()[-2] == "_"
        assert ("w4" in words(samples, row)[0]) == bool(row)
    assert words(made(rows, as_chat=True), 1) == ("w0 w2 w4 w1 w0 w3 w1", "_ _ _ _ _ w3 w1")


def test_pairs_of_answers() -> None:
    rows = [
        {"prompt": "w2", "chosen": "w3", "rejected": "w4 w5"},
        {"prompt": "w2", "chosen": "w6", "rejected": "w7"},
    ]
    samples = made(rows)
    assert (samples.task, samples.form) == ("preference", "preference: 'prompt' and 'chosen' and 'rejected'")
    encode = tokenizer()
    assert [encode.decode(ids) for ids in samples.rows[0]["input_ids"]] == ["w2 w3", "w2 w4 w5"]
    assert [labels[:2].count(-100) for labels in samples.rows[0]["labels"]] == [1, 1]
    # Without a prompt it is what both begin with; of conversations the last turn is what counts.
    bare = made([{"chosen": "w2 w1 w3", "rejected": "w2 w1 w4"}])
    assert [labels.count(-100) for labels in bare.rows[0]["labels"]] == [2, 2]
    talks = [[{"role": "user", "content": "w2"}, {"role": "assistant", "content": word}] for word in ("w3", "w4")]
    chat = made([{"chosen": talks[0], "rejected": talks[1]}])
    assert [encode.decode(ids) for ids in chat.rows[0]["input_ids"]] == ["w0 w2 w1 w0 w3 w1", "w0 w2 w1 w0 w4 w1"]
    assert [labels.count(-100) for labels in chat.rows[0]["labels"]] == [4, 4]
    # Turns that both share are context, whoever spoke.
    longer = [
        [*talks[0], {"role": "user", "content": "w5"}, {"role": "assistant", "content": word}] for word in ("w6", "w7")
    ]
    chat = made([{"chosen": longer[0], "rejected": longer[1]}])
    assert [len(labels) - labels.count(-100) for labels in chat.rows[0]["labels"]] == [2, 2]
    with pytest.raises(inf.InputError, match="row 0 has the same text in 'chosen' and 'rejected'"):
        made([{"prompt": "w2", "chosen": "w3", "rejected": "w3"}])


def test_blocks_of_texts() -> None:
    samples = made([{"text": "w2 w3 w4"}, {"text": "w5 w6"}, {"text": "w7 w8 w9"}], block_size=5)
    assert samples.form == "text: 'text', 3 texts packed into 2 blocks of 5 tokens"
    assert [row["position_ids"] for row in samples.rows] == [[0, 1, 2, 0, 1], [0, 1, 2]]
    with pytest.raises(inf.InputError, match="block_size: the model takes 40 tokens, got 41"):
        made([{"text": "w2 w3"}], block_size=41)


def classifier(**config: object) -> torch.nn.Module:
    base = {"vocab_size": models.VOCAB, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    base |= {"intermediate_size": 8, "max_position_embeddings": 40, "num_labels": 3}
    return hf.BertForSequenceClassification(hf.BertConfig(**{**base, **config}))


@pytest.mark.parametrize(
    ("row", "settings", "labels"),
    [
        ({"sentence1": "w2", "sentence2": "w3", "label": 1}, {}, 1),
        ({"review": "w2", "stars": "2"}, {}, 2),
        ({"a": "w2", "b": "w3", "c": "w4", "y": 0}, {"text": "a,b,c", "label": "y"}, 0),
        ({"text": 5, "label": 1.0}, {}, 1),
        ({"text": "w2", "label": "yes"}, {"label_names": ["no", "maybe", "yes"]}, 2),
    ],
)
def test_texts_with_a_label(row: dict, settings: dict, labels: int) -> None:
    samples = made([row, row], classifier(), **settings)
    assert [row["labels"] for row in samples.rows] == [labels] * 2
    assert samples.labels == (["yes"] * 2 if "label_names" in settings else [labels] * 2)


def test_several_labels_and_numbers() -> None:
    several = classifier(problem_type="multi_label_classification", id2label={0: "a", 1: "b", 2: "c"})
    samples = made([{"text": "w2", "label": ["a", "c"]}, {"text": "w3", "label": []}], several)
    assert (samples.task, samples.labels) == ("multi-label", ["a, c", ""])
    assert [row["labels"] for row in samples.rows] == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    columns = made([{"text": "w2", "x": 1, "y": "0", "z": 1}], several, label="x,y,z")
    assert columns.rows[0]["labels"] == [1.0, 0.0, 1.0]
    number = made([{"text": "w2", "score": "0.5"}, {"text": "w3", "score": 2}], classifier(num_labels=1), label="score")
    assert (number.task, number.labels) == ("regression", [0.5, 2.0])


def test_tags_of_words() -> None:
    config = classifier(id2label={0: "O", 1: "B-PER", 2: "I-PER"}).config
    model = hf.BertForTokenClassification(config)
    rows = [{"tokens": ["w2", "w3"], "ner_tags": [1, 2]}, {"tokens": ["w4", "w5"], "ner_tags": ["O", "B-PER"]}]
    samples = made(rows, model)
    assert (samples.task, samples.form) == ("token-classification", "words and tags: 'tokens', targets in 'ner_tags'")
    assert [row["labels"] for row in samples.rows] == [[1, 2], [0, 1]]
    with pytest.raises(inf.InputError, match="row 0 has 2 words in 'tokens' and 1 tags in 'ner_tags'"):
        made([{"tokens": ["w2", "w3"], "ner_tags": [1]}], model)


def test_inputs_and_outputs_of_seq2seq() -> None:
    config = hf.T5Config(vocab_size=models.VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = hf.T5ForConditionalGeneration(config)
    for row in (
        {"source": "w2", "target": "w3"},
        {"translation": {"de": "w2", "en": "w3"}},
        {"document": "w2", "summary": "w3"},
    ):
        samples = made([row], model)
        assert samples.rows == [{"input_ids": [4], "labels": [5]}]


PROBLEMS = [
    ({"text": "w2", "label": None}, "row 2 has no label"),
    ({"text": "w2", "label": float("nan")}, "row 2 has no label"),
    ({"text": "w2", "label": 7}, "row 2 has label 7, expected an int from 0 to 2"),
    ({"text": None, "label": 1}, "row 2 has no text in 'text'"),
    ({"text": "  ", "label": 1}, "row 2 has an empty text in 'text'"),
    ({"text": float("nan"), "label": 1}, "row 2 has no text in 'text'"),
    ({"text": True, "label": 1}, "row 2 has a bool in 'text', expected text"),
    ({"text": "w2 " * 50, "label": 1}, "row 2 has 50 tokens, the model takes 40"),
]


@pytest.mark.parametrize(("row", "message"), PROBLEMS)
def test_rows_with_a_problem_are_named_or_left_out(row: dict, message: str) -> None:
    good = {"text": "w2", "label": 1}
    with pytest.raises(inf.InputError, match=message):
        made([good, good, row, good], classifier())
    samples = made([good, good, row, good], classifier(), skip_bad=True)
    assert samples.ids == [0, 1, 3]
    assert str(samples.skipped[0]).startswith(message)
    with pytest.raises(inf.InputError, match="2 of 2 rows have a problem"):
        made([row, row], classifier(), skip_bad=True)


def test_files_and_lines_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"w2\nw3",1\nw4,\nw5,x\n')
    with pytest.raises(
        inf.InputError, match=r"2 of 3 rows.*row 1 \(a.csv, line 4\) has no label; row 2 \(a.csv, line 5\) has"
    ):
        made(tmp_path / "a.csv", classifier())


@pytest.mark.parametrize("column", ["q", "a"])
def test_a_missing_prompt_or_answer_is_never_scored(column: str) -> None:
    row = {"q": "w2", "a": "w3"}
    with pytest.raises(inf.InputError, match=f"row 1 has no text in '{column}'"):
        made([row, {**row, column: None}], text="q", answer="a")


def test_prompts_that_fill_the_context() -> None:
    with pytest.raises(inf.InputError, match="row 0 has no target token: its prompt fills"):
        made([{"prompt": "w2 " * 50, "completion": "w3"}], truncate=True)
    assert words(made([{"prompt": "w2 " * 39, "completion": "w3 w4"}], truncate=True))[1].split()[-1] == "w3"


def test_ids_and_flags_are_as_written(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text,label,bad\n007,w2,1,True\n08,w3,0,no\n")
    samples = made(tmp_path / "a.csv", classifier(), noise="bad")
    assert (samples.ids, samples.noise.tolist()) == (["007", "08"], [True, False])
    with pytest.raises(inf.InputError, match="row 1 has id None"):
        made([{"id": 1, "text": "w2", "label": 1}, {"id": None, "text": "w2", "label": 1}], classifier())


def test_columns_that_are_not_there() -> None:
    for settings, message in (
        ({"text": "body"}, "has no column 'body'; there are text, label"),
        ({"label": "y"}, "has no column 'y'; there are text, label"),
        ({"noise": "bad"}, "has no column 'bad'"),
    ):
        with pytest.raises(inf.InputError, match=message):
            made([{"text": "w2", "label": 1}], classifier(), **settings)
    with pytest.raises(inf.InputError, match=r"has no column 'text'; there are foo \(--text-column says which it is\)"):
        made([{"foo": "w2"}])
    # A file without a header.
    with pytest.raises(
        inf.InputError, match=r"has no column 'text'; there are w2 w3, 1 .*the first line of a table names"
    ):
        made([{"w2 w3": "w4", "1": "0"}], classifier())


def test_capitals_and_blanks_of_columns_are_overlooked_where_one_fits() -> None:
    samples = made([{" Text ": "w2", "LABEL": 1}, {" Text ": "w3", "LABEL": 0}], classifier())
    assert samples.form == "text and label: ' Text ', targets in 'LABEL'"
    assert samples.labels == [1, 0]
    with pytest.raises(inf.InputError, match="has no column 'text'; there are Text, TEXT, label"):
        made([{"Text": "w2", "TEXT": "w3", "label": 1}], classifier())


def test_a_conversation_that_is_broken_text_is_named() -> None:
    talk = FORMS["messages as text"][0]
    with pytest.raises(inf.InputError, match=r"row 1 has a conversation that is no JSON \("):
        made([talk, {"messages": talk["messages"][:-1]}])


def test_rows_of_a_tokenizer_with_tensors(folder: Path) -> None:
    encode = tokenizer()
    rows = [
        {**encode(row["text"], return_tensors="pt"), "labels": torch.tensor([row["label"]])} for row in sentences(12, 1)
    ]
    flat = [{"input_ids": row["input_ids"][0].tolist(), "labels": int(row["labels"])} for row in rows]
    model = models.make("bert")
    stores = [inf.audit(model, part, part, methods=["dot"], layers="head", progress=False) for part in (rows, flat)]
    torch.testing.assert_close(*(store.rankings[store.main] for store in stores))


@pytest.mark.parametrize(
    ("option", "value"),
    [("chat_template", "t.jinja"), ("as_chat", True), ("block_size", 8), ("answer_column", "noise")],
)
def test_a_setting_without_a_use_is_refused(folder: Path, tmp_path: Path, option: str, value: object) -> None:
    (tmp_path / "t.jinja").write_text(CHAT)
    data = write_rows(tmp_path / "train.jsonl", sentences(20, 1))
    given = str(tmp_path / str(value)) if option == "chat_template" else value
    with pytest.raises(inf.InputError, match=f"{option}: nothing in train uses it for classification"):
        inf.audit(str(folder / "model"), str(data), None, out=tmp_path / "a", **{option: given})
    flag = f"--{option.replace('_', '-')}"
    code, _, err = run("inspect", data, "--model", folder / "model", flag, *([] if value is True else [given]))
    assert code == 1
    assert f"{option}: nothing in data uses it" in err


def test_settings_that_some_rows_use_pass(tmp_path: Path) -> None:
    talk = [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}]
    pairs = [{"prompt": "w1", "completion": "w2"}]
    (tmp_path / "t.jinja").write_text(CHAT)
    assert made(talk, chat_template=str(tmp_path / "t.jinja")).unused == []
    assert made(pairs, chat_template=str(tmp_path / "t.jinja")).unused == ["chat_template"]
    assert made(pairs, as_chat=True).unused == []
    assert made(pairs, as_chat=False, label="completion").unused == ["label_column"]
    assert made(talk, label_names=["a", "b"]).unused == ["label_names"]
    assert made([{"text": "w1 w2"}], block_size=4).unused == []
    assert made(pairs, block_size=4).unused == ["block_size"]
