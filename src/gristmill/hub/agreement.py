"""Does the exported directory, opened by transformers alone, compute what our model computes?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill.errors import Failure
from gristmill.model import Transformer, packed
from gristmill.tokenizer import Tokenizer

GREEDY_TOKENS = 32
TIE_GAP = 1e-5  # where the reference's two best logits are this close, either may be called the best
TOLERANCE = 1e-4  # of a logit, in fp32


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Over all positions of all sequences, in fp32. `ties`: continuations that parted where the tie rule allows it."""

    max_logit_diff: float
    max_logit: float
    greedy_equal: int
    greedy_ties: int


@torch.inference_mode()
def compare(folder: Path, model: Transformer, sequences: Sequence[Sequence[int]], num_greedy: int) -> Agreement:
    """`model` holds the exported weights in fp32. The first halves of `num_greedy` sequences are continued greedily.

    Raises Failure when they disagree.
    """
    reference = _load_reference(folder)
    largest_diff = largest = 0.0
    for ids in sequences:
        ours, theirs = _logits(model, ids), reference(torch.tensor([ids])).logits[0]
        largest_diff = max(largest_diff, float((ours - theirs).abs().max()))
        largest = max(largest, float(theirs.abs().max()))
    if not largest_diff <= TOLERANCE:  # also when it is NaN
        raise Failure(
            f"{folder}: logits in transformers differ from ours by {largest_diff:.3g} (largest logit {largest:.3g}); "
            "the export is wrong and is not kept"
        )
    outcomes = [_greedy(model, reference, ids[: (len(ids) + 1) // 2]) for ids in sequences[:num_greedy]]
    return Agreement(
        max_logit_diff=largest_diff,
        max_logit=largest,
        greedy_equal=outcomes.count("equal"),
        greedy_ties=outcomes.count("tie"),
    )


def compare_tokenizers(folder: Path, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Raises Failure when AutoTokenizer gives other ids for one of the texts, the start token included."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in texts:
        if any(name in text for name in theirs.get_added_vocab()):
            continue  # there AutoTokenizer reads control tokens, and ours text: by design
        if theirs(text)["input_ids"] != tokenizer.encode_prompt(text):
            raise Failure(f"{folder}: AutoTokenizer gives other ids than ours for {text[:80]!r}")


def _load_reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM  # seconds to import: only where it is needed
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        experts_implementation="eager",  # its grouped one wants widths that are multiples of 4 on the CPU
    )
    return model.eval()


def _logits(model: Transformer, ids: Sequence[int]) -> Tensor:
    tokens = torch.tensor([ids])
    hidden, _ = model(tokens, torch.arange(len(ids))[None], packed(torch.zeros_like(tokens)))
    return model.logits(hidden[0])


def _greedy(model: Transformer, reference: Any, prompt: Sequence[int]) -> str:
    """Says "equal" or "tie". One pass over the reference's continuation: up to the first difference it is ours too."""
    new_tokens = min(GREEDY_TOKENS, model.cfg.max_seq_len - len(prompt))
    tokens = torch.tensor([prompt])
    theirs = reference.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new_tokens
    )[0]
    predicted = _logits(model, theirs[:-1].tolist())[len(prompt) - 1 :].argmax(-1)
    differing = (predicted != theirs[len(prompt) :]).nonzero().flatten().tolist()
    if not differing:
        return "equal"
    position = len(prompt) - 1 + differing[0]
    best, second = reference(theirs[None, : position + 1]).logits[0, -1].topk(2).values.tolist()
    if best - second < TIE_GAP:
        return "tie"
    raise Failure(
        f"greedy continuation in transformers parts from ours at token {differing[0]} of {new_tokens}, where its two "
        f"best logits are {best - second:.3g} apart; the export is wrong and is not kept"
    )
