"""Random small models of both layouts, published by us and opened by transformers in fp32: it is the reference.

The bounds are the requirement's; `make exact` prints how much of them is used.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from both import (
    Both,
    compare_greedy,
    counts,
    distance,
    load_ours,
    ours_in_rows,
    seen,
)
from random_models import COUNT, LAYOUTS, NEW_TOKENS, draw, packed_row, padded_rows
from torch import Tensor

from gristmill.hub import read_published
from gristmill.inference import Sampling, complete
from gristmill.kernels.loss import cross_entropy
from gristmill.model import Transformer, packed

LOGITS = 2e-5  # max|ours - theirs| / max|theirs|
GRADIENT = 1e-4  # the same, of each tensor
VANISHING = 1e-6  # of the model's largest gradient: below, a tensor's gradient is zero in exact arithmetic


@pytest.fixture(
    scope="module", params=[(x, seed) for x in LAYOUTS for seed in range(COUNT)], ids=lambda x: f"{x[0]}-{x[1]}"
)
def pair(request: pytest.FixtureRequest) -> Iterator[Both]:
    with tempfile.TemporaryDirectory() as folder:
        yield Both(draw(*request.param), Path(folder))


@torch.no_grad()
def test_logits_of_ragged_batches_are_equal(pair: Both) -> None:
    layout = pair.case.layout
    in_rows = ours_in_rows(pair.ours, pair.documents)
    assert seen(f"{layout}: logits, packed", distance(pair.given, pair.wanted)) <= LOGITS
    assert seen(f"{layout}: logits, padded", distance(in_rows, pair.wanted)) <= LOGITS


def test_the_gradient_of_every_tensor_is_equal(pair: Both) -> None:
    layout = pair.case.layout
    their_loss, wanted = their_gradients(pair)
    our_loss, given = our_gradients(load_ours(pair.folder), pair.documents)
    assert seen(f"{layout}: loss", abs(our_loss / their_loss - 1)) <= LOGITS
    assert given.keys() == wanted.keys()
    largest = max(float(tensor.abs().max()) for tensor in wanted.values())
    for name, tensor in wanted.items():
        counts[f"{layout}: gradients compared"] += 1
        if float(tensor.abs().max()) < VANISHING * largest:  # as a router's whose only weight is always normalised to 1
            counts[f"{layout}: gradients that vanish"] += 1
            assert float(given[name].abs().max()) < VANISHING * largest, name
        else:
            assert seen(f"{layout}: gradient of a tensor", distance(given[name], tensor)) <= GRADIENT, name


def their_gradients(pair: Both) -> tuple[float, dict[str, Tensor]]:
    """Under our names: transformers saves them like weights, under the published names, and we read those."""
    tokens, mask = padded_rows(pair.documents)
    model = pair.theirs
    loss = model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.state_dict(keep_vars=True).items()}
    model.save_pretrained(pair.folder / "gradients", state_dict=gradients)
    model.zero_grad()
    _, weights = read_published(pair.folder / "gradients")
    return float(loss.detach()), {name: weight.load() for name, weight in weights.items()}


def our_gradients(model: Transformer, documents: list[list[int]]) -> tuple[float, dict[str, Tensor]]:
    """Of the mean loss of all tokens but the first of each document, as training computes it."""
    model.train().requires_grad_(True)
    tokens, positions, ids = packed_row(documents)
    hidden, _ = model(tokens, positions, packed(ids))
    targets = torch.tensor([target for document in documents for target in (*document[1:], -1)])
    counted = targets >= 0
    total, _ = cross_entropy(hidden[0, counted], model.output_weight, targets[counted])
    loss = total / counted.sum()
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in model.named_parameters()}


@torch.no_grad()
def test_64_greedy_tokens_are_equal_or_part_at_a_tie(pair: Both) -> None:
    """Ours are made in one batch of prompts of several lengths, theirs one by one."""
    prompts = [document[: min(len(document), 40)] for document in pair.documents[:2]]
    made = complete(pair.ours, prompts, Sampling(temperature=0.0), NEW_TOKENS)
    for prompt, ours in zip(prompts, made, strict=True):
        assert len(ours) == NEW_TOKENS
        outcome = compare_greedy(pair, prompt, ours)
        counts[f"{pair.case.layout}: greedy {outcome}"] += 1
