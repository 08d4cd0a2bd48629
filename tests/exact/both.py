"""One random model twice: as ours and as transformers opens what we published; and where their choices part.

A router's choice and a clamp are not continuous: where two experts' probabilities, or a value and its bound, are equal
up to rounding, two correct programs may choose differently, and all that follows differs visibly. So tokens for
which they part are told apart from errors by the gap at which they part: a near tie is counted and other tokens are
drawn, a clear gap is an error.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_models import Case, packed_row, padded_rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from gristmill.hub import assemble, read_published
from gristmill.model import Transformer, packed

NEAR_TIE = 1e-5  # of the sum of all probabilities; of the clip's bound
GREEDY_TIE = 1e-5  # between the reference's two best logits
DRAWS = 5

figures: dict[str, float] = {}  # the largest of each, over all tests; printed by `make exact`
counts: Counter[str] = Counter()


def seen(name: str, value: float) -> float:
    """Remembers the largest, and gives the value back."""
    largest = figures.get(name, 0.0)
    figures[name] = largest if value <= largest else value
    return value


def distance(given: Tensor, reference: Tensor) -> float:
    """max|given - reference| / max|reference|."""
    return float((given - reference).abs().max() / reference.abs().max())


def load_theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        experts_implementation="eager",  # its default refuses widths that are not a multiple of 16 bytes
    )
    return model.eval()


def load_ours(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    return assemble(*read_published(folder), dtype)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and advice."""
    transformers_logging.disable_progress_bar()
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


# ---- both on one ragged batch --------------------------------------------------------------------------


def ours_packed(model: Transformer, documents: list[list[int]]) -> Tensor:
    """[all tokens, V]: the documents in one row."""
    tokens, positions, ids = packed_row(documents)
    return model.logits(model(tokens, positions, packed(ids))[0])[0]


def ours_in_rows(model: Transformer, documents: list[list[int]]) -> Tensor:
    """[all tokens, V]: a document a row, padded on the right."""
    tokens, mask = padded_rows(documents)
    hidden, _ = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), packed(torch.zeros_like(tokens)))
    return model.logits(hidden)[mask.bool()]


def theirs_in_rows(model: Any, documents: list[list[int]]) -> Tensor:
    """[all tokens, V]: a document a row, padded on the right, with the attention mask that says so."""
    tokens, mask = padded_rows(documents)
    return model(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()]


# ---- choices -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """For each layer what decided: the router's input [T, D] and probabilities [T, E]; q, k and v before the clamp."""

    inputs: list[Tensor]
    probs: list[Tensor]
    qkv: list[Tensor]


def routers(model: nn.Module) -> list[nn.Module]:
    """Of ours or of theirs, DBRX or Qwen3-MoE, layer by layer."""
    return [module for name, module in model.named_modules() if name.endswith(("ffn.router", "mlp.gate"))]


@contextmanager
def recorded(model: nn.Module, keep: Tensor) -> Iterator[Choices]:
    """Of ours or of theirs, DBRX or Qwen3-MoE. keep: mask of the tokens that count, flattened."""
    choices = Choices([], [], [])

    def routed(module: nn.Module, given: Any, out: Any) -> None:
        logits = out[0] if isinstance(out, tuple) else out
        choices.inputs.append(given[0].detach().flatten(0, -2)[keep])
        choices.probs.append(logits.detach().flatten(0, -2)[keep].float().softmax(-1))

    def projected(module: nn.Module, given: Any, out: Tensor) -> None:
        choices.qkv.append(out.detach().flatten(0, -2)[keep])

    hooks = [module.register_forward_hook(routed) for module in routers(model)]
    for name, module in model.named_modules():
        if name.endswith("attn.Wqkv"):
            hooks.append(module.register_forward_hook(projected))
    try:
        yield choices
    finally:
        for hook in hooks:
            hook.remove()


def partings(given: Tensor, reference: Tensor, top_k: int) -> Tensor:
    """[T] of bool: the tokens for which the two probabilities [T, E] choose other experts."""
    chosen = [torch.zeros_like(probs).scatter_(1, probs.topk(top_k).indices, 1.0) for probs in (given, reference)]
    return (chosen[0] != chosen[1]).any(1)


