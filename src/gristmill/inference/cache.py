"""Remembers keys and values, so that a new token costs one position of work instead of the whole sequence's.

Shapes: L layers, B sequences, S new positions, N capacity, H query heads, G key/value heads, C head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.model import Attend, ModelConfig


class Cache:
    def __init__(self, cfg: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (cfg.n_layers, batch, capacity, cfg.kv_n_heads, cfg.head_dim)
        self.k_LBNGC = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LBNGC = torch.zeros(shape, dtype=dtype, device=device)

    def attend(self, positions_BS: Tensor) -> Attend:
        """For one forward pass over tokens at these positions: store their keys and values, see all up to each.

        A row may be padded on the right: what its padding stores lies above every position that its own tokens see,
        and is overwritten when the sequence grows to it.
        """
        rows = torch.arange(len(positions_BS), device=positions_BS.device)[:, None]
        num_keys = int(positions_BS.max()) + 1
        visible = torch.arange(num_keys, device=positions_BS.device) <= positions_BS[:, None, :, None]  # [B, 1, S, N]

        def attend(layer: int, q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor) -> Tensor:
            keys, values = self.k_LBNGC[layer], self.v_LBNGC[layer]
            keys[rows, positions_BS] = k_BSGC
            values[rows, positions_BS] = v_BSGC
            q, k, v = (x.transpose(1, 2) for x in (q_BSHC, keys[:, :num_keys], values[:, :num_keys]))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True).transpose(1, 2)

        return attend
