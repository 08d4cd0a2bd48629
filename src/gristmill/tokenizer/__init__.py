"""Text to ids and back: byte-level BPE with GPT-4's split and DBRX's special tokens. Knows no other room."""

from gristmill.tokenizer.chat import published_system_prompt
from gristmill.tokenizer.gpt4 import write_gpt4
from gristmill.tokenizer.layout import hugging_face_config
from gristmill.tokenizer.tokenizer import StreamDecoder, Tokenizer
from gristmill.tokenizer.train import TokenizerConfig, build_tokenizer

__all__ = [
    "StreamDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "build_tokenizer",
    "hugging_face_config",
    "published_system_prompt",
    "write_gpt4",
]
