"""Computes the memory that a rank needs for training, from the shapes that the code allocates.

Follows memory through the phases of a step (the loss, the backward pass of the last block, of the first block, the
optimizer) and reports the highest. All bytes are those of one rank, the one that needs the most.

Shapes, as in model/transformer.py: T tokens of a micro-batch on this rank, D model, H query heads, G key/value heads,
C head size, L layers, E experts, K experts per token, F hidden, V vocabulary, P padded rows of the experts.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil, prod
from typing import Literal, get_args

from gristmill.kernels import experts as cpu_experts
from gristmill.kernels.gpu import experts as gpu_experts
from gristmill.kernels.loss import chunk_tokens
from gristmill.model import ModelConfig, Recompute
from gristmill.model.counts import DTYPE_BYTES
from gristmill.parallel.config import Layout

RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
FP32 = DTYPE_BYTES["float32"]
# Assumed rows of the busiest rank's experts over the mean, with expert parallelism. A run's own figures replace them.
FEW_EXPERTS_LOAD = 2.0  # a rank with one or two experts
BUSIEST_EXPERT = 3.6  # one expert: the highest load of any training here (docs/LOG.md)
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "all-gather buffers",
    "reduce-scatter buffers",
    "all-to-all buffers",
    "logits and loss",
    "working memory",
)


@dataclass(frozen=True, kw_only=True)
class OptimizerCost:
    """Memory and work of an optimizer. Each class in train/optim defines its own.

    Args:
        name: as in `train.optimizer.name`.
        bytes_per_parameter: state per parameter that is not part of a hidden matrix.
        bytes_per_matrix_parameter: state per parameter of a hidden matrix.
        batch_numel: device type -> numbers of the matrices that the optimizer processes together; empty if it updates
            each parameter in place.
        iterations: matrix iterations of an update; 0 if it updates each parameter in place.
    """

    name: str
    bytes_per_parameter: int
    bytes_per_matrix_parameter: int
    batch_numel: Mapping[str, int] = field(default_factory=dict)
    iterations: int = 0


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training, independent of the number of GPUs.

    Args:
        dtype: dtype of the arithmetic; masters, gradients and moments are fp32.
        expert_loads: number of ranks that share the experts -> rows of the busiest rank's experts over the mean. None:
            use the assumptions.
    """

    model: ModelConfig
    seq_len: int
    batch_tokens: int
    optimizer: OptimizerCost
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    expert_loads: Mapping[int, float] | None = None

    @property
    def width(self) -> int:
        """Bytes per number of the arithmetic."""
        return DTYPE_BYTES[self.dtype]

    @property
    def sequences(self) -> int:
        return self.batch_tokens // self.seq_len


@dataclass(frozen=True, kw_only=True)
class Way:
    """The settings of a training that a plan chooses: layout, sequences per micro-batch, recomputation."""

    layout: Layout
    micro_batch: int
    recompute: Recompute = "none"
    on_gpu: bool = True


@dataclass(frozen=True)
class Weight:
    """A parameter that the model has once or once per layer (`copies`). `room`: the FSDP group that gathers it."""

    name: str
    shape: tuple[int, ...]
    copies: int
    room: Literal["embedding", "root", "block", "experts"]
    matrix: bool = False  # a hidden matrix, which Muon updates

    @property
    def numel(self) -> int:
        return prod(self.shape)


@lru_cache(maxsize=8)
def weights(cfg: ModelConfig) -> list[Weight]:
    """Return all parameters of model/transformer.py under their names there."""
    assert cfg.vocab_size is not None
    D, L, V, F, E, C = cfg.d_model, cfg.n_layers, cfg.vocab_size, cfg.ffn_hidden_size, cfg.moe_num_experts, cfg.head_dim
    found = [Weight("wte.weight", (V, D), 1, "embedding"), Weight("norm_f.weight", (D,), 1, "root")]
    if not cfg.tie_word_embeddings:
        found.append(Weight("lm_head.weight", (V, D), 1, "root"))
    heads = (cfg.n_heads + 2 * cfg.kv_n_heads) * C
    block = {"norm_1.weight": (D,), "norm_2.weight": (D,)}
    if cfg.qk_norm:
        block |= {"attn.q_norm.weight": (C,), "attn.k_norm.weight": (C,)}
    found += [Weight(f"blocks.*.{name}", shape, L, "block") for name, shape in block.items()]
    matrices = {"attn.Wqkv.weight": (heads, D), "attn.out_proj.weight": (D, cfg.n_heads * C)}
    match cfg.ffn:
        case "moe":
            found.append(Weight("blocks.*.ffn.router.weight", (E, D), L, "block"))
            stacks = [f"blocks.*.ffn.experts.{name}" for name in ("w1", "v1", "w2")]
            found += [Weight(name, (E, F, D), L, "experts", True) for name in stacks]
        case "dense":
            matrices |= {f"ffn.{name}": (F, D) for name in ("w1", "v1", "w2")}
    return found + [Weight(f"blocks.*.{name}", shape, L, "block", True) for name, shape in matrices.items()]


