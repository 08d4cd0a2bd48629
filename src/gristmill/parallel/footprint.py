"""What a rank holds in memory while it trains: by arithmetic alone, from what the code allocates.

Memory is followed through a step's moments (the loss, the backward pass of the last block, of the first, the
optimizer); the highest of them is the need. Bytes are of one rank, the one with the most.

Shapes, as in model/transformer.py: T tokens of a micro-batch on this rank, D model, H query heads, G key/value heads,
C head size, L layers, E experts, K experts a token, F hidden, V vocabulary, P rows of the experts, padded.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from typing import Literal

from gristmill.model.config import ModelConfig
from gristmill.parallel.config import Layout, Recompute

RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
FP32 = 4
CHUNK_LOGITS = 2**26  # kernels/loss.py
BLOCK_ROWS = 4096  # kernels/experts.py
MUON_NUMEL = {False: 2**20, True: 2**26}  # train/muon.py, on a CPU and on a GPU
# Rows of the busiest rank's experts over the mean, with expert parallelism: assumptions, where no run says more.
FEW_EXPERTS_LOAD = 2.0  # of a rank with one or two experts
BUSIEST_EXPERT = 3.6  # of one expert, the most that a training here had (docs/LOG.md)
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
class Training:
    """What is trained, on any number of GPUs. `dtype`: of the arithmetic; masters, gradients and moments are fp32.
    `expert_loads`: ranks that share the experts -> rows of the busiest rank's experts over the mean; None assumes."""

    model: ModelConfig
    seq_len: int
    batch_tokens: int
    optimizer: Literal["adamw", "muon"] = "adamw"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    expert_loads: Mapping[int, float] | None = None

    @property
    def width(self) -> int:
        """Bytes of a number of the arithmetic."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def sequences(self) -> int:
        return self.batch_tokens // self.seq_len


@dataclass(frozen=True, kw_only=True)
class Way:
    """How it is trained: where it lies, sequences at a time, and what is computed again."""

    layout: Layout
    micro_batch: int
    recompute: Recompute = "none"
    on_gpu: bool = True


@dataclass(frozen=True)
class Weight:
    """A parameter of which the model has `copies`: one, or one a layer. `room`: what gathers it, or the experts."""

    name: str
    shape: tuple[int, ...]
    copies: int
    room: Literal["embedding", "root", "block", "experts"]
    matrix: bool = False  # that Muon takes

    @property
    def numel(self) -> int:
        return prod(self.shape)


@lru_cache(maxsize=8)
def weights(cfg: ModelConfig) -> list[Weight]:
    """All parameters of model/transformer.py, under their names there."""
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
    """What rank 0 stores of it. FSDP cuts the first dimension and rounds up; of the experts' stacks it cuts F, after
    expert parallelism has cut E."""
    if weight.room == "experts":
        E, F, D = weight.shape
        return (E // layout.expert, F // layout.expert_split, D)
    return (ceil(weight.shape[0] / layout.split), *weight.shape[1:])


def local_numel(weight: Weight, layout: Layout) -> int:
    return prod(local_shape(weight, layout))


def param_bytes(cfg: ModelConfig, layout: Layout) -> int:
    """fp32 masters that rank 0 stores, padding included."""
    return FP32 * sum(weight.copies * local_numel(weight, layout) for weight in weights(cfg))


def expert_load(training: Training, layout: Layout) -> float:
    """Rows of the busiest rank's experts over the mean. 1 without expert parallelism: each rank then has all experts.

    Where no run says more, a rank with one or two experts gets twice the mean. A rank with more has one expert that is
    as busy as any was in a training here, and the other experts share the rest evenly.
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
    """What lies in memory at once: bytes by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def highest(training: Training, way: Way) -> Moment:
    """The moment of a step that needs the most."""
    return max(Footprint(training, way).moments(), key=lambda moment: moment.total)


class Footprint:
    """The sizes that the moments are made of."""

    def __init__(self, training: Training, way: Way) -> None:
        cfg, layout = training.model, way.layout
        self.cfg, self.way, self.training = cfg, way, training
        self.a = training.width
        self.split = layout.split > 1
        self.tokens = ceil(way.micro_batch * training.seq_len / layout.context)
        table = weights(cfg)
        local = [(weight, weight.copies * local_numel(weight, layout)) for weight in table]
        moments = 1 if training.optimizer == "muon" else 2
        self.state = FP32 * sum(numel for _, numel in local)
        self.moments_bytes = FP32 * sum(numel * (moments if weight.matrix else 2) for weight, numel in local)
        # Numbers of one block, and of the root, as they are gathered: whole but for the experts of other ranks.
        self.dense = sum(weight.numel for weight in table if weight.room == "block")
        self.stacks = sum(weight.numel for weight in table if weight.room == "experts") // layout.expert
        self.root = sum(weight.numel for weight in table if weight.room == "root")
        self.vocabulary = cfg.d_model * (cfg.vocab_size or 0)
        self.chunk = min(max(CHUNK_LOGITS // (cfg.vocab_size or 1), 256), 2048, self.tokens)  # tokens, of the loss
        # Muon's: the largest matrix, and what this rank has of all that are alike.
        matrices = [weight for weight in table if weight.matrix]
        self.matrix = max(weight.shape[-1] * weight.shape[-2] for weight in matrices)
        alike: Counter[tuple[int, ...]] = Counter()
        for weight in matrices:
            alike[weight.shape] += FP32 * weight.copies * local_numel(weight, layout)
        self.alike = max(alike.values())
        # FSDP gathers in the arithmetic's dtype, and gradients come in it before they are reduced in fp32.
        self.gathered = self.a if self.split else FP32
        self.casts = self.gathered > self.a  # masters are cast where they are used
        # The embedding comes in fp32, and stays where it is the output too.
        self.root_bytes = self.gathered * self.root + (FP32 * self.vocabulary if cfg.tie_word_embeddings else 0)
        self.output_bytes = (FP32 if cfg.tie_word_embeddings else self.gathered) * self.vocabulary
        self.micro_batches = max(1, training.sequences // (layout.data * way.micro_batch))
        self.load = expert_load(training, layout)
        self.rows, self.padded = self._rows()

    def _rows(self) -> tuple[int, int]:
        """(rows that this rank's experts get, the same with padding)."""
        cfg, layout = self.cfg, self.way.layout
        assignments = self.tokens * cfg.moe_top_k
        if cfg.ffn == "dense":
            return self.tokens, self.tokens
        rows = ceil(assignments * self.load)
        experts = cfg.moe_num_experts // layout.expert
        if self.way.on_gpu:  # laid out for the most that padding can need; 128 is Triton's tile
            by_torch = self.a == 2 and cfg.d_model % 8 == 0 and cfg.ffn_hidden_size % 8 == 0
            return rows, rows + experts * (16 if by_torch or rows < 64 * experts else 128)
        tile = 128 if rows >= 128 * experts else 16
        return rows, rows + experts * tile // 2

    # ---- activations ------------------------------------------------------------------------------------

    def block_input(self) -> int:
        return self.tokens * self.cfg.d_model * self.a

    def attention_kept(self) -> int:
        """norm_1's output, q, k and v before and after they turn, the output and its log-sum-exp, norm_2's input."""
        cfg, T, a, context = self.cfg, self.tokens, self.a, self.way.layout.context
        query, key = cfg.n_heads * cfg.head_dim, cfg.kv_n_heads * cfg.head_dim
        if cfg.qk_norm:  # the values stay where the projection put them, and a CPU copies what it norms
            turned = 2 * query + 3 * key + (0 if self.way.on_gpu else query + key)
            turned += query + 2 * key if cfg.clip_qkv is not None else 0
        else:
            turned = (query + 2 * key) * (2 if cfg.clip_qkv is not None else 1)
        kept = T * a * (2 * cfg.d_model + turned + query) + T * FP32 * (cfg.n_heads + 4)
        if context > 1:  # keys and values of all positions; the output of two halves, and the whole of it
            kept += T * a * (2 * key * context + query)
        if self.casts:
            kept += a * cfg.d_model * (2 * query + 2 * key)
        return kept

    def ffn_kept(self) -> int:
        """norm_2's output, the router's (fp32 input, probabilities, choice), h = [gate, up] and where each row goes."""
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
        return kept + (self.rows * D * a if exchanged else 0)  # what came from the other ranks

    def kept_by_block(self) -> int:
        """Of a block whose backward pass is not under way."""
        match self.way.recompute:
            case "none":
                return self.block_input() + self.attention_kept() + self.ffn_kept()
            case "selective":
                return self.block_input() + self.attention_kept() + self.tokens * self.cfg.d_model * self.a
            case "full":
                return self.block_input()

    def _around(self) -> int:
        """The rotary angles, the last norm's input, and the final hidden states, which the loop holds on to."""
        return self.tokens * self.cfg.head_dim * FP32 + 2 * self.block_input()

    def matrices(self) -> list[tuple[int, int, int]]:
        """(rows, columns, how many) of what Muon orthogonalises on the rank with the most: whole matrices are shared
        out among the ranks of a shard."""
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
        """fp32 gradients as the optimizer will see them, when `above` blocks and perhaps the output have theirs.

        With several micro-batches those of the earlier ones are all there; without FSDP, `more` new numbers stand
        beside them until they are added.
        """
        if self.micro_batches > 1:
            return self.state + (0 if self.split else FP32 * more)
        if self.split:
            return self.state * above // self.cfg.n_layers
        return FP32 * (self.vocabulary * output + above * (self.dense + self.stacks) + more)

    def _gathered(self, stacks: int = 0, dense: int = 0) -> int:
        """Bytes of so many blocks' experts and of so many blocks' other weights, and the root's, under FSDP."""
        if not self.split:
            return 0
        return self.root_bytes + self.gathered * (stacks * self.stacks + dense * self.dense)

    def _fresh(self, numel: int, output: bool = True) -> int:
        """Gradients under FSDP before they are reduced; the output's wait for the embedding's."""
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
        """While a block's backward pass runs, besides what is its own: what those below keep, and the gradient of the
        residual stream."""
        return layer * self.kept_by_block() + self._around() + self.block_input()

    def _whole_block(self) -> int:
        return self.block_input() + self.attention_kept() + self.ffn_kept()

    def _experts_gathered(self, layer: int) -> Moment:
        """The stacks three times: as they arrive, in order, and as they are used, since they are cut along F."""
        times = 3 if self.cfg.ffn == "moe" else 0
        return self._moment(f"when the experts of block {layer} are gathered",
                            gradients=self._gradients(self.cfg.n_layers - 1 - layer),
                            kept=self._kept_below(layer) + self._whole_block(), gather=self._gathered(times, 1),
                            scatter=self._pending(layer), work=self._fresh(0))  # fmt: skip

    def _pending(self, layer: int) -> int:
        """What is still being reduced of the block before."""
        return FP32 * self.dense if self.split and layer < self.cfg.n_layers - 1 else 0

    def _experts_backward(self, layer: int) -> Moment:
        exchange = 0
        if self.way.layout.expert > 1:  # the gradients of what came, and of what was sent
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
        if not self.way.on_gpu:  # an expert at a time, in blocks of rows
            rows = min(BLOCK_ROWS, ceil(P / local))
            cast = 3 * F * D * a if self.casts else 2 * F * D * a
            return P * D * a + T * D * a + rows * a * (2 * D + 4 * F) + 3 * F * D * a + cast
        cast = (3 if self.casts else 2) * stack * a  # gate and up below one another; down too where it is fp32
        down = 0 if self.split else stack * a  # dw2 before it is fp32; else it is counted among the gradients
        first = P * a * (D + F + 2 * F)  # dy, da (which becomes the activation), dh; h is kept anyway
        second = P * a * (2 * F + D) + down + 2 * stack * a  # dh, x, and dgate_up, whose halves are copied
        return cast + max(first, second) + T * D * a

    def _dense_work(self) -> int:
        return self.tokens * self.a * (3 * self.cfg.ffn_hidden_size + self.cfg.d_model)

    def _experts_reduced(self, layer: int) -> Moment:
        """Their gradients are brought into the order of the ranks, a stack at a time, and copied in fp32."""
        return self._moment(f"when the experts' gradients of block {layer} are reduced",
                            gradients=self._gradients(self.cfg.n_layers - 1 - layer),
                            kept=self._kept_below(layer) + self.block_input() + self.attention_kept(),
                            gather=self._gathered(0, 2), scatter=FP32 * self.stacks,
                            work=self._fresh(self.stacks * 4 // 3))  # fmt: skip

    def _attention_backward(self, layer: int) -> Moment:
        """On a CPU dk and dv are made in fp32 for each query head, before those that share a key head are added up."""
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
        again = 0 if self.cfg.tie_word_embeddings else embedding  # gathered once more, though nothing asks for it
        return self._moment("when the embedding's gradient is reduced", gradients=self.state, kept=self._around(),
                            gather=self._gathered() + again, scatter=embedding,
                            work=self._fresh(self.root, output=False) + embedding)  # fmt: skip

    def _optimizer(self) -> Moment:
        work = 0
        if self.training.optimizer == "muon":  # a batch of matrices: the momentum, in the dtype twice, the update
            work = max(MUON_NUMEL[self.way.on_gpu], self.matrix) * (2 * FP32 + 2 * self.a)
            if self.split:  # so many of them come together whole: as they are sent, arrive, have moved and go back
                work += 4 * FP32 * max(MUON_NUMEL[self.way.on_gpu], self.matrix)
        return self._moment("in the optimizer", gradients=self.state, kept=self.block_input(), work=work)
