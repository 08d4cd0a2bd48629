"""What a published layout must define. Reads and writes no file."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from gristmill.hub.mapping import TensorMap
from gristmill.hub.settings import SpecialIds
from gristmill.model import ModelConfig

if TYPE_CHECKING:
    from gguf import GGUFWriter  # importing it takes a while, and only GGUF files need it


class PublishedLayout(ABC):
    """A family of models in its published form: `config.json`, tensor names, GGUF metadata and text for model cards."""

    model_type: ClassVar[str]
    """The family's name in `config.json` and on the command line."""
    title: ClassVar[str]
    """The family's name in a model card."""
    requirements: ClassVar[str]
    """What `publishes` asks of a configuration, as the rest of a sentence that starts with `model_type`."""
    router: ClassVar[str]
    """The end of a router's published module name. Routers are not quantized."""
    splits_experts: ClassVar[bool]
    """Whether each expert has tensors of its own."""
    quantized_usage: ClassVar[str]
    """How a quantized model is used, for its card."""
    gpt4_vocab_size: ClassVar[int | None] = None
    """Rows of the models that were published with GPT-4's vocabulary in Python code instead of a tokenizer.json."""
    gguf_architecture: ClassVar[str]
    """llama.cpp's name for the graph that computes these models."""
    gguf_norm_2: ClassVar[str]
    """llama.cpp's name for the norm before the experts."""

    @abstractmethod
    def computes(self, cfg: ModelConfig) -> bool:
        """Whether these models, with some epsilon, compute what the configuration describes."""

    def publishes(self, cfg: ModelConfig) -> bool:
        """Whether `config.json` can express the configuration."""
        return self.computes(cfg)

    @abstractmethod
    def to_json(self, cfg: ModelConfig, ids: SpecialIds | None, dtype: torch.dtype) -> dict[str, Any]:
        """Return the content of `config.json`. Raises InputError for settings that it cannot express."""

    @abstractmethod
    def from_json(self, config: Mapping[str, Any]) -> ModelConfig:
        """Return our configuration; an absent key has the default that transformers gives it.

        Raises InputError when `config.json` asks for something that our model does not support.
        """

    @abstractmethod
    def tensors(self, cfg: ModelConfig) -> TensorMap:
        """Map each of our tensors to the published ones."""

    @abstractmethod
    def gguf_attention(self, cfg: ModelConfig, ours: str, theirs: str) -> TensorMap:
        """Map a block's Wqkv, and its query and key norms if any, to GGUF.

        Args:
            ours, theirs: the prefixes of the block's names.
        """

    @abstractmethod
    def add_gguf_settings(self, writer: "GGUFWriter", cfg: ModelConfig) -> None:
        """Add the metadata that llama.cpp's graph needs besides what every model has."""
