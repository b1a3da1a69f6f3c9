"""How probable labels are, against labels drawn from known class probabilities."""

from __future__ import annotations

import pytest
import torch

from influence_fast.auditing.findings.labels import label_findings


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_probabilities_are_those_of_the_world_that_the_labels_come_from(
    classes: int, share: float, generator: torch.Generator
) -> None:
    n = 20_000
    log_probabilities = (3 * torch.randn(n, classes, generator=generator, dtype=torch.float64)).log_softmax(1)
    truth = torch.multinomial(log_probabilities.exp(), 1, generator=generator)[:, 0]
    wrong = torch.rand(n, generator=generator) < share
    other = (truth + torch.randint(1, classes, (n,), generator=generator)) % classes
    given = torch.where(wrong, other, truth)
    found = label_findings(log_probabilities, given)
    assert found.share == pytest.approx(share, abs=0.02)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        bin_ = (found.probability >= low) & (found.probability < low + 0.2)
        if int(bin_.sum()) > 100:
            right = float((~wrong[bin_]).double().mean())
            # Four standard errors.
            assert abs(float(found.probability[bin_].mean()) - right) < 4 * (0.25 / int(bin_.sum())) ** 0.5 + 0.01
    suggested = found.suggested
    # What is suggested is right more often than what was given.
    assert (suggested == truth).double().mean() > (given == truth).double().mean()


def test_clean_labels_stay() -> None:
    log_probabilities = torch.tensor([[0.99, 0.01], [0.01, 0.99]] * 50, dtype=torch.float64).log()
    found = label_findings(log_probabilities, torch.tensor([0, 1] * 50))
    assert found.share < 0.01
    assert found.suggested.tolist() == [0, 1] * 50
