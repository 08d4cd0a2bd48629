import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import InputError
from gristmill.inference import ModelScorer, Sampling, generate
from gristmill.inference import scorer as scorer_module
from gristmill.inference.prefixes import batches
from gristmill.inference.runner import Runner
from gristmill.inference.scorer import causal
from gristmill.kernels import native
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
@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_loglikelihood_equals_a_naive_loop_over_tokens(
    tiny: Tiny, window: int, tile_tokens: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_in_use", "torch" if kernels == "torch" else native.available()[-1])
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


@pytest.mark.skipif(native.available() == ["torch"], reason="the native kernels were not built")
def test_questions_that_begin_alike_have_the_bits_of_each_alone_and_their_beginning_is_computed_once(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, computed = random.Random(0), []
    run = Runner.run
    monkeypatch.setattr(
        Runner, "run", lambda self, parts: computed.append(sum(p.end - p.start for p in parts)) or run(self, parts)
    )
    contexts = [[chance.randrange(300) for _ in range(n)] for n in (50, 33, 1)]
    asked = [chance.choice(contexts) + [chance.randrange(3) for _ in range(chance.randrange(1, 10))] for _ in range(60)]
    asked += [asked[0], asked[0][:-1], [chance.randrange(300) for _ in range(200)]]
    for model in (tiny(), tiny(norm="rms_norm", qk_norm=True, clip_qkv=None)):
        scorer = ModelScorer(model, 64)
        alone = [scorer.loglikelihood([sequence])[0] for sequence in asked]
        before, computed[:] = sum(computed), []
        assert scorer.loglikelihood(asked) == alone
        assert sum(computed) < 0.6 * before


@given(
    rows=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=30), max_size=20),
    budget=st.integers(1, 100), data=st.data(),
)  # fmt: skip
def test_shared_blocks_hold_what_a_row_begins_with(rows: list[list[int]], budget: int, data: st.DataObject) -> None:
    whole = [data.draw(st.booleans()) for _ in rows]
    plan = list(batches(rows, whole, budget, 4))
    assert sorted(share.number for batch in plan for share in batch) == list(range(len(rows)))
    for batch in plan:
        computed = sum(len(rows[share.number]) - share.begin for share in batch)
        assert computed <= budget or len(batch) == 1
        held: dict[int, list[int]] = {}  # block -> its tokens
        for share in batch:
            row = rows[share.number]
            pieces = [row[start : start + 4] for start in range(0, len(row), 4)]
            assert len(pieces) == len(share.blocks) == len(set(share.blocks))
            assert share.begin % 4 == 0
            assert share.begin < len(row)
            assert whole[share.number] or share.begin == 0
            for number, (block, piece) in enumerate(zip(share.blocks, pieces, strict=True)):
                assert held.setdefault(block, piece) == piece
                assert (number < share.begin // 4) == any(
                    block in other.blocks for other in batch[: batch.index(share)]
                )
