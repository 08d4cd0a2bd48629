"""What every tokenizer of Gristmill has in common with GPT-4's and DBRX's: how text is split, which special
tokens there are and what a conversation looks like.
"""

import json
from pathlib import Path
from typing import Any

# How GPT-4's table (cl100k_base) cuts text before merging, in the form published with it: all our tokenizers keep it.
# tiktoken has rewritten the pattern for speed since. Its form of today (0.8 and later) differs in one place: the blanks
# after the last newline of a text stay in one piece with it. With GPT-4's table that changes no id, because each of its
# tokens that holds a newline ends with one: nothing merges over that border.
# Plain quantifiers only: the engine under `tokenizers` (Oniguruma) reads a `+` after `{1,3}` as a second repetition,
# not as "possessive".
LINES_AND_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
)
BLANKS = r"\s+(?!\S)|\s+"
SPLIT_PATTERN = f"{LINES_AND_WORDS}|{BLANKS}"

EOT = "<|endoftext|>"
PAD = "<|pad|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
# In DBRX's order; they take the last ids of the vocabulary.
SPECIAL_TOKENS = (EOT, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|endofprompt|>", PAD, IM_START, IM_END)

# The published ids of DBRX: GPT-4's, then DBRX's own three. Ids between have no token.
GPT4_SPECIAL_IDS = dict(
    zip(SPECIAL_TOKENS, (100257, 100258, 100259, 100260, 100276, 100277, 100278, 100279), strict=True)
)
GPT4_VOCAB_SIZE = 100_280

ROLES = ("system", "user", "assistant")
DEFAULT_SYSTEM_PROMPT = "default_system_prompt"  # our key in tokenizer_config.json
# ChatML as DBRX writes it: turns joined by a newline, none after the last. No system prompt is added by default:
# it is the caller's to give.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
# The same with a system prompt for conversations that do not open with one.
DEFAULT_PROMPT_TEMPLATE = (
    "{% set opened = not messages or messages[0]['role'] != 'system' %}"
    "{% if opened %}"
    "{% set system_message = PROMPT %}"
    "{{ '<|im_start|>system\\n' + system_message + '<|im_end|>' }}"
    "{% endif %}"
) + CHAT_TEMPLATE.replace("{% if not loop.first %}", "{% if opened or not loop.first %}")


def hugging_face_config(default_system_prompt: str | None = None) -> dict[str, Any]:
    """The settings that `AutoTokenizer` needs besides tokenizer.json. As in DBRX, nothing is added to a text; a
    tokenizer that Gristmill trains gets its start token from `add_start_token`.

    default_system_prompt: opens conversations that bring no system turn, here and in the chat template.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOT,
        "eos_token": EOT,
        "unk_token": EOT,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    if default_system_prompt is not None:
        # A JSON string is a Jinja string too, except that Jinja does not join the halves of an escaped emoji.
        literal = json.dumps(default_system_prompt, ensure_ascii=False)
        config[DEFAULT_SYSTEM_PROMPT] = default_system_prompt
        config["chat_template"] = DEFAULT_PROMPT_TEMPLATE.replace("PROMPT", literal)
    return config


def write_tokenizer(out: Path, description: str, default_system_prompt: str | None = None) -> None:
    """Both files of a tokenizer directory. description: the text of tokenizer.json."""
    config = json.dumps(hugging_face_config(default_system_prompt), indent=2, sort_keys=True)
    (out / "tokenizer.json").write_text(description, encoding="utf-8")
    (out / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")


def byte_of_symbol() -> dict[str, int]:
    """The 256 printable characters that stand for bytes in a byte-level vocabulary (GPT-2's table).

    Bytes that print as Latin-1 stand for themselves; the others are numbered from U+0100 in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
