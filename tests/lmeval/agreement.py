"""Does lm-eval get the same log-likelihoods from the server as from its own Hugging Face backend?

    .venv/bin/python tests/lmeval/agreement.py [RUN]      # default: runs/quickstart

Exports the run's model in fp32, serves it, and asks both backends for 200 continuations of its test documents, as ids:
with and without the start token, from one token to many, within documents and at their ends. `make lmeval` installs
lm-eval into .lmeval, as its requirements exclude ours. Exits with 1 when a log-likelihood differs by more than 1e-3.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq

from gristmill.errors import Failure, InputError
from gristmill.hub.export import export_model
from gristmill.inference import find_model
from gristmill.tokenizer import Tokenizer

HERE = Path(__file__).parent
THEIR_PYTHON = HERE.parents[1] / ".lmeval" / "bin" / "python"
NUM_REQUESTS, TOLERANCE = 200, 1e-3
MOST_TOKENS = 512  # of a request; of models with a shorter context, as many as fit

Ids = list[int]


def requests(run: Path, tokenizer: Tokenizer, most: int) -> list[tuple[Ids, Ids]]:
    """(context, continuation) from the test documents; every fourth ends where its document does."""
    files = sorted(run.glob("corpus/*/documents-test.parquet"))
    if not files:
        raise InputError(f"{run} has no test documents (corpus/*/documents-test.parquet); give a finished run")
    chance = random.Random(0)
    documents = [text for text in pq.read_table(files[0], columns=["text"])["text"].to_pylist() if text.strip()]
    made = []
    while len(made) < NUM_REQUESTS:
        ids = tokenizer.encode(chance.choice(documents))
        end = len(ids) if len(made) % 4 == 0 else chance.randint(1, len(ids))
        ids = ids[max(0, end - chance.randint(2, most - 1)) : end]
        if len(made) % 2 or len(ids) < 2:
            ids = [tokenizer.eot_id, *ids]
        split = chance.randint(max(1, len(ids) - 32), len(ids) - 1)
        made.append((ids[:split], ids[split:]))
    return made


@contextmanager
def serving(model: Path) -> Iterator[str]:
    """The address of `gristmill serve` for this model."""
    command = [sys.executable, "-m", "gristmill.cli", "serve", str(model), "--port", "0", "--name", "model"]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "GRISTMILL_DATABASE": str(Path(folder) / "none.sqlite")}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            try:
                assert process.stdout is not None
                found = next((m for line in process.stdout if (m := re.match(r"serving .* on (http:\S+)", line))), None)
                if found is None:
                    raise Failure("the server did not start")
                yield found[1]
            finally:
                process.terminate()


def main(run: Path) -> int:
    if not THEIR_PYTHON.exists():
        raise InputError(f"{THEIR_PYTHON} is missing; `make .lmeval/installed` installs lm-eval")
    import torch

    with tempfile.TemporaryDirectory() as folder:
        exported = export_model(find_model(run), Path(folder) / "export", torch.float32, None).path
        config = json.loads((exported / "config.json").read_text())
        context = int(config.get("max_seq_len") or config["max_position_embeddings"])
        asked = requests(run, Tokenizer.load(exported), min(MOST_TOKENS, context - 1))
        asked_file, out = Path(folder) / "requests.json", Path(folder) / "found.json"
        asked_file.write_text(json.dumps(asked))
        with serving(exported) as url:
            subprocess.run([THEIR_PYTHON, HERE / "theirs.py", exported, url, "model", asked_file, out], check=True)
        found = json.loads(out.read_text())
    pairs = list(zip(found["huggingface"], found["local-completions"], strict=True))
    differences = [abs(theirs[0] - ours[0]) for theirs, ours in pairs]
    num_equal = sum(difference <= TOLERANCE for difference in differences)
    num_greedy = sum(theirs[1] == ours[1] for theirs, ours in pairs)
    print(
        f"{num_equal} of {len(pairs)} log-likelihoods within {TOLERANCE}, the largest difference is "
        f"{max(differences):.2g} nats; {num_greedy} agree on whether the continuation is the greedy one"
    )
    return 0 if num_equal == len(pairs) == NUM_REQUESTS else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/quickstart"))
    try:
        raise SystemExit(main(parser.parse_args().run))
    except (InputError, Failure) as problem:
        raise SystemExit(f"error: {problem}") from None
