"""Log-likelihoods by lm-eval: its Hugging Face backend on a directory, and local-completions with a server of it.

    .lmeval/bin/python tests/lmeval/theirs.py DIRECTORY URL MODEL REQUESTS OUT

REQUESTS is JSON: a list of (context ids, continuation ids). OUT gets a list of rows for each backend.
"""

import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")

from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI


def main(directory: str, url: str, model: str, requests_file: str, out: str) -> None:
    with open(requests_file) as file:
        requests = [((str(number), ""), *ids) for number, ids in enumerate(json.load(file))]
    # Without its cache, which gives a continuation the logits of a longer one that ends with the same tokens.
    transformers = HFLM(pretrained=directory, dtype="float32", device="cpu", batch_size=1, logits_cache=False)
    server = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model=model,
        tokenizer=directory,
        tokenizer_backend="huggingface",
        num_concurrent=4,
    )
    found = {}
    for name, backend in (("huggingface", transformers), ("local-completions", server)):
        found[name] = [[float(nats), bool(is_greedy)] for nats, is_greedy in backend._loglikelihood_tokens(requests)]
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
