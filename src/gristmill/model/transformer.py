"""The decoder, top to bottom: DBRX or, with other settings, Qwen3-MoE. It serves training and inference.

Other rooms change how it computes through these seams only, all of which have a default:
- the argument `attend` of `Transformer.forward`: packed or paged attention;
- the argument `observe` of `Transformer.forward`: sees which experts each token is routed to;
- `Linear.product`, `Experts.compute` and `DenseGLU.compute`: attributes that compute a layer's output from its input
  and its weights. Expert parallelism sets `Experts.compute`; the engine sets them on its own modules.
- `Block.recompute` and `Block.compiled_halves`: attributes that save memory and time in training.

Shapes: B sequences, S positions, T = B*S tokens, D model, H query heads, G key/value heads, C head size,
L layers, E experts, K experts a token, F hidden, V vocabulary.

Parameters are fp32 masters under DBRX's own names; `compute_dtype` is what the arithmetic runs in. The constructors
allocate them on the current device and do not initialize them: `init_weights` does, or a checkpoint is loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gristmill.kernels.attention import document_starts, packed_attention
from gristmill.kernels.experts import experts
from gristmill.kernels.norm import rms_norm
from gristmill.kernels.precision import upcast
from gristmill.kernels.rotary import rotary_angles, rotate, rotate_normed
from gristmill.kernels.router import route
from gristmill.model.config import ModelConfig

# attend(layer, q [B, S, H, C], k [B, S, G, C], v [B, S, G, C]) -> [B, S, H, C]
Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# observe(weights [T, K], ids [T, K]): called by each MoE layer in turn, before its experts compute
Observe: TypeAlias = Callable[[Tensor, Tensor], None]
# product(x [..., inputs], weight [outputs, inputs]) -> [..., outputs]
Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]
# compute(x [T, D], weights [T, K], ids [T, K], w1 [E, F, D], v1 [E, F, D], w2 [E, F, D]) -> [T, D]
ComputeExperts: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# compute(x [T, D], w1 [F, D], v1 [F, D], w2 [F, D]) -> [T, D]
ComputeGLU: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# The activations of a block that the backward pass computes again: none, those of its ffn half, or all.
Recompute: TypeAlias = Literal["none", "selective", "full"]


def packed(document_ids_BS: Tensor) -> Attend:
    """Training's attention: causal, within each document of a packed sequence."""
    starts_BS = document_starts(document_ids_BS)
    return lambda layer, q, k, v: packed_attention(q, k, v, starts_BS)


@dataclass(frozen=True)
class Routing:
    """What the routers did. `probs_LE`: each expert's mean probability. `counts_LE`: the assignments that it got."""

    weight: float
    probs_LE: Tensor
    counts_LE: Tensor

    def balance_loss(self, shares_LE: Tensor | None = None) -> Tensor:
        """MegaBlocks' form, weighted: E times the share of assignments (no gradient) times the mean probability, summed
        over the experts, the mean over the layers. Without the weight it is 1 when balanced.

        shares_LE: of assignments, when they are known of more tokens than these; None: as these tokens went.
        """
        if shares_LE is None:
            shares_LE = self.counts_LE.float() / self.counts_LE[0].sum()
        return self.weight * self.probs_LE.shape[1] * (shares_LE * self.probs_LE).sum(1).mean()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ in x's dtype."""
    return F.linear(x, weight.to(x.dtype))


def dense_glu(x_TD: Tensor, w1_FD: Tensor, v1_FD: Tensor, w2_FD: Tensor) -> Tensor:
    """(silu(x w1ᵀ) * (x v1ᵀ)) w2 in x's dtype."""
    return (F.silu(linear(x_TD, w1_FD)) * linear(x_TD, v1_FD)) @ w2_FD.to(x_TD.dtype)


class Linear(nn.Module):
    """y = x Wᵀ, without bias, in x's dtype. `product` computes it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.product: Product = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)


class LayerNorm(nn.Module):
    """Layer normalisation with a scale and no bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), None, self.eps)


