"""What a question is answered with, against a search and the gradients themselves."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import pytest
import torch
from audits import run, write_rows

import influence_fast as inf
from influence_fast.gradients.build import gradients_of
from influence_fast.serving.lookup import BusyError, Lookup, Question


def gradients(lookup: Lookup, text: str, label: int) -> dict[str, torch.Tensor]:
    row = dict(lookup._tokenizer(text), labels=label)
    return gradients_of(lookup._model, [row], lookup.index.layers, lookup.index.meta["projection"])


@pytest.mark.parametrize("method", ["dot", "cosine", "trak", "trackstar"])
def test_an_answer_is_a_search_with_texts_and_shares(lookup: Lookup, method: str) -> None:
    found = lookup.answer(Question("w1 w2 w3", label="2"), 4, method)
    asked = gradients(lookup, "w1 w2 w3", 2)
    for kind in ("helpful", "harmful"):
        scores, ids = lookup.index.search(asked, 4, kind == "harmful", method=method)
        assert [row["id"] for row in found[kind]] == ids[0]
        assert [row["score"] for row in found[kind]] == pytest.approx(scores[0].tolist(), rel=1e-4)
        for row in found[kind]:
            number = list(lookup.index.ids).index(row["id"])
            parts = lookup.index.by_layer(asked, [number], method)
            assert float(sum(parts.values())) == pytest.approx(row["score"], rel=1e-4)
            whole = sum(abs(float(part)) for part in parts.values())
            assert row["groups"]["head"] == pytest.approx(
                sum(float(part) for name, part in parts.items() if "attention" not in name) / whole, rel=1e-3, abs=1e-6
            )
            assert sum(row["groups"].values()) == pytest.approx(row["score"] / whole, rel=1e-3)
            assert row["effect"] == ("helpful" if row["score"] > 0 else "harmful")
            assert row["text"]
    assert found["question"] == {"text": "w1 w2 w3", "label": "2"}
    assert (found["exact"], found["tokens"]) == (True, True)


def test_what_the_first_question_needs_is_ready_before_the_server_says_so(
    indexed: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from influence_fast.serving import lookup as module

    checked: list[object] = []
    verified = module.verified_settings
    monkeypatch.setattr(module, "verified_settings", lambda *given: checked.append(given) or verified(*given))
    warmed = Lookup.open(indexed / "index", str(folder / "model"))
    app = pytest.importorskip("influence_fast.serving.app", exc_type=inf.BackendError)
    monkeypatch.setattr(app.uvicorn.Server, "run", lambda *_, **__: None)
    app.serve(warmed, port=0, ready=lambda url: checked.append(url))
    assert [type(one) for one in checked] == [tuple, str]
    warmed.answer(Question("w1 w2 w3", label="2"))
    assert len(checked) == 2, "how layers are captured is known"


def test_held_out_queries_and_neighbours(lookup: Lookup) -> None:
    queries = lookup.names_of_queries(1, 2)
    assert [one["name"] for one in queries] == ["1", "2"]
    by_number = lookup.answer(Question(query="1"), 3)
    by_text = lookup.answer(Question(queries[0]["text"], label=queries[0]["label"]), 3)
    assert [r["id"] for r in by_number["helpful"]] == [r["id"] for r in by_text["helpful"]]
    # A row is its own nearest neighbour by direction.
    assert lookup.answer(Question(row="row/7"), 1, "cosine")["helpful"][0]["id"] == "row/7"


def test_tokens_sum_to_the_mean_inner_product_by_their_layer(lookup: Lookup) -> None:
    question, ids = Question("w1 w2 w3", label="2"), ["row/5", "row/9"]
    found = lookup.tokens(question, ids)
    assert [one["text"] for one in found["tokens"]] == ["w1", "w2", "w3"]
    layer = found["note"].removeprefix("by layer ")
    rows = [dict(lookup._tokenizer(lookup._shown[i][0]), labels=int(lookup._shown[i][1])) for i in ids]
    sides = [
        gradients_of(lookup._model, given, [layer], "identity")[layer].double()
        for given in ([dict(lookup._tokenizer("w1 w2 w3"), labels=2)], rows)
    ]
    total = sum(one["influence"] for one in found["tokens"])
    assert total == pytest.approx(float((sides[0] @ sides[1].T).mean()), rel=1e-3)


def test_what_cannot_be_asked_is_said(lookup: Lookup) -> None:
    for wrong, message in [
        ({}, "expected one of text, query and row, got none"),
        ({"text": "w1", "row": "3"}, "got text, row"),
        ({"row": "3", "label": "1"}, "label and answer belong to a text"),
        ({"text": "w" * 20_001}, "text: expected at most 20000 characters"),
    ]:
        with pytest.raises(inf.InputError, match=message):
            Question(**wrong)
    for question, more, message in [
        (Question("w1"), {}, "label: a classifier is asked with the class"),
        (Question("w1", label="nine"), {}, "nine"),
        (Question("w1 " * 5000, label="1"), {}, "text"),
        (Question(row="nobody"), {}, "no row has the id 'nobody'"),
        (Question(query="99"), {}, "expected one of the 5 queries"),
        (Question(row="row/4"), {"k": 51}, "k: expected an int from 1 to 50"),
        (Question(row="row/4"), {"method": "ekfac"}, "method: expected one of dot, cosine, trak, trackstar"),
    ]:
        with pytest.raises(inf.InputError, match=message):
            lookup.answer(question, **more)
    with pytest.raises(inf.InputError, match="the text of 'x' is not known"):
        lookup.tokens(Question(row="row/4"), ["x"])


def test_a_question_waits_for_the_model_no_longer_than_it_may(lookup: Lookup) -> None:
    with lookup._in_turn(None):
        caught = []

        def ask() -> None:
            try:
                lookup.answer(Question("w1", label="1"), 1, seconds=0.05)
            except BusyError as error:
                caught.append(str(error))

        thread = Thread(target=ask)
        thread.start()
        thread.join()
        # Neighbours need no model.
        assert lookup.answer(Question(row="row/7"), 1)["helpful"]
    assert caught == ["the model is busy with other questions; ask again"]


def test_a_language_model_is_asked_with_an_answer(folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": f"w{i} w2", "completion": f"w{i + 3}"} for i in range(12)])
    given = ["--layers", "attention", "--projection", "rademacher:4x4", "--out", tmp_path / "s"]
    assert run("build", "--model", folder / "causal", "--data", data, *given)[0] == 0
    lookup = Lookup.open(tmp_path / "s", str(folder / "causal"))
    found = lookup.answer(Question("w1 w2", answer="w4"), 2, "cosine")
    assert found["helpful"][0]["text"] == "w1 w2"
    assert len(lookup.tokens(Question("w1 w2", answer="w4"), ["1"])["tokens"]) == 3
    with pytest.raises(inf.InputError, match="label: a language model is asked with an answer"):
        lookup.answer(Question("w1", label="1"))


def test_without_the_data_there_are_no_texts(indexed: Path, folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(indexed, tmp_path / "moved")
    write_rows(tmp_path / "moved" / "train.jsonl", [{"text": "w1", "label": 0}])
    lookup = Lookup.open(tmp_path / "moved" / "index", str(folder / "model"))
    assert "is not what the store was built of" in lookup.note
    found = lookup.answer(Question("w1 w2", label="1"), 2)
    assert (found["tokens"], found["helpful"][0]["text"]) == (False, "")
    with pytest.raises(inf.InputError, match="is not known"):
        lookup.tokens(Question("w1 w2", label="1"), ["row/4"])
    with pytest.raises(inf.StoreError, match="is another than the index was made with"):
        Lookup.open(tmp_path / "moved" / "index", str(folder / "causal"))
