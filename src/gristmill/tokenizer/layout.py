"""What every tokenizer of Gristmill has in common with GPT-4's and DBRX's: how text is split, which special
tokens there are and what a conversation looks like.
"""

# How GPT-4's table (cl100k_base) cuts text before merging, in the form published with it and used by DBRX's tokenizer.
# tiktoken later rewrote the pattern for speed; that form differs in one place: it keeps the blanks after the last
# newline of a text in one piece with it. Plain quantifiers only: the engine under `tokenizers` (Oniguruma) reads
# a `+` after `{1,3}` as a second repetition, not as "possessive".
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

EOT = "<|endoftext|>"
PAD = "<|pad|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
# In DBRX's order; they take the last ids of the vocabulary.
SPECIAL_TOKENS = (EOT, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|endofprompt|>", PAD, IM_START, IM_END)

ROLES = ("system", "user", "assistant")
# ChatML as DBRX writes it: turns joined by a newline, none after the last. No system prompt is added by default:
# it is the caller's to give.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_of_symbol() -> dict[str, int]:
    """The 256 printable characters that stand for bytes in a byte-level vocabulary (GPT-2's table).

    Bytes that print as Latin-1 stand for themselves; the others are numbered from U+0100 in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
