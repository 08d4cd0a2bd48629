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
