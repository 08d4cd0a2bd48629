"""The gradient of one global batch: this rank's sequences, a micro-batch at a time, added up over all ranks."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from gristmill.artifact import write_atomically
from gristmill.errors import Failure
from gristmill.kernels.loss import cross_entropy
from gristmill.model import Transformer, packed
from gristmill.parallel.context import share_sequences
from gristmill.parallel.mesh import Mesh
from gristmill.parallel.ranks import ALONE, Ranks
from gristmill.progress import console
from gristmill.stop import Stop, StopRequested
from gristmill.streaming.batches import Batch
from gristmill.train.balance import Balance
from gristmill.train.config import TrainConfig
from gristmill.train.figures import Sums

MICRO_BATCH = "micro_batch.json"  # in the training's folder: what memory had room for, when that was less than asked


class Gradients:
    """Leaves in each parameter the gradient of the mean loss over all tokens of the global batch.

    Args:
        folder: A smaller micro-batch is recorded here.
        mesh: The mesh of a sharded model; None if every rank has all weights.
        stop: Checked while a batch is computed.
    """

    def __init__(
        self,
        model: Transformer,
        cfg: TrainConfig,
        balance: Balance,
        num_sources: int,
        folder: Path,
        ranks: Ranks = ALONE,
        mesh: Mesh | None = None,
        stop: Stop | None = None,
    ) -> None:
        self.model, self.cfg, self.balance, self.num_sources = model, cfg, balance, num_sources
        self.ranks, self.mesh, self.stop = ranks, mesh, stop or Stop()
        self.note = folder / MICRO_BATCH
        self.micro_batch = ranks.from_first(self._noted())
        if self.micro_batch < cfg.micro_batch:
            said = f"  train.micro_batch={cfg.micro_batch} had no room here before: {self.micro_batch} ({self.note})"
            console.print(said, style="yellow", markup=False)

    def of(self, batch: Batch | None) -> Sums:
        """Compute the gradient of one global batch.

        A single rank checks `stop` before each micro-batch. Several ranks agree to stop before the first one, because
        after that they wait for each other in collectives.

        Args:
            batch: This rank's part; None if a stop ended the wait for it.

        Raises:
            StopRequested: On all ranks, when one of them was asked to stop. No gradient is left.
            Failure: One sequence does not fit into memory.
        """
        if self.ranks.any(batch is None or self.stop.is_set()):
            raise StopRequested
        assert batch is not None
        sums = self._attempt(batch)
        while sums is None:
            self._halve()
            sums = self._attempt(batch)
        self.ranks.sum(sums.nll_N, sums.tokens_N, sums.balance, sums.counts_LE)
        if not self.mesh:
            self.ranks.sum(*(param.grad for param in self.model.parameters() if param.grad is not None))
        return sums

    def _attempt(self, batch: Batch) -> Sums | None:
        """None when memory ran out; the tensors that filled it are freed when this returns."""
        try:
            with self.ranks.meeting():
                return self._own(batch)
        except RuntimeError as problem:
            if not out_of_memory(problem):
                raise
            return None

    def _own(self, batch: Batch) -> Sums:
        """This rank's part of the sums; its gradients, or with a mesh those of all."""
        model, cfg = self.model, self.cfg
        device = model.output_weight.device
        sums = Sums.zero(self.num_sources, model.cfg, device)
        arrays = (batch.tokens, batch.targets, batch.positions, batch.document_ids, batch.sources)
        tensors = [torch.from_numpy(array).to(device) for array in arrays]
        for start in range(0, len(batch.tokens), self.micro_batch):
            if self.ranks.world_size == 1 and self.stop.is_set():
                self._drop()
                raise StopRequested
            end = start + self.micro_batch
            if self.mesh:
                assert isinstance(model, FSDPModule)
                model.set_requires_all_reduce(end >= len(batch.tokens))  # repeats of the shards meet once a batch
            tokens, targets, positions, documents, sources = (t[start:end] for t in tensors)
            if self.mesh and self.mesh.context:
                columns, attend = share_sequences(documents, self.mesh.context)
                tokens, targets, positions = (t[:, columns] for t in (tokens, targets, positions))
            else:
                attend = packed(documents)
            hidden, routing = model(tokens, positions, attend)
            nll_sum, nll_T = cross_entropy(hidden.flatten(0, 1), model.output_weight, targets.flatten())
            share = tokens.numel() / cfg.batch_tokens
            balance = self.balance.loss(routing, sums.counts_LE + routing.counts_LE) * share
            (nll_sum / cfg.batch_tokens + balance).backward()
            nll_N = torch.zeros_like(sums.nll_N).index_add_(0, sources, nll_T.detach().view_as(tokens).double().sum(1))
            lengths = torch.full_like(sources, tokens.shape[1], dtype=torch.float64)
            tokens_N = torch.zeros_like(sums.tokens_N).index_add_(0, sources, lengths)
            sums.add(nll_N, tokens_N, balance.detach(), routing.counts_LE)
        return sums

    def _drop(self) -> None:
        for param in self.model.parameters():
            param.grad = None

    @property
    def _asked(self) -> dict[str, Any]:
        """What decides how much memory a micro-batch takes."""
        layout = asdict(self.mesh.layout) if self.mesh else None
        names = ("micro_batch", "seq_len", "recompute")
        return {"layout": layout, **{name: getattr(self.cfg, name) for name in names}}

    def _noted(self) -> int:
        try:
            note = json.loads(self.note.read_text())
            return int(note["fits"]) if note["asked"] == self._asked else self.cfg.micro_batch
        except (OSError, ValueError, KeyError, TypeError):
            return self.cfg.micro_batch

    def _halve(self) -> None:
        """Go on with half the micro-batch; one rank of many cannot, since the others wait for it somewhere inside."""
        cfg, tried = self.cfg, self.micro_batch
        if tried == 1:
            raise Failure(
                f"rank {self.ranks.rank} has no memory for one sequence of train.seq_len={cfg.seq_len}: set "
                "train.recompute=full, raise train.parallel.shard or context, or lower seq_len"
            )
        self.micro_batch = tried // 2
        write_atomically(self.note, json.dumps({"asked": self._asked, "fits": self.micro_batch}).encode())
        said = f"rank {self.ranks.rank} has no memory for train.micro_batch={tried}: {self.micro_batch} from here on"
        if self.ranks.world_size > 1:
            raise Failure(f"{said}; run the same command, or torchrun with --max-restarts, which does it by itself")
        console.print(f"  {said}, in the same batches", style="yellow", markup=False)
        self._drop()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def out_of_memory(problem: RuntimeError) -> bool:
    return isinstance(problem, torch.OutOfMemoryError) or "can't allocate memory" in str(problem)
