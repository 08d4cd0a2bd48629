"""Invented text to train on."""

import random
from pathlib import Path


def write_texts(folder: Path, seed: int, num_files: int = 30) -> Path:
    """Markdown made of words: enough to train on, different in each file."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghijklmnop", k=chance.randint(2, 8))) for _ in range(300)]
    folder.mkdir(parents=True)
    for number in range(num_files):
        lines = [" ".join(chance.choices(words, k=9)) for _ in range(20)]
        (folder / f"note-{number:02}.md").write_text(f"# Note {number}\n\n" + "\n".join(lines) + "\n")
    return folder


# A recipe that runs from text to export in seconds; `notes` and `verse` are folders of texts.
TINY = """\
name: tiny
corpus:
  sources:
    notes: {{path: "{notes}", license: CC0-1.0, weight: {{0.0: 1.0, 0.5: 2.0}}}}
    verse: {{path: "{verse}", license: MIT}}
  split: {{validation: 0.1, test: 0.1}}
tokenizer: {{vocab_size: 384}}
shards: {{block_tokens: 256}}
model: {{d_model: 32, n_layers: 2, n_heads: 4, kv_n_heads: 2, ffn_hidden_size: 32, moe_num_experts: 4, moe_top_k: 2,
  max_seq_len: 128}}
train: {{steps: 8, batch_tokens: 256, seq_len: 64, micro_batch: 2, log_every: 1, dtype: float32, threads: 1,
  optimizer: {{name: muon, lr: 0.01}}, checkpoint: {{every: 2, keep: 2}}, tracking: {{enabled: false}}}}
evaluate: {{samples: 1, functions: 2, sample_tokens: 8, prompt_tokens: 16}}
export: {{checked_sequences: 2, checked_greedy: 1}}
"""
