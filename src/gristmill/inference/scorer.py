"""The built-in `Scorer`: any model in this process, also one in the middle of its training."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.errors import InputError
from gristmill.evaluate import Window, windows
from gristmill.inference import scheduler
from gristmill.inference.generate import complete
from gristmill.inference.prefixes import batches
from gristmill.inference.runner import Runner
from gristmill.inference.sampler import Sampling
from gristmill.inference.scheduler import EngineConfig
from gristmill.kernels import native
from gristmill.model import Transformer
from gristmill.parallel.ranks import ALONE, Ranks
from gristmill.stop import Stop

TILE_TOKENS = 8192  # positions in one forward pass
SHORTEST = 64  # windows are padded to this times a power of two: few shapes, each of which costs a kernel to compile
LOGITS_ROWS = 512  # positions whose logits stand in memory at once


class Job(NamedTuple):
    sequence: int
    window: Window


class ModelScorer:
    """`window`: the context in tokens, at most the model's `max_seq_len`; normally the length that it trained at.

    stop: checked before each forward pass of `loglikelihood`, which raises StopRequested on all ranks once it is set on
    one. ranks: those that have the model, whole or in parts; all of them call `loglikelihood` with the same sequences
    and share the work.
    """

    def __init__(self, model: Transformer, window: int, ranks: Ranks = ALONE, stop: Stop | None = None) -> None:
        if not 2 <= window <= model.cfg.max_seq_len:
            raise InputError(
                f"context_length={window} must be from 2 to the model's max_seq_len={model.cfg.max_seq_len}"
            )
        self.model = model
        self.window = window
        self.ranks = ranks
        self.stop = stop or Stop()

    @torch.no_grad()  # not inference_mode: FSDP counts the versions of tensors
    def loglikelihood(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Nats of each sequence's tokens after the first; see `gristmill.evaluate.Scorer`."""
        totals = torch.zeros(len(sequences), dtype=torch.float64)
        weight = self.model.wte.weight
        if self.ranks.world_size == 1 and native.serves(weight.new_empty(0, dtype=self.model.compute_dtype)):
            for number, its_nats in self._shared(sequences):
                totals[number] += its_nats
            return totals.tolist()
        for length, jobs in self._tiles(sequences):
            self.ranks.raise_if_set(self.stop)
            mine = jobs[self.ranks.rank :: self.ranks.world_size]
            with self.ranks.meeting():  # all ranks go forward, or a layer would wait
                nats = self._score(sequences, mine or jobs[:1], length)
            if mine:
                totals.index_add_(0, torch.tensor([job.sequence for job in mine]), nats)
        self.ranks.sum(totals)
        return totals.tolist()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        stop_ids: frozenset[int],
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """All prompts together. Raises InputError when a prompt and `max_tokens` exceed the model's context."""
        longest = max((len(prompt) for prompt in prompts), default=0)
        if longest + max_tokens > self.model.cfg.max_seq_len:
            raise InputError(
                f"a prompt of {longest} tokens and {max_tokens} new ones exceed max_seq_len="
                f"{self.model.cfg.max_seq_len}; lower prompt_tokens or sample_tokens"
            )
        return complete(
            self.model, prompts, Sampling(temperature=temperature, top_p=top_p, seed=seed), max_tokens, stop_ids
        )

    def _shared(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[int, float]]:
        """A sequence's number and the nats of one of its windows, on the engine's runner: what windows begin with
        together is computed once."""
        jobs = [job for _, tile in self._tiles(sequences) for job in tile]
        rows = [sequences[number][start:end] for number, (start, end, _) in jobs]
        whole = [first == start for _, (start, _, first) in jobs]  # the others do not have each token's nats
        plan = list(batches(rows, whole, TILE_TOKENS, EngineConfig.block_tokens))
        num_blocks = max((1 + max(max(share.blocks) for share in batch) for batch in plan), default=1)
        runner = Runner(self.model, num_blocks, EngineConfig.block_tokens)
        for batch in plan:
            self.stop.raise_if_set()
            parts, counted, targets, offset = [], [], [], 0
            for share in batch:
                number, (start, end, first) = jobs[share.number]
                job = scheduler.Job(prompt=rows[share.number], max_tokens=0)
                job.blocks = share.blocks
                parts.append(scheduler.Part(job, share.begin, end - start, samples=False))
                skipped = max(0, first - start - share.begin)
                targets.append(sequences[number][start + share.begin + skipped + 1 : end + 1])
                counted.append(torch.arange(skipped, end - start - share.begin) + offset)
                offset += end - start - share.begin
            hidden_TD = runner.run(parts)[torch.cat(counted)]
            nats_T = self._predicted(runner, hidden_TD, torch.tensor([id for ids in targets for id in ids]))
            before = nats_T[:0]
            for share, own in zip(batch, nats_T.split([len(ids) for ids in targets]), strict=True):
                before = torch.cat([before[: share.begin], own])
                yield jobs[share.number].sequence, float(before.sum())

    def _tiles(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[Job]]]:
        """(padded length, windows to run together), longest first."""
        by_length: dict[int, list[Job]] = defaultdict(list)
        for number, sequence in enumerate(sequences):
            for window in windows(len(sequence) - 1, self.window):
                by_length[self._padded(window.end - window.start)].append(Job(number, window))
        for length in sorted(by_length, reverse=True):
            jobs = by_length[length]
            rows = max(1, TILE_TOKENS // length) * self.ranks.world_size
            for start in range(0, len(jobs), rows):
                yield length, jobs[start : start + rows]

    def _padded(self, length: int) -> int:
        padded = SHORTEST
        while padded < length:
            padded *= 2
        return min(padded, self.window)

    def _score(self, sequences: Sequence[Sequence[int]], jobs: list[Job], length: int) -> Tensor:
        """[jobs] nats in float64."""
        rows = 1 << (len(jobs) - 1).bit_length()  # a last, smaller tile: again few shapes
        tokens = torch.zeros(rows, length, dtype=torch.long)
        targets = torch.full((rows, length), -1)
        for row, (number, (start, end, first)) in enumerate(jobs):
            tokens[row, : end - start] = torch.tensor(sequences[number][start:end])
            targets[row, first - start : end - start] = torch.tensor(sequences[number][first + 1 : end + 1])
        device = self.model.wte.weight.device
        positions = torch.arange(length, device=device).expand(rows, -1)
        hidden, _ = self.model(tokens.to(device), positions, causal)
        counted = (targets.flatten() >= 0).nonzero().squeeze(1)
        nats = self._nats(hidden.flatten(0, 1), targets.flatten().to(device), counted.to(device))
        return torch.zeros(rows, dtype=torch.float64).index_add_(0, counted // length, nats.double().cpu())[: len(jobs)]

    def _predicted(self, runner: Runner, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        """[T] in float64: log p of each target."""
        nats = []
        for rows_TD, targets in zip(hidden_TD.split(LOGITS_ROWS), targets_T.split(LOGITS_ROWS), strict=True):
            nats.append(-F.cross_entropy(runner.layers.logits(rows_TD), targets, reduction="none").double())
        return torch.cat(nats)

    def _nats(self, hidden_TD: Tensor, targets_T: Tensor, counted: Tensor) -> Tensor:
        """log p of the counted positions' targets, some rows of logits at a time, always the same number of rows."""
        nats = []
        for chunk in torch.split(counted, LOGITS_ROWS):
            rows = F.pad(chunk, (0, LOGITS_ROWS - len(chunk)), value=int(counted[0]))
            losses = F.cross_entropy(self.model.logits(hidden_TD[rows]), targets_T[rows], reduction="none")
            nats.append(-losses[: len(chunk)])
        return torch.cat(nats)


def causal(layer: int, q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor) -> Tensor:
    """Attention of whole sequences from their first token on; right padding is behind everything that counts."""
    q, k, v = (x.transpose(1, 2) for x in (q_BSHC, k_BSGC, v_BSGC))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