def largest_gap(probs: Tensor, top_k: int) -> float:
    """At most, between the probabilities [T, E] of the expert that was chosen last and of the next one."""
    best = probs.sort(descending=True).values
    return float((best[:, top_k - 1] - best[:, top_k]).max())


def routing_gap(ours: Choices, theirs: Choices, top_k: int) -> float | None:
    """How far apart the probabilities are between which the two choose differently, at most; None: they never do.

    In the first layer where they part: what parts in later ones may follow from it.
    """
    for given, wanted in zip(ours.probs, theirs.probs, strict=True):
        if (parting := partings(given, wanted, top_k)).any():
            return largest_gap(wanted[parting], top_k)
    return None


def clip_gap(ours: Choices, theirs: Choices, clip: float | None) -> float | None:
    """How far from the bound, in bounds, the values are that one clamps and the other does not; None: there is none."""
    if clip is None:
        return None
    gaps = []
    for given, wanted in zip(ours.qkv, theirs.qkv, strict=True):
        if (parting := (given.abs() > clip) != (wanted.abs() > clip)).any():
            gaps.append(float((wanted.abs() - clip).abs()[parting].max() / clip))
    return max(gaps, default=None)


class Both:
    """`documents`: tokens on which the two make the same choices. `wanted`, `given`: their logits and ours in fp32."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        case.write(folder, case.model())
        self.theirs, self.ours = load_theirs(folder), load_ours(folder)
        assert self.ours.cfg == case.cfg
        for number in range(DRAWS):
            self.documents = case.tokens(number)
            if self._agree():
                return
        raise AssertionError(f"{case}: near ties in each of {DRAWS} draws of tokens")

    @torch.no_grad()
    def _agree(self) -> bool:
        cfg = self.case.cfg
        _tokens, mask = padded_rows(self.documents)
        with recorded(self.theirs, mask.flatten().bool()) as theirs:
            self.wanted = theirs_in_rows(self.theirs, self.documents)
        with recorded(self.ours, torch.ones(len(self.wanted), dtype=torch.bool)) as ours:
            self.given = ours_packed(self.ours, self.documents)
        assert len(ours.probs) == len(theirs.probs) == cfg.n_layers
        counts["draws of tokens"] += 1
        if (gap := routing_gap(ours, theirs, cfg.moe_top_k)) is not None:
            assert gap < NEAR_TIE, f"{self.case}: other experts are chosen where probabilities are {gap:.2g} apart"
            counts["routing ties"] += 1
            return False
        if (gap := clip_gap(ours, theirs, cfg.clip_qkv)) is not None:
            assert gap < NEAR_TIE, f"{self.case}: other values are clipped, {gap:.2g} bounds from the bound"
            counts["clip ties"] += 1
            return False
        return True


# ---- greedy text ---------------------------------------------------------------------------------------


@torch.no_grad()
def compare_greedy(pair: Both, prompt: list[int], ours: list[int]) -> str:
    """equal, tie (the reference's two best logits), routing tie (two experts at an earlier token)."""
    tokens = torch.tensor([prompt])
    made = pair.theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=len(ours)
    )
    theirs = made[0, len(prompt) :].tolist()
    assert len(theirs) == len(ours)
    if ours == theirs:
        return "equal"
    parting = next(i for i in range(len(ours)) if ours[i] != theirs[i])
    before = [[*prompt, *theirs[:parting]]]
    keep = torch.ones(len(before[0]), dtype=torch.bool)
    with recorded(pair.theirs, keep) as their_choices:
        best, second = theirs_in_rows(pair.theirs, before)[-1].topk(2).values.tolist()
    if best - second < GREEDY_TIE:
        return "tie"
    with recorded(pair.ours, keep) as our_choices:
        ours_packed(pair.ours, before)
    gap = routing_gap(our_choices, their_choices, pair.case.cfg.moe_top_k)
    is_near = gap is not None and gap < NEAR_TIE
    assert is_near, f"{pair.case}: token {parting} differs where the two best logits are {best - second:.2g} apart"
    return "routing tie"
