"""Token ids as the tokenizer itself makes them, cut as it cuts, with the special tokens where training had them."""

from __future__ import annotations

import pytest
import transformers as hf
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from influence_fast.data.encoding import TextEncoder, longest_input

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<eos>", *"abcdefgh", "un", "##do"]


def make(single: str, pair: str, **special: str) -> hf.PreTrainedTokenizerFast:
    inner = Tokenizer(tokenizer_models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = [(word, WORDS.index(word)) for word in ("[CLS]", "[SEP]", "<eos>")]
    inner.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", **special)


BERT = make("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", cls_token="[CLS]", sep_token="[SEP]")
# Puts an end behind every text, as T5's and some of Llama's do.
ENDING = make("[CLS] $A <eos>", "[CLS] $A $B <eos>", bos_token="[CLS]", eos_token="<eos>")
BARE = make("$A", "$A $B", eos_token="<eos>")


def words(row: dict) -> str:
    return " ".join(WORDS[token] for token in row["input_ids"])


def targets(row: dict) -> str:
    return " ".join("_" if label == -100 else WORDS[label] for label in row["labels"])


@pytest.mark.parametrize("text", [("a b c d e f",), ("a b c d", "e f g h"), ("a", "b")])
def test_cuts_are_the_tokenizers_own(text: tuple[str, ...]) -> None:
    encode = TextEncoder(BERT, 5)
    (row,) = encode.classified([text])
    assert row["input_ids"] == BERT(*text, truncation=True, max_length=5)["input_ids"]
    assert row["input_ids"][-1] == WORDS.index("[SEP]")
    assert encode.truncated == (len(BERT(*text)["input_ids"]) > 5)
    assert TextEncoder(BERT).classified([text])[0]["input_ids"] == BERT(*text)["input_ids"]


def test_more_than_two_texts_are_kept_apart() -> None:
    assert words(TextEncoder(BERT).classified([("a", "b", "c d")])[0]) == "[CLS] a [SEP] b [SEP] c d [SEP]"


@pytest.mark.parametrize(
    ("tokenizer", "inputs", "labels"),
    [
        (ENDING, "[CLS] a b c d <eos>", "_ _ _ c d <eos>"),
        (BARE, "a b c d <eos>", "_ _ c d <eos>"),
        (BERT, "[CLS] a b c d", "_ _ _ c d"),
    ],
    ids=["ending", "bare", "separators"],
)
def test_nothing_stands_between_prompt_and_answer(tokenizer: object, inputs: str, labels: str) -> None:
    (row,) = TextEncoder(tokenizer).answered(["a b"], ["c d"])
    assert (words(row), targets(row)) == (inputs, labels)


def test_an_end_that_is_written_is_not_doubled() -> None:
    (row,) = TextEncoder(ENDING).answered(["a"], ["c <eos>"])
    assert words(row) == "[CLS] a c <eos>"
    (row,) = TextEncoder(ENDING).answered(["a"], [""])
    assert (words(row), targets(row)) == ("[CLS] a <eos>", "_ _ <eos>")


def test_answers_are_cut_at_their_end() -> None:
    encode = TextEncoder(ENDING, 4)
    (row,) = encode.answered(["a b"], ["c d"])
    assert (words(row), targets(row), encode.truncated) == ("[CLS] a b c", "_ _ _ c", 1)


def test_the_first_token_of_a_word_has_its_tag() -> None:
    row = TextEncoder(BERT).tagged(["undo", "a", "b"], [7, 8, 9])
    assert words(row) == "[CLS] un ##do a b [SEP]"
    assert row["labels"] == [-100, 7, -100, 8, 9, -100]
    row = TextEncoder(BERT, 4).tagged(["undo", "a", "b"], [7, 8, 9])
    assert (words(row), row["labels"]) == ("[CLS] un ##do [SEP]", [-100, 7, -100, -100])


def test_a_slow_tokenizer_tags_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = [TextEncoder(BERT, cut).tagged(["undo", "a", "b"], [7, 8, 9]) for cut in (None, 4)]
    monkeypatch.setattr(type(BERT), "is_fast", False)
    for wanted, cut in zip(fast, (None, 4), strict=True):
        row = TextEncoder(BERT, cut).tagged(["undo", "a", "b"], [7, 8, 9])
        assert row == {name: wanted[name] for name in ("input_ids", "labels")}


def test_inputs_and_outputs_of_an_encoder_decoder() -> None:
    (row,) = TextEncoder(ENDING).translated(["a b"], ["c"])
    assert (words(row), targets(row)) == ("[CLS] a b <eos>", "[CLS] c <eos>")


def test_the_limit_is_the_smaller_of_both() -> None:
    BERT.model_max_length = int(1e30)
    assert [longest_input(BERT, limit) for limit in (None, 8)] == [None, 8]
    BERT.model_max_length = 6
    assert [longest_input(BERT, limit) for limit in (None, 8, 4)] == [6, 6, 4]
    BERT.model_max_length = int(1e30)
