"""The specification of attention over packed documents, and its implementation for tensors that no fast path supports.

Shapes: B sequences, S positions, H query heads, G key/value heads, C head size; Q queries if a rank has only a part of
them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention_reference(q_BQHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, starts_BS: Tensor) -> Tensor:
    """Apply torch's own attention under an explicit mask.

    Args:
        q_BQHC: the queries of the last Q of S positions.
        k_BSGC, v_BSGC: keys and values of all S positions.
        starts_BS: for each position, the first position of its document.

    Returns:
        [B, Q, H, C]
    """
    key = torch.arange(k_BSGC.shape[1], device=q_BQHC.device)
    query = key[-q_BQHC.shape[1] :, None]
    visible = (key <= query) & (key >= starts_BS[:, -q_BQHC.shape[1] :, None])
    q, k, v = (x.transpose(1, 2) for x in (q_BQHC, k_BSGC, v_BSGC))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=True).transpose(1, 2)
