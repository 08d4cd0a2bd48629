from collections.abc import Callable

import pytest
import torch

from gristmill.errors import InputError
from gristmill.inference import ModelScorer, Sampling, generate
from gristmill.inference import scorer as scorer_module
from gristmill.inference.scorer import causal
from gristmill.model import Transformer

Tiny = Callable[..., Transformer]


@torch.no_grad()
def token_by_token(model: Transformer, sequence: list[int], window: int) -> float:
    """Each token alone: predicted from as much as the definition's window lets it see."""
    total, half = 0.0, window // 2
    for target in range(1, len(sequence)):
        number = target - 1  # of the input that predicts it
        start = 0 if number < window else half * ((number - window) // half + 1)
        context = torch.tensor([sequence[start:target]])
        hidden, _ = model(context, torch.arange(context.shape[1])[None], causal)
        total += float(model.logits(hidden)[0, -1].log_softmax(-1)[sequence[target]])
    return total


@pytest.mark.parametrize("window", [8, 24, 64])
@pytest.mark.parametrize("tile_tokens", [64, 8192])
def test_loglikelihood_equals_a_naive_loop_over_tokens(
    tiny: Tiny, window: int, tile_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer_module, "TILE_TOKENS", tile_tokens)
    monkeypatch.setattr(scorer_module, "LOGITS_ROWS", 16)
    model, chance = tiny(), torch.Generator().manual_seed(0)
    sequences = [torch.randint(300, (n,), generator=chance).tolist() for n in (2, 9, 10, 1, 33, 70, 25)]
    wanted = [token_by_token(model, sequence, window) for sequence in sequences]
    assert ModelScorer(model, window).loglikelihood(sequences) == pytest.approx(wanted, rel=1e-5)


def test_no_sequences_no_figures(tiny: Tiny) -> None:
    scorer = ModelScorer(tiny(), 8)
    assert scorer.loglikelihood([]) == []
    assert scorer.loglikelihood([[1]]) == [0.0]
    assert scorer.generate([], max_tokens=4, stop_ids=frozenset()) == []


def test_scorer_generates_what_generate_does_up_to_the_stop(tiny: Tiny) -> None:
    model = tiny()
    prompts = [[1, 2, 3], [9], [4, 4]]
    free = [list(generate(model, prompt, Sampling(temperature=0.0), 12)) for prompt in prompts]
    stops = frozenset({free[1][3]})
    wanted = [list(generate(model, prompt, Sampling(temperature=0.0), 12, stops)) for prompt in prompts]
    assert ModelScorer(model, 8).generate(prompts, max_tokens=12, stop_ids=stops) == wanted
    assert len(wanted[1]) <= 3


def test_what_exceeds_the_context_is_an_input_error(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="context_length=65"):
        ModelScorer(tiny(), 65)
    with pytest.raises(InputError, match="max_seq_len=64"):
        ModelScorer(tiny(), 64).generate([[1] * 60], max_tokens=5, stop_ids=frozenset())


def test_scoring_leaves_a_model_in_training_as_it_was(tiny: Tiny) -> None:
    model = tiny(moe_jitter_eps=0.5).train()
    scorer = ModelScorer(model, 16)
    assert scorer.loglikelihood([[1, 2, 3]]) == scorer.loglikelihood([[1, 2, 3]])
    assert model.training
    hidden, _ = model(torch.tensor([[1, 2]]), torch.arange(2)[None], causal)
    hidden.sum().backward()
    assert model.wte.weight.grad is not None
