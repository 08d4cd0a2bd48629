"""A second, deliberately naive forward pass of both published layouts: NumPy in float64, loops over all there is.

It was written from the definition of the models and shares nothing with the package: it takes the published
`config.json` and the published tensors. Rotary angles alone are fp32, as the definition has them: each of their
operations is computed in float64 and rounded once. A library may round a power or a cosine to the neighbouring number;
who wants to compare without that gives the `Angles` to use.

Names: S positions, D model, C head size, E experts, F expert hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Config: TypeAlias = Mapping[str, Any]
Tensors: TypeAlias = Mapping[str, Array]
# (position, pair c of C/2, head size C, theta) -> cosine and sine
Angles: TypeAlias = Callable[[int, int, int, float], tuple[float, float]]


def fp32_angles(position: int, pair: int, head_size: int, theta: float) -> tuple[float, float]:
    frequency = fp32(1.0 / fp32(theta ** fp32(2 * pair / head_size)))
    angle = fp32(position * frequency)
    return fp32(np.cos(angle)), fp32(np.sin(angle))


def fp32(x: float) -> float:
    return float(np.float32(x))


# ---- the two layouts -----------------------------------------------------------------------------------


def dbrx_logits(config: Config, tensors: Tensors, tokens: list[int], angles: Angles = fp32_angles) -> Array:
    """[S, V] for one document."""
    attn, ffn = config["attn_config"], config["ffn_config"]
    heads, kv_heads, width = config["n_heads"], attn["kv_n_heads"], config["d_model"]
    head_size = width // heads
    theta = config["rope_parameters"]["rope_theta"]
    experts, hidden = ffn["moe_num_experts"], ffn["ffn_hidden_size"]
    x = [tensors["transformer.wte.weight"][token] for token in tokens]
    for layer in range(config["n_layers"]):
        block = f"transformer.blocks.{layer}."
        inside = f"{block}norm_attn_norm."
        normed = [layer_norm(row, tensors[f"{inside}norm_1.weight"], 1e-5) for row in x]
        queries, keys, values = [], [], []
        for row in normed:
            fused = tensors[f"{inside}attn.Wqkv.weight"] @ row
            if attn["clip_qkv"] is not None:
                fused = np.clip(fused, -attn["clip_qkv"], attn["clip_qkv"])
            queries.append(fused[: heads * head_size].reshape(heads, head_size))
            keys.append(fused[heads * head_size : (heads + kv_heads) * head_size].reshape(kv_heads, head_size))
            values.append(fused[(heads + kv_heads) * head_size :].reshape(kv_heads, head_size))
        for position, mixed in enumerate(attention(queries, keys, values, theta, angles)):
            x[position] = x[position] + tensors[f"{inside}attn.out_proj.weight"] @ mixed
        stacked = [
            tensors[f"{block}ffn.experts.mlp.{name}"].reshape(experts, hidden, width) for name in ("w1", "v1", "w2")
        ]
        for position, row in enumerate(x):
            row = layer_norm(row, tensors[f"{inside}norm_2.weight"], 1e-5)
            chosen = route(
                tensors[f"{block}ffn.router.layer.weight"] @ row, ffn["moe_top_k"], ffn["moe_normalize_expert_weights"]
            )
            for expert, weight in chosen:
                w1, v1, w2 = (tensor[expert] for tensor in stacked)
                x[position] = x[position] + weight * ((silu(w1 @ row) * (v1 @ row)) @ w2)
    final = [layer_norm(row, tensors["transformer.norm_f.weight"], 1e-5) for row in x]
    return np.stack([tensors["lm_head.weight"] @ row for row in final])


def qwen3_moe_logits(config: Config, tensors: Tensors, tokens: list[int], angles: Angles = fp32_angles) -> Array:
    """[S, V] for one document."""
    heads, kv_heads, head_size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    eps, theta = config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]
    x = [tensors["model.embed_tokens.weight"][token] for token in tokens]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        inside = f"{block}self_attn."
        normed = [rms_norm(row, tensors[f"{block}input_layernorm.weight"], eps) for row in x]
        queries, keys, values = [], [], []
        for row in normed:
            q = (tensors[f"{inside}q_proj.weight"] @ row).reshape(heads, head_size)
            k = (tensors[f"{inside}k_proj.weight"] @ row).reshape(kv_heads, head_size)
            queries.append(np.stack([rms_norm(head, tensors[f"{inside}q_norm.weight"], eps) for head in q]))
            keys.append(np.stack([rms_norm(head, tensors[f"{inside}k_norm.weight"], eps) for head in k]))
            values.append((tensors[f"{inside}v_proj.weight"] @ row).reshape(kv_heads, head_size))
        for position, mixed in enumerate(attention(queries, keys, values, theta, angles)):
            x[position] = x[position] + tensors[f"{inside}o_proj.weight"] @ mixed
        for position, row in enumerate(x):
            row = rms_norm(row, tensors[f"{block}post_attention_layernorm.weight"], eps)
            power = 1.0 if config["norm_topk_prob"] else None
            for expert, weight in route(tensors[f"{block}mlp.gate.weight"] @ row, config["num_experts_per_tok"], power):
                gate, up, down = (
                    tensors[f"{block}mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down")
                )
                x[position] = x[position] + weight * (down @ (silu(gate @ row) * (up @ row)))
    final = [rms_norm(row, tensors["model.norm.weight"], eps) for row in x]
    tied = config["tie_word_embeddings"]
    head = tensors["model.embed_tokens.weight"] if tied else tensors["lm_head.weight"]
    return np.stack([head @ row for row in final])


# ---- what both are made of -----------------------------------------------------------------------------


def layer_norm(x: Array, scale: Array, eps: float) -> Array:
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + eps) * scale


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean() + eps) * scale


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    exp = np.exp(x - x.max())
    return exp / exp.sum()


def attention(
    queries: list[Array], keys: list[Array], values: list[Array], theta: float, angles: Angles
) -> list[Array]:
    """Per position [heads, C] queries, [kv heads, C] keys and values; returns each position's heads side by side."""
    heads, head_size = queries[0].shape
    queries = [np.stack([rotate(head, here, theta, angles) for head in query]) for here, query in enumerate(queries)]
    keys = [np.stack([rotate(head, here, theta, angles) for head in key]) for here, key in enumerate(keys)]
    outputs = []
    for here in range(len(queries)):
        mixed = np.zeros((heads, head_size))
        for head in range(heads):
            shared = head * len(keys[here]) // heads
            scores = [queries[here][head] @ keys[there][shared] / np.sqrt(head_size) for there in range(here + 1)]
            for there, prob in enumerate(softmax(np.array(scores))):
                mixed[head] += prob * values[there][shared]
        outputs.append(mixed.flatten())
    return outputs


def rotate(head: Array, position: int, theta: float, angles: Angles) -> Array:
    """Element c turns with element c + C/2 by the angle position / theta^(2c/C)."""
    half = len(head) // 2
    turned = np.empty_like(head)
    for c in range(half):
        cos, sin = angles(position, c, 2 * half, theta)
        turned[c] = head[c] * cos - head[c + half] * sin
        turned[c + half] = head[c + half] * cos + head[c] * sin
    return turned


def route(router_logits: Array, top_k: int, power: float | None) -> list[tuple[int, float]]:
    """(expert, weight) of the most probable experts; the weights divided by their L-`power` norm, or left alone."""
    probs = softmax(router_logits)
    chosen = sorted(range(len(probs)), key=lambda expert: -probs[expert])[:top_k]
    size = 1.0 if power is None else sum(abs(probs[expert]) ** power for expert in chosen) ** (1 / power)
    return [(expert, probs[expert] / size) for expert in chosen]