class RMSNorm(LayerNorm):
    """The same without subtracting the mean."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def norm(cfg: ModelConfig) -> LayerNorm:
    match cfg.norm:
        case "layer_norm":
            return LayerNorm(cfg.d_model, cfg.norm_eps)
        case "rms_norm":
            return RMSNorm(cfg.d_model, cfg.norm_eps)


class Attention(nn.Module):
    """Grouped-query attention; q, k and v come from one projection: clamped, split, normed, turned."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        heads = cfg.n_heads + 2 * cfg.kv_n_heads
        self.Wqkv = Linear(cfg.d_model, heads * cfg.head_dim)
        self.out_proj = Linear(cfg.n_heads * cfg.head_dim, cfg.d_model)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(cfg.head_dim, cfg.norm_eps) for _ in range(2))

    def forward(self, x_BSD: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        cfg, (B, S, _D) = self.cfg, x_BSD.shape
        qkv = self.Wqkv(x_BSD).view(B, S, -1, cfg.head_dim)
        heads = cfg.n_heads, cfg.kv_n_heads, cfg.kv_n_heads
        if cfg.qk_norm:
            clipped = qkv if cfg.clip_qkv is None else qkv.clamp(-cfg.clip_qkv, cfg.clip_qkv)
            weights = self.q_norm.weight, self.k_norm.weight
            q, k, v = rotate_normed(clipped, *weights, cfg.norm_eps, cos, sin, *heads[:2])
        else:  # all but the values
            q, k, v = rotate(qkv, cos, sin, sum(heads[:2]), cfg.clip_qkv).split(heads, dim=2)
        attended = attend(layer, q, k, v)
        return self.out_proj(attended.reshape(B, S, -1))


class Experts(nn.Module):
    """The stacked experts; w2 is not transposed: y = (silu(x w1ᵀ) * (x v1ᵀ)) w2. `compute` computes them."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        shape = (cfg.moe_num_experts, cfg.ffn_hidden_size, cfg.d_model)
        self.w1, self.v1, self.w2 = (nn.Parameter(torch.empty(shape)) for _ in range(3))
        self.compute: ComputeExperts = experts

    def forward(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        return self.compute(x_TD, weights_TK, ids_TK, self.w1, self.v1, self.w2)


class MoE(nn.Module):
    """Dropless mixture: the router in fp32, each token to its top k experts.

    Jitter applies to passes with gradients only, so that a model in training is evaluated without it as it is.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.router = Linear(cfg.d_model, cfg.moe_num_experts)
        self.router_bias: Tensor | None  # a buffer: the training loop changes it, not the optimizer
        self.register_buffer("router_bias", torch.empty(cfg.moe_num_experts) if cfg.moe_router_bias else None)
        self.experts = Experts(cfg)

    def forward(self, x_TD: Tensor, observe: Observe | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the output [T, D], the experts' mean probabilities [E] and their counts [E].

        Only the balancing loss needs the probabilities: in inference mode they are 0.
        """
        cfg, E = self.cfg, self.cfg.moe_num_experts
        routed = upcast(x_TD)
        if cfg.moe_jitter_eps and self.training and torch.is_grad_enabled():
            routed = routed * torch.empty_like(routed).uniform_(1 - cfg.moe_jitter_eps, 1 + cfg.moe_jitter_eps)
        probs_TE, weights_TK, ids_TK = route(
            self.router(routed), self.router_bias, cfg.moe_top_k, cfg.moe_normalize_expert_weights
        )
        counts_E = torch.zeros(E, dtype=torch.long, device=x_TD.device)
        counts_E.scatter_add_(0, ids_TK.flatten(), torch.ones_like(ids_TK).flatten())  # bincount would wait for a GPU
        mean_E = probs_TE.new_zeros(E) if torch.is_inference_mode_enabled() else probs_TE.mean(0)
        if observe is not None:
            observe(weights_TK, ids_TK)
        return self.experts(x_TD, weights_TK, ids_TK), mean_E, counts_E


class DenseGLU(nn.Module):
    """One GLU for all tokens, with the interface of `MoE` but nothing to route. `compute` computes it."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        shape = (cfg.ffn_hidden_size, cfg.d_model)
        self.w1, self.v1, self.w2 = (nn.Parameter(torch.empty(shape)) for _ in range(3))
        self.compute: ComputeGLU = dense_glu

    def forward(self, x_TD: Tensor, observe: Observe | None = None) -> tuple[Tensor, Tensor, Tensor]:
        out_TD = self.compute(x_TD, self.w1, self.v1, self.w2)
        return out_TD, x_TD.new_zeros(1, dtype=torch.float32), torch.tensor([len(x_TD)], device=x_TD.device)


AttentionHalf: TypeAlias = Callable[[Tensor, int, Tensor, Tensor, Attend], Tensor]
FfnHalf: TypeAlias = Callable[[Tensor, Observe | None], tuple[Tensor, Tensor, Tensor]]


class Block(nn.Module):
    """x += attention(norm_1(x)); x += ffn(norm_2(x)).

    Seams for training, set from outside:
        recompute: Which activations the backward pass computes again instead of keeping them (Chen et al., 2016,
            arXiv:1604.06174). The router's jitter is drawn again from the same random state.
        compiled_halves: Compiled `attention_half` and `ffn_half`, which are called instead when gradients are computed.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.recompute: Recompute = "none"
        self.compiled_halves: tuple[AttentionHalf, FfnHalf] | None = None
        self.norm_1, self.norm_2 = norm(cfg), norm(cfg)
        self.attn = Attention(cfg)
        self.ffn: MoE | DenseGLU
        match cfg.ffn:
            case "moe":
                self.ffn = MoE(cfg)
            case "dense":
                self.ffn = DenseGLU(cfg)

    def forward(
        self, x_BSD: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend, observe: Observe | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.recompute == "full":
            return checkpoint(self.both_halves, x_BSD, layer, cos, sin, attend, observe, use_reentrant=False)
        return self.both_halves(x_BSD, layer, cos, sin, attend, observe)

    def both_halves(
        self, x_BSD: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend, observe: Observe | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        halves: tuple[AttentionHalf, FfnHalf] = (self.attention_half, self.ffn_half)
        if self.compiled_halves and torch.is_grad_enabled():
            halves = self.compiled_halves
        attention_half, ffn_half = halves
        x_BSD = attention_half(x_BSD, layer, cos, sin, attend)
        if self.recompute == "selective":
            return checkpoint(ffn_half, x_BSD, observe, use_reentrant=False)
        return ffn_half(x_BSD, observe)

    def attention_half(self, x_BSD: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        return x_BSD + self.attn(self.norm_1(x_BSD), layer, cos, sin, attend)

    def ffn_half(self, x_BSD: Tensor, observe: Observe | None = None) -> tuple[Tensor, Tensor, Tensor]:
        out_TD, probs_E, counts_E = self.ffn(self.norm_2(x_BSD).flatten(0, 1), observe)
        return x_BSD + out_TD.view_as(x_BSD), probs_E, counts_E


class Transformer(nn.Module):
    """Token ids to final hidden states; `logits` (or a chunked loss over `output_weight`) finishes the job.

    The parameters are allocated but not initialized: call `init_weights`, or load a checkpoint. Under
    `torch.device("meta")` they take no memory.
    """

    def __init__(self, cfg: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        assert cfg.vocab_size is not None, "the recipe or the checkpoint fills in vocab_size"
        self.cfg = cfg
        self.compute_dtype = compute_dtype
        # nn.Embedding's constructor would draw random weights.
        self.wte = nn.Embedding.from_pretrained(torch.empty(cfg.vocab_size, cfg.d_model), freeze=False)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm_f = norm(cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = Linear(cfg.d_model, cfg.vocab_size)

    def forward(
        self, tokens_BS: Tensor, positions_BS: Tensor, attend: Attend, observe: Observe | None = None
    ) -> tuple[Tensor, Routing]:
        """Returns hidden states [B, S, D] in `compute_dtype`, and the routing."""
        x_BSD = self.wte(tokens_BS).to(self.compute_dtype)
        cos, sin = rotary_angles(positions_BS, self.cfg.head_dim, self.cfg.rope_theta)
        probs, counts = [], []
        for layer, block in enumerate(self.blocks):
            x_BSD, probs_E, counts_E = block(x_BSD, layer, cos, sin, attend, observe)
            probs.append(probs_E)
            counts.append(counts_E)
        return self.norm_f(x_BSD), Routing(self.cfg.moe_loss_weight, torch.stack(probs), torch.stack(counts))

    @property
    def output_weight(self) -> Tensor:
        """[V, D]: what turns a hidden state into logits."""
        return self.wte.weight if self.cfg.tie_word_embeddings else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] in fp32."""
        return upcast(F.linear(hidden, self.output_weight.to(hidden.dtype)))
