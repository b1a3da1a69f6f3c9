"""Duplicates: equal texts by their hash, nearly equal ones by MinHash; and those of a few texts among many others."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import xxhash

from influence_fast.auditing.findings.words import flat_ids
from influence_fast.data.samples import Samples

#: Share of words and pairs of words that nearly equal rows have in common (Jaccard).
ALIKE = 0.8
_PERMUTATIONS, _CANDIDATES, _BLOCK = 64, 32, 4096
# Bands, and hashes in each: what is just alike is found with a probability of 1 - (1 - 0.8^5)^12 = 0.99.
_BANDS = (12, 5)


def compared(samples: Samples) -> Sequence[str | Sequence[int]]:
    """What tells samples alike: their texts, else their token ids."""
    return samples.texts if samples.texts is not None else [flat_ids(row) for row in samples.rows]


def find_duplicates(texts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """Groups of rows that are equal, or nearly so, each in the order of the rows; no row is in two.

    Texts are compared without case, repeated blanks and compatibility forms of characters; rows of token ids as they are.
    Rows that are not equal are compared with the first of each group that MinHash (Broder 1997) finds near it, so that
    thousands of copies take no longer than thousands of others.

    Args:
        texts: of each row, or its token ids.
    """
    from datasketch import MinHash, MinHashLSH

    words = [_words(text) for text in texts]
    equal: dict[bytes, list[int]] = {}
    for row, of_row in enumerate(words):
        equal.setdefault(xxhash.xxh3_128_digest("\0".join(of_row).encode("utf-8", "surrogatepass")), []).append(row)
    groups = [rows for rows in equal.values() if words[rows[0]]]
    index = MinHashLSH(num_perm=_PERMUTATIONS, params=_BANDS)
    near: dict[int, list[int]] = {}
    for begin in range(0, len(groups), _BLOCK):
        block = groups[begin : begin + _BLOCK]
        pieces = [_pieces(words[rows[0]]) for rows in block]
        for rows, own, sketch in zip(block, pieces, MinHash.bulk(pieces, num_perm=_PERMUTATIONS), strict=True):
            found = sorted(index.query(sketch))[:_CANDIDATES]
            first = next((row for row in found if _alike(own, _pieces(words[row]))), None)
            if first is None:
                index.insert(rows[0], sketch, check_duplication=False)
                near[rows[0]] = list(rows)
            else:
                near[first].extend(rows)
    return [sorted(rows) for rows in near.values() if len(rows) > 1]


def copies_among(texts: Sequence[str | Sequence[int]], others: Sequence[str | Sequence[int]]) -> list[int]:
    """Which of the texts, or token ids, stand among the others too, equal or nearly so.

    Exact: a text that is alike has one of any ``(1 - ALIKE) n + 1`` of another's ``n`` pieces, so that few are compared.
    """
    pieces = [_pieces(_words(text)) for text in texts]
    looked_for: dict[bytes, list[int]] = {}
    frequent = Counter(piece for own in pieces for piece in own)
    for i, own in enumerate(pieces):
        rarest = sorted(own, key=lambda piece: (frequent[piece], piece))
        for piece in rarest[: len(own) - math.ceil(ALIKE * len(own)) + 1]:
            looked_for.setdefault(piece, []).append(i)
    found: set[int] = set()
    for other in others if looked_for else ():
        theirs = _pieces(_words(other))
        near = {i for piece in theirs & looked_for.keys() for i in looked_for[piece]} - found
        found |= {i for i in near if _alike(pieces[i], theirs)}
    return sorted(found)


def _words(text: str | Sequence[int]) -> list[str]:
    if isinstance(text, str):
        return unicodedata.normalize("NFKC", text).casefold().split()
    return [str(token) for token in text]


def _pieces(words: Sequence[str]) -> set[bytes]:
    pairs = map(" ".join, pairwise(words))
    return {piece.encode("utf-8", "surrogatepass") for piece in (*words, *pairs)}


def _alike(one: set[bytes], other: set[bytes]) -> bool:
    return len(one & other) >= ALIKE * len(one | other)
