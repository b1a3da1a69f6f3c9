"""What an audit says of each sample's label: how probable it is, and which one would be better."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS = 200


@dataclass(frozen=True)
class LabelFindings:
    """Of each training sample.

    Attributes:
        probability: that its label is right, float64 ``(n,)``.
        suggested: the most probable label, int64 ``(n,)``; its own where that is the most probable.
        share: of the labels that are wrong, estimated over all samples.
    """

    probability: Tensor
    suggested: Tensor
    share: float


def label_findings(log_probabilities: Tensor, labels: Tensor) -> LabelFindings:
    """How probable each label is, from how probable the classes are without seeing it.

    A label is taken to be wrong with one probability, the same for all samples, and then to be any other class. That
    probability maximises the likelihood of all labels (expectation maximisation, Dempster et al. 1977); Bayes' rule gives
    the rest::

        P(right_i) = (1 - share) p_i(label) / ((1 - share) p_i(label) + share (1 - p_i(label)) / (classes - 1))

    This is as good as the probabilities of the classes are. Those of a model that has learned some wrong labels by heart
    are too high for these, so the share comes out too low rather than too high.

    Args:
        log_probabilities: float64 ``(n, classes)``.
        labels: int ``(n,)``, as given.
    """
    classes = log_probabilities.shape[1]
    own = log_probabilities.gather(1, labels[:, None])[:, 0].exp()
    other = (1 - own) / (classes - 1)
    share = torch.tensor(0.1, dtype=torch.float64)
    for _ in range(_STEPS):
        right = (1 - share) * own / ((1 - share) * own + share * other)
        before, share = share, (1 - right).mean()
        if (share - before).abs() < 1e-9:
            break
    right = (1 - share) * own / ((1 - share) * own + share * other)
    # With the label seen: the class prior is what the model says, times how such a class comes to be labelled so.
    seen = log_probabilities.exp() * share / (classes - 1)
    seen.scatter_(1, labels[:, None], (1 - share) * own[:, None])
    return LabelFindings(right, seen.argmax(1), float(share))
