"""TRAK on a small GPT-2, with trak's projector and with ours (``patch``): times and scores side by side.

Needs ``pip install traker``. A query is a training row with another end.
"""

import tempfile
import time

import torch
from torch import Tensor
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from transformers import GPT2Config, GPT2LMHeadModel

import influence_fast as inf

ROWS, LENGTH, WORDS, DIM = 256, 16, 64, 128


class NextToken(AbstractModelOutput):  # type: ignore[misc]
    """The mean negative loss of a row's next tokens."""

    def __init__(self) -> None: ...

    def get_output(self, model: torch.nn.Module, weights: dict, buffers: dict, ids: Tensor, _: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (weights, buffers), args=(ids[None],)).logits[0]
        return -torch.nn.functional.cross_entropy(logits[:-1], ids[1:])

    def get_out_to_loss_grad(self, model: torch.nn.Module, weights: dict, buffers: dict, batch: list[Tensor]) -> Tensor:
        return torch.ones(len(batch[0]), 1)


def attribute(model: GPT2LMHeadModel, rows: Tensor, queries: Tensor) -> tuple[Tensor, float]:
    """Scores ``(rows, queries)`` and seconds of the whole of TRAK."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(model, NextToken(), len(rows), folder, proj_dim=DIM, device="cpu", use_half_precision=False)
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for batch in rows.split(16):
            traker.featurize(batch=[batch, batch], num_samples=len(batch))
        traker.finalize_features()
        traker.start_scoring_checkpoint("queries", model.state_dict(), 0, len(queries))
        traker.score(batch=[queries, queries], num_samples=len(queries))
        return torch.from_numpy(traker.finalize_scores("queries").copy()), time.perf_counter() - begin


torch.manual_seed(0)
config = GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=2, attn_implementation="eager")
gpt2 = GPT2LMHeadModel(config).eval()
rows = torch.randint(WORDS, (ROWS, LENGTH))
queries = torch.cat([rows[:4, :12], torch.randint(WORDS, (4, 4))], 1)
stock, stock_s = attribute(gpt2, rows, queries)
with inf.patch("trak"):
    ours, ours_s = attribute(gpt2, rows, queries)
print(f"seconds  stock {stock_s:6.1f}  patched {ours_s:6.1f}  ({stock_s / ours_s:.1f} times as fast)")
for query in range(4):
    for row in stock[:, query].topk(2).indices.tolist():
        print(f"query {query}, row {row:3}  stock {stock[row, query]:6.3f}  patched {ours[row, query]:6.3f}")
print(f"correlation of all scores {float(torch.corrcoef(torch.stack([stock.flatten(), ours.flatten()]))[0, 1]):.3f}")
