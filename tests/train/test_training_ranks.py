"""A training on two ranks: each draws its own random numbers, and one rank's broken weights stop both."""

from dataclasses import replace
from pathlib import Path

import torch
from ranks import Processes
from test_training import CFG, MODEL, UNUSED, job_of
from torch import Tensor, nn

from gristmill.errors import Failure
from gristmill.inference.scorer import ModelScorer
from gristmill.model import Transformer, init_weights
from gristmill.parallel.config import ParallelConfig
from gristmill.parallel.mesh import local
from gristmill.parallel.ranks import ALONE, Ranks
from gristmill.stop import Stop, StopRequested
from gristmill.train.checkpoint import latest_checkpoint, read_state
from gristmill.train.loop import Event, Started, Step, train

SHARDED = replace(CFG, parallel=ParallelConfig(shard=2), checkpoint=replace(CFG.checkpoint, every=3), micro_batch=8)


def jitters(ranks: Ranks, shards: Path, tokenizer: Path, folder: Path, stop_after: int) -> dict[int, Tensor]:
    """Step (from 0) -> the factors by which the first router's input was jittered. Stops, saved, after a step."""
    model_cfg = replace(MODEL, moe_jitter_eps=0.1)
    cfg = replace(SHARDED, steps=4, parallel=ParallelConfig(shard=ranks.world_size))
    stop, factors, inputs = Stop(), {}, []
    step = 0

    def before_ffn(ffn: nn.Module, arguments: tuple[Tensor]) -> None:
        inputs.append(arguments[0].detach())

    def before_router(router: nn.Module, arguments: tuple[Tensor]) -> None:
        factors.setdefault(step, (arguments[0].detach() / inputs[-1])[:4])

    for event in train(job_of(shards, tokenizer, folder, cfg, model_cfg, ranks), stop, ranks):
        match event:
            case Started():
                step = event.step
                ffn = event.model.blocks[0].ffn
                ffn.register_forward_pre_hook(before_ffn)
                ffn.router.register_forward_pre_hook(before_router)
            case Step():
                step = event.step
                if step == stop_after:
                    stop.set()
    return factors


def test_each_rank_and_each_step_has_its_own_jitter_and_a_resumed_one_the_same(
    shards: Path, tokenizer: Path, tmp_path: Path, two: Processes
) -> None:
    whole = two.run(jitters, shards, tokenizer, tmp_path / "whole", 4)
    for found in whole:
        assert list(found) == [0, 1, 2, 3]
        assert all(0.9 < float(jitter.min()) < 0.95 and 1.05 < float(jitter.max()) < 1.1 for jitter in found.values())
    drawn = [jitter for found in whole for jitter in found.values()]
    for number, jitter in enumerate(drawn):
        assert not any(torch.allclose(jitter, other, atol=1e-3) for other in drawn[:number])
    broken = [two.run(jitters, shards, tokenizer, tmp_path / "broken", stop_after) for stop_after in (2, 4)]
    for rank, found in enumerate(whole):
        assert [list(part[rank]) for part in broken] == [[0, 1], [2, 3]]
        for step, jitter in (broken[0][rank] | broken[1][rank]).items():
            assert torch.equal(jitter, found[step])
    assert torch.allclose(jitters(ALONE, shards, tokenizer, tmp_path / "one", 4)[0], whole[0][0], atol=1e-4)


def poison_rank_1(ranks: Ranks, shards: Path, tokenizer: Path, folder: Path) -> str:
    """Why training ended, after a NaN in rank 1's part of a weight that no text uses."""
    seen: list[Event] = []
    try:
        job = job_of(shards, tokenizer, folder, SHARDED, ranks=ranks)
        for event in train(job, Stop(), ranks):
            seen.append(event)
            if isinstance(event, Step) and event.step == 4 and ranks.rank == 1:
                assert isinstance(seen[0], Started)
                local(seen[0].model.wte.weight.data)[UNUSED - MODEL.vocab_size // 2, 0] = torch.nan
    except Failure as failure:
        return str(failure)
    return "trained"


def test_a_weight_that_is_not_finite_on_one_rank_stops_all_before_the_save(
    shards: Path, tokenizer: Path, tmp_path: Path, two: Processes
) -> None:
    answers = two.run(poison_rank_1, shards, tokenizer, tmp_path)
    assert all(answer.startswith("weights are not finite at step 6: training diverged") for answer in answers), answers
    found, damage = latest_checkpoint(tmp_path, "key")
    assert found is not None
    assert (read_state(found.path).step, damage) == (3, [])


def score_with_a_stop_on_rank_1(ranks: Ranks) -> str:
    """How a measurement of held-out loss ends."""
    stop = Stop()
    if ranks.rank == 1:
        stop.set()
    scorer = ModelScorer(init_weights(Transformer(MODEL), seed=0), 32, ranks, stop)
    try:
        scorer.loglikelihood([[1] * 20, [2] * 20])
    except StopRequested:
        return "stopped"
    return "scored"


def test_a_stop_on_one_rank_ends_the_validation_of_all(two: Processes) -> None:
    assert two.run(score_with_a_stop_on_rank_1) == ["stopped", "stopped"]
