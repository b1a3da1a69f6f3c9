"""Words and pairs of words of token ids, as sparse features that no training has touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Columns that words and pairs share; tokens of a row that count.
_COLUMNS, _TOKENS = 1 << 18, 1024
_MIX = np.uint64(0x9E3779B97F4A7C15)


def flat_ids(row: Mapping[str, Any]) -> list[int]:
    """Token ids of a row, of several texts one behind the other; empty where it has none."""
    ids = row.get("input_ids")
    if ids is None:
        return []
    return [int(token) for token in np.asarray(_joined(ids)).reshape(-1)]


def word_features(*parts: Sequence[Mapping[str, Any]]) -> list[Any] | None:
    """For each part a sparse float64 ``(rows, columns)``: words and pairs of neighbouring words, rare ones weighing more.

    Weights (``log`` of the inverse share of rows) follow the first part; a row is of unit length where the first part has
    all its words. None where rows have no token ids.
    """
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import TfidfTransformer

    matrices = []
    for part in parts:
        columns = [_columns(flat_ids(row)[:_TOKENS]) for row in part]
        if not any(map(len, columns)):
            return None
        indptr = np.cumsum([0, *map(len, columns)])
        shape = (len(part), _COLUMNS)
        matrices.append(csr_matrix((np.ones(indptr[-1]), np.concatenate(columns), indptr), shape=shape))
    weights = TfidfTransformer().fit(matrices[0])
    # Nothing is learned of columns that the first part lacks; without them a fit takes a fraction of the time.
    there = np.unique(matrices[0].indices)
    return [weights.transform(matrix)[:, there] for matrix in matrices]


def _columns(ids: list[int]) -> np.ndarray:
    words = np.asarray(ids, dtype=np.uint64) + np.uint64(1)
    pairs = words[:-1] * _MIX + words[1:]
    return np.unique((np.concatenate([words, pairs]) * _MIX >> np.uint64(40)) % np.uint64(_COLUMNS)).astype(np.int64)


def _joined(ids: Any) -> Any:
    return [token for part in ids for token in part] if len(ids) and isinstance(ids[0], list) else ids
