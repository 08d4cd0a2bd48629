"""Text to ids and back: byte-level BPE with GPT-4's split and DBRX's special tokens. Knows no other room."""

from gristmill.tokenizer.tokenizer import StreamDecoder, Tokenizer
from gristmill.tokenizer.train import TokenizerConfig, build_tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "TokenizerConfig", "build_tokenizer"]