def local_shape(weight: Weight, layout: Layout) -> tuple[int, ...]:
    """Return the shape of rank 0's shard.

    FSDP splits the first dimension and rounds up. Of the experts' stacks it splits F, after expert parallelism has
    split E.
    """
    if weight.room == "experts":
        E, F, D = weight.shape
        return (E // layout.expert, F // layout.expert_split, D)
    return (ceil(weight.shape[0] / layout.split), *weight.shape[1:])


def local_numel(weight: Weight, layout: Layout) -> int:
    return prod(local_shape(weight, layout))


def param_bytes(cfg: ModelConfig, layout: Layout) -> int:
    """Return the bytes of the fp32 masters that rank 0 stores, including padding."""
    return FP32 * sum(weight.copies * local_numel(weight, layout) for weight in weights(cfg))


def expert_load(training: Training, layout: Layout) -> float:
    """Return the rows of the busiest rank's experts over the mean; 1 without expert parallelism.

    Without figures of a run, a rank with one or two experts is assumed to get twice the mean. A rank with more experts
    is assumed to have one expert that is as busy as the busiest of any training here; the others share the rest evenly.
    """
    experts, ranks = training.model.moe_num_experts, layout.expert
    if ranks == 1:
        return 1.0
    if training.expert_loads is not None:
        return training.expert_loads[ranks]
    here = experts // ranks
    if here <= 2:
        return FEW_EXPERTS_LOAD
    others = (experts - BUSIEST_EXPERT) / (experts - 1)
    return (BUSIEST_EXPERT + (here - 1) * others) / here


@dataclass(frozen=True)
class Moment:
    """The memory in use at one point of a step: bytes by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def highest(training: Training, way: Way) -> Moment:
    """Return the point of a step that needs the most memory."""
    return max(Footprint(training, way).moments(), key=lambda moment: moment.total)


class Footprint:
    """The sizes from which the moments of a step are computed."""

    def __init__(self, training: Training, way: Way) -> None:
        cfg, layout = training.model, way.layout
        self.cfg, self.way, self.training = cfg, way, training
        self.a = training.width
        self.split = layout.split > 1
        self.tokens = ceil(way.micro_batch * training.seq_len / layout.context)
        table = weights(cfg)
        local = [(weight, weight.copies * local_numel(weight, layout)) for weight in table]
        cost = training.optimizer
        self.state = FP32 * sum(numel for _, numel in local)
        state_bytes = {True: cost.bytes_per_matrix_parameter, False: cost.bytes_per_parameter}
        self.moments_bytes = sum(numel * state_bytes[weight.matrix] for weight, numel in local)
        # Parameters of one block and of the root after the gather: all of them, except the experts of other ranks.
        self.dense = sum(weight.numel for weight in table if weight.room == "block")
        self.stacks = sum(weight.numel for weight in table if weight.room == "experts") // layout.expert
        self.root = sum(weight.numel for weight in table if weight.room == "root")
        self.vocabulary = cfg.d_model * (cfg.vocab_size or 0)
        self.chunk = min(chunk_tokens(cfg.vocab_size or 1), self.tokens)  # tokens of a chunk of the loss
        # For Muon: the largest matrix, and this rank's bytes of the largest set of matrices of one shape.
        matrices = [weight for weight in table if weight.matrix]
        self.matrix = max(weight.shape[-1] * weight.shape[-2] for weight in matrices)
        alike: Counter[tuple[int, ...]] = Counter()
        for weight in matrices:
            alike[weight.shape] += FP32 * weight.copies * local_numel(weight, layout)
        self.alike = max(alike.values())
        # FSDP gathers in the dtype of the arithmetic. Gradients have it too until they are reduced in fp32.
        self.gathered = self.a if self.split else FP32
        self.casts = self.gathered > self.a  # masters are cast when they are used
        # The embedding is gathered in fp32, and stays gathered if it is also the output.
        self.root_bytes = self.gathered * self.root + (FP32 * self.vocabulary if cfg.tie_word_embeddings else 0)
        self.output_bytes = (FP32 if cfg.tie_word_embeddings else self.gathered) * self.vocabulary
        self.micro_batches = max(1, training.sequences // (layout.data * way.micro_batch))
        self.load = expert_load(training, layout)
        self.rows, self.padded = self._rows()

    def _rows(self) -> tuple[int, int]:
        """Return (rows of this rank's experts, the same with padding)."""
        cfg, layout = self.cfg, self.way.layout
        assignments = self.tokens * cfg.moe_top_k
        if cfg.ffn == "dense":
            return self.tokens, self.tokens
        rows = ceil(assignments * self.load)
        experts = cfg.moe_num_experts // layout.expert
        if self.way.on_gpu:  # allocated for the most padding that any routing can need
            by_torch = gpu_experts.grouped_mm_supports(self.training.dtype, (cfg.ffn_hidden_size, cfg.d_model))
            return rows, rows + experts * gpu_experts.tile_rows(rows, experts, by_torch)
        return rows, rows + experts * cpu_experts.tile_rows(rows, experts) // 2

    # ---- activations ------------------------------------------------------------------------------------

    def block_input(self) -> int:
        return self.tokens * self.cfg.d_model * self.a

    def attention_kept(self) -> int:
        """Bytes of norm_1's output, q, k, v before and after rotation, the output, its log-sum-exp, norm_2's input."""
        cfg, T, a, context = self.cfg, self.tokens, self.a, self.way.layout.context
        query, key = cfg.n_heads * cfg.head_dim, cfg.kv_n_heads * cfg.head_dim
        if cfg.qk_norm:  # the values are views of the projection's output; a CPU copies the normalized heads
            turned = 2 * query + 3 * key + (0 if self.way.on_gpu else query + key)
            turned += query + 2 * key if cfg.clip_qkv is not None else 0
        else:
            turned = (query + 2 * key) * (2 if cfg.clip_qkv is not None else 1)
        kept = T * a * (2 * cfg.d_model + turned + query) + T * FP32 * (cfg.n_heads + 4)
        if context > 1:  # keys and values of all positions; the output as two halves and as a whole
            kept += T * a * (2 * key * context + query)
        if self.casts:
            kept += a * cfg.d_model * (2 * query + 2 * key)
        return kept

    def ffn_kept(self) -> int:
        """Bytes of norm_2's output, the router (fp32 input, probabilities, choice), h = [gate, up], the row indices."""
        cfg, T, a = self.cfg, self.tokens, self.a
        D, E, K, F = cfg.d_model, cfg.moe_num_experts, cfg.moe_top_k, cfg.ffn_hidden_size
        if cfg.ffn == "dense":
            return T * a * (D + 4 * F) + (3 * F * D * a if self.casts else 0)
        exchanged = self.way.layout.expert > 1
        steps = 3 if self.way.on_gpu else 1  # from the chosen probabilities to the weights
        kept = T * FP32 * (E + steps * K) + T * K * 8 + (T * D * FP32 if a < FP32 else 0)
        if a == FP32 or not exchanged or self.way.recompute == "selective":
            kept += T * D * a
        if cfg.moe_jitter_eps:
            kept += T * D * FP32 * (1 if a < FP32 else 2)
        index = 4 if self.way.on_gpu else 8
        kept += self.padded * (2 * F * a + FP32 + index) + self.rows * index
        return kept + (self.rows * D * a if exchanged else 0)  # rows from the other ranks

    def kept_by_block(self) -> int:
        """Bytes that a block keeps for its backward pass."""
        match self.way.recompute:
            case "none":
                return self.block_input() + self.attention_kept() + self.ffn_kept()
            case "selective":
                return self.block_input() + self.attention_kept() + self.tokens * self.cfg.d_model * self.a
            case "full":
                return self.block_input()

    def _around(self) -> int:
        """Bytes of the rotary angles, the last norm's input, and the final hidden states, which the loop references."""
        return self.tokens * self.cfg.head_dim * FP32 + 2 * self.block_input()

    def matrices(self) -> list[tuple[int, int, int]]:
        """Return (rows, columns, count) of the matrices that Muon orthogonalizes on the busiest rank.

        The ranks of a shard divide the whole matrices among them.
        """
        layout, found = self.way.layout, []
        for weight in weights(self.cfg):
            if weight.matrix:
                few, many = sorted(weight.shape[-2:])
                stacked = weight.shape[0] // layout.expert if weight.room == "experts" else 1
                among = layout.expert_split if weight.room == "experts" else layout.split
                found.append((few, many, ceil(weight.copies * stacked / among)))
        return found

    # ---- weights and gradients --------------------------------------------------------------------------

    def _gradients(self, above: int, output: bool = True, more: int = 0) -> int:
        """Return the bytes of the fp32 gradients once `above` blocks, and the output if `output`, have theirs.

        With several micro-batches, all gradients of the earlier ones exist; without FSDP, `more` new numbers exist in
        addition until they are added.
        """
        if self.micro_batches > 1:
            return self.state + (0 if self.split else FP32 * more)
        if self.split:
            return self.state * above // self.cfg.n_layers
        return FP32 * (self.vocabulary * output + above * (self.dense + self.stacks) + more)

    def _gathered(self, stacks: int = 0, dense: int = 0) -> int:
        """Bytes that FSDP has gathered: the root, `stacks` blocks' experts and `dense` blocks' other weights."""
        if not self.split:
            return 0
        return self.root_bytes + self.gathered * (stacks * self.stacks + dense * self.dense)

    def _fresh(self, numel: int, output: bool = True) -> int:
        """Bytes of gradients that FSDP has not reduced yet; the output's wait for the embedding's."""
        return self.gathered * numel + self.output_bytes * output if self.split else 0

    # ---- moments ----------------------------------------------------------------------------------------

    def moments(self) -> Iterator[Moment]:
        yield self._loss_forward()
        yield self._loss_backward()
        L = self.cfg.n_layers
        for layer in sorted({L - 1, max(L - 2, 0), 0}):
            if self.split:
                yield self._experts_gathered(layer)
            yield self._experts_backward(layer)
            if self.split:
                yield self._experts_reduced(layer)
            yield self._attention_backward(layer)
        yield self._root_reduced()
        yield self._optimizer()

    def _moment(
        self, name: str, *, gradients: int, kept: int, gather: int = 0, scatter: int = 0, exchange: int = 0,
        loss: int = 0, work: int = 0,
    ) -> Moment:  # fmt: skip
        sizes = (self.state, gradients, self.moments_bytes, kept, gather, scatter, exchange, loss, work)
        return Moment(name, dict(zip(PARTS, sizes, strict=True)))

    def _loss_forward(self) -> Moment:
        T, a, whole, chunk = self.tokens, self.a, self.vocabulary, self.chunk
        logits = chunk * (self.cfg.vocab_size or 0) * a * (2 if chunk < T else 1)  # the last chunk's, and the next
        weight = whole * (FP32 + a + (a if self.casts else 0))  # its gradient, a chunk's part of it, the cast
        kept = self.cfg.n_layers * self.kept_by_block() + self._around()
        return self._moment("in the loss", gradients=self._gradients(0, output=False), kept=kept,
                            gather=self._gathered(), loss=logits + weight + self.block_input())  # fmt: skip

    def _loss_backward(self) -> Moment:
        weight = self.vocabulary * (2 * FP32 + (self.gathered if self.gathered < FP32 else 0))
        kept = self.cfg.n_layers * self.kept_by_block() + self._around()
        return self._moment("in the loss's backward pass", gradients=self._gradients(0, output=False), kept=kept,
                            gather=self._gathered(), loss=weight + 2 * self.block_input())  # fmt: skip

    def _kept_below(self, layer: int) -> int:
        """Bytes during a block's backward pass that are not its own: activations of the blocks below, and the gradient
        of the residual stream."""
        return layer * self.kept_by_block() + self._around() + self.block_input()

    def _whole_block(self) -> int:
        return self.block_input() + self.attention_kept() + self.ffn_kept()

    def _experts_gathered(self, layer: int) -> Moment:
        """The stacks exist three times: as received, in rank order, and as used, because they are split along F."""
        times = 3 if self.cfg.ffn == "moe" else 0
        return self._moment(f"when the experts of block {layer} are gathered",
                            gradients=self._gradients(self.cfg.n_layers - 1 - layer),
                            kept=self._kept_below(layer) + self._whole_block(), gather=self._gathered(times, 1),
                            scatter=self._pending(layer), work=self._fresh(0))  # fmt: skip

    def _pending(self, layer: int) -> int:
        """Bytes of the previous block that are still being reduced."""
        return FP32 * self.dense if self.split and layer < self.cfg.n_layers - 1 else 0

    def _experts_backward(self, layer: int) -> Moment:
        exchange = 0
        if self.way.layout.expert > 1:  # the gradients of the rows received and of the rows sent
            exchange = (self.rows + self.tokens * self.cfg.moe_top_k) * self.cfg.d_model * self.a
        work = self._experts_work() if self.cfg.ffn == "moe" else self._dense_work()
        return self._moment(f"in the experts' backward pass of block {layer}",
                            gradients=self._gradients(self.cfg.n_layers - 1 - layer, more=self.stacks),
                            kept=self._kept_below(layer) + self._whole_block(), gather=self._gathered(1, 2),
                            scatter=self._pending(layer), exchange=exchange,
                            work=work + self._fresh(self.stacks))  # fmt: skip

    def _experts_work(self) -> int:
        cfg, T, P, a = self.cfg, self.tokens, self.padded, self.a
        D, F, local = cfg.d_model, cfg.ffn_hidden_size, cfg.moe_num_experts // self.way.layout.expert
        stack = local * F * D
        if not self.way.on_gpu:  # one expert at a time, in blocks of rows
            rows = min(cpu_experts.BLOCK_ROWS, ceil(P / local))
            cast = 3 * F * D * a if self.casts else 2 * F * D * a
            return P * D * a + T * D * a + rows * a * (2 * D + 4 * F) + 3 * F * D * a + cast
        cast = (3 if self.casts else 2) * stack * a  # gate and up stacked; down too if it is fp32
        down = 0 if self.split else stack * a  # dw2 before the cast to fp32; otherwise it counts as a gradient
        first = P * a * (D + F + 2 * F)  # dy, da (which becomes the activation), dh; h is counted as kept
        second = P * a * (2 * F + D) + down + 2 * stack * a  # dh, x, and dgate_up, whose halves are copied
        return cast + max(first, second) + T * D * a

    def _dense_work(self) -> int:
        return self.tokens * self.a * (3 * self.cfg.ffn_hidden_size + self.cfg.d_model)

    def _experts_reduced(self, layer: int) -> Moment:
        """Their gradients are brought into rank order, one stack at a time, and copied in fp32."""
        return self._moment(f"when the experts' gradients of block {layer} are reduced",
                            gradients=self._gradients(self.cfg.n_layers - 1 - layer),
                            kept=self._kept_below(layer) + self.block_input() + self.attention_kept(),
                            gather=self._gathered(0, 2), scatter=FP32 * self.stacks,
                            work=self._fresh(self.stacks * 4 // 3))  # fmt: skip

    def _attention_backward(self, layer: int) -> Moment:
        """On a CPU, dk and dv are computed in fp32 per query head before the heads that share a key head are summed."""
        cfg, T, a = self.cfg, self.tokens, self.a
        query, key = cfg.n_heads * cfg.head_dim, cfg.kv_n_heads * cfg.head_dim
        keys = T * self.way.layout.context
        work = T * query * 2 * a + (keys * key * 4 * a if self.way.on_gpu else keys * query * 2 * FP32 + keys * key * a)
        scatter = FP32 * (self.stacks or self.dense) if self.split else 0
        return self._moment(f"in the attention's backward pass of block {layer}",
                            gradients=self._gradients(self.cfg.n_layers - layer),
                            kept=self._kept_below(layer) + self.block_input() + self.attention_kept(),
                            gather=self._gathered(0, 2), scatter=scatter,
                            work=work + self._fresh(self.dense))  # fmt: skip

    def _root_reduced(self) -> Moment:
        embedding = FP32 * self.vocabulary if self.split else 0
        again = 0 if self.cfg.tie_word_embeddings else embedding  # FSDP gathers it again although nothing uses it
        return self._moment("when the embedding's gradient is reduced", gradients=self.state, kept=self._around(),
                            gather=self._gathered() + again, scatter=embedding,
                            work=self._fresh(self.root, output=False) + embedding)  # fmt: skip

    def _optimizer(self) -> Moment:
        work = 0
        if batches := self.training.optimizer.batch_numel:
            numel = max(batches["cuda" if self.way.on_gpu else "cpu"], self.matrix)
            work = numel * (2 * FP32 + 2 * self.a)  # the momentum, two copies in the dtype, the update
            if self.split:  # whole matrices: as sent, as received, as updated, as returned
                work += 4 * FP32 * numel
        return self._moment("in the optimizer", gradients=self.state, kept=self.block_input(), work=work)
