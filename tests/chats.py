"""A tokenizer of bytes, and what of a conversation it says is learned."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import transformers as hf
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

from influence_fast.data.chat import ChatEncoder, messages_of


def byte_tokenizer(special: Sequence[str] = (), **named: str) -> hf.PreTrainedTokenizerFast:
    """A token a byte, and the marks of turns as tokens of their own."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(tokenizer_models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = hf.PreTrainedTokenizerFast(tokenizer_object=inner, **named)
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def targets(
    tokenizer: Any, template: str | None, talk: list[dict[str, Any]], tools: Any = None, **how: int
) -> tuple[str, str]:
    """The text of a conversation, and its runs of targets joined by ``|``."""
    found = list(zip(*ChatEncoder(tokenizer, template)(messages_of(talk), tools, **how), strict=True))
    runs = [[token for token, _ in run] for told, run in itertools.groupby(found, key=lambda pair: pair[1]) if told]
    return tokenizer.decode([token for token, _ in found]), "|".join(map(tokenizer.decode, runs))
