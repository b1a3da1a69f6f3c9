"""Words of token ids as features."""

from __future__ import annotations

import numpy as np

from influence_fast.auditing.findings.words import flat_ids, word_features


def test_rows_are_of_unit_length_and_alike_where_they_share_words() -> None:
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2, 3]}, {"input_ids": [3, 2, 1]}, {"input_ids": [7, 8]}]
    found = word_features(rows, [{"input_ids": [1, 2]}])
    assert found is not None
    alike = (found[0] @ found[0].T).toarray()
    np.testing.assert_allclose(alike.diagonal(), 1)
    assert alike[0, 1] > 0.999
    # The same words in another order share no pair of them.
    assert 0 < alike[0, 2] < 0.9
    assert alike[0, 3] == 0
    assert found[1].shape == (1, found[0].shape[1])


def test_rows_without_ids() -> None:
    assert word_features([{"pixel_values": 1}]) is None
    assert flat_ids({"input_ids": [[1, 2], [3]]}) == [1, 2, 3]
