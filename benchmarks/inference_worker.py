"""One side of `inference.py`: a process that loads a model and answers what it is sent, greedily.

    python benchmarks/inference_worker.py SIDE MODEL     SIDE: gristmill, gristmill_fp32, transformers or llamacpp

MODEL is a Hugging Face directory, of llama.cpp a GGUF file. Lines on standard input are JSON, for each a line comes
back. {"prompts": [[ids], ...], "new": tokens of each} gives their "tokens", "first": seconds to the first token of all
of them, and "rest": seconds of the others. What else a side can be asked stands at its class. It uses THREADS threads.
"""

import ctypes
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

THREADS = 2
CONTEXT, STREAMS, BATCH = 1024, 8, 512  # tokens of a sequence; sequences; tokens of one step


class Gristmill:
    """`"invariant": false`: by the matrix library, which does not promise that no batch changes a bit.
    `"logprobs": true`: gives "logprobs", too."""

    def __init__(self, path: Path, dtype: str) -> None:
        import torch

        from gristmill.inference import Engine

        torch.set_num_threads(THREADS)
        self.path, self.dtype = path, getattr(torch, dtype)
        self.engines: dict[bool, Engine] = {}

    def engine(self, invariant: bool) -> Any:
        import torch

        from gristmill.inference import Engine, EngineConfig, load_engine, load_model
        from gristmill.inference.invariant import TorchLayers

        if invariant not in self.engines:
            cfg = EngineConfig(cache_tokens=CONTEXT * STREAMS, token_budget=BATCH)
            if invariant:
                self.engines[invariant] = load_engine(self.path, cfg, self.dtype)
            else:
                model, _ = load_model(self.path, self.dtype)
                self.engines[invariant] = Engine(model, cfg, layers=TorchLayers(model, torch.mm))
        return self.engines[invariant]

    def answer(
        self, prompts: list[list[int]], new: int, invariant: bool = True, logprobs: bool = False
    ) -> dict[str, Any]:
        from gristmill.inference import Request, Sampling

        engine, greedy = self.engine(invariant), Sampling(temperature=0.0)
        asked = {"max_tokens": new, "sampling": greedy, "logprobs": 0 if logprobs else None}
        started = time.perf_counter()
        streams = [engine.submit(Request(prompt=prompt, **asked)) for prompt in prompts]
        made: list[list[Any]] = [[] for _ in streams]
        first = None
        while engine.step():
            for tokens, stream in zip(made, streams, strict=True):
                tokens += [token for piece in stream.take() for token in piece.tokens]
            if first is None and all(made):
                first = time.perf_counter()
        ended = time.perf_counter()
        assert first is not None
        answer = {"tokens": [[token.id for token in tokens] for tokens in made]}
        if logprobs:
            answer["logprobs"] = [[token.logprob for token in tokens] for tokens in made]
        return answer | {"first": first - started, "rest": ended - first}


class Transformers:
    """bf16. {"prompt": [ids], "judge": [ids]}: for each id that followed the prompt, how far its logit is "below" the
    largest there, and the "largest"."""

    def __init__(self, path: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(THREADS)
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, local_files_only=True, experts_implementation="grouped_mm"
        ).eval()

    def answer(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        import torch

        assert new == 1, "transformers is measured with prompts alone"
        started = time.perf_counter()
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor(prompts), logits_to_keep=1).logits
        return {"tokens": logits[:, -1].argmax(-1, keepdim=True).tolist(), "first": time.perf_counter() - started}

    def judge(self, prompt: list[int], judge: list[int]) -> dict[str, Any]:
        import torch

        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([prompt + judge[:-1]]), logits_to_keep=len(judge)).logits[0]
        largest, own = logits.amax(-1), logits.gather(-1, torch.tensor(judge)[:, None])[:, 0]
        return {"below": (largest - own).tolist(), "largest": largest.tolist()}


class LlamaCpp:
    """{"quantize": "Q8_0" or "Q4_0", "out": file}: writes the model again. {"about": true}: its build."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        self.lib, self.path = llama_cpp, path
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        self.context: Any = None

    def load(self) -> None:
        lib = self.lib
        model = lib.llama_model_load_from_file(str(self.path).encode(), lib.llama_model_default_params())
        if not model:
            raise SystemExit(f"llama.cpp does not load {self.path}")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = CONTEXT * STREAMS, STREAMS, BATCH, BATCH
        params.n_threads = params.n_threads_batch = THREADS
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = lib.llama_init_from_model(model, params)
        self.batch = lib.llama_batch_init(BATCH, 0, 1)
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """(id, position, sequence, whether its logits are wanted) of each token."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (id, position, sequence, is_wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = id, position, is_wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if code := self.lib.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode answers {code}")

    def best(self, count: int) -> list[int]:
        import numpy as np

        logits = np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (count, self.vocab_size))
        return logits.argmax(-1).tolist()

    def answer(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        if self.context is None:
            self.load()
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
        started = time.perf_counter()
        self.decode([(id, i, s, i == len(p) - 1) for s, p in enumerate(prompts) for i, id in enumerate(p)])
        steps = [self.best(len(prompts))]
        first = time.perf_counter()
        while len(steps) < new:
            self.decode([(id, len(prompts[s]) + len(steps) - 1, s, True) for s, id in enumerate(steps[-1])])
            steps.append(self.best(len(prompts)))
        rest = time.perf_counter() - first
        return {"tokens": [list(ids) for ids in zip(*steps, strict=True)], "first": first - started, "rest": rest}

    def quantize(self, quantize: str, out: str) -> dict[str, Any]:
        params = self.lib.llama_model_quantize_default_params()
        params.ftype, params.nthread = getattr(self.lib, f"LLAMA_FTYPE_MOSTLY_{quantize}"), THREADS
        params.pure = True  # the output matrix, too: fewer bits to read than in its own mixture
        if code := self.lib.llama_model_quantize(str(self.path).encode(), out.encode(), ctypes.byref(params)):
            raise SystemExit(f"llama_model_quantize answers {code}")
        return {}

    def about(self, about: bool) -> dict[str, Any]:
        folder = Path(self.lib.__file__).parent / "lib"
        compiler = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", (folder / "libggml-cpu.so").read_bytes())
        commit = ctypes.CDLL(str(folder / "libggml-base.so")).ggml_commit
        commit.restype = ctypes.c_char_p
        return {
            "llama_cpp_python": self.lib.__version__,
            "commit": commit().decode(),
            "compiler": compiler[0].decode() if compiler else "unknown",
            "features": self.lib.llama_print_system_info().decode(),
        }


def main(name: str, path: str) -> None:
    side: Any
    match name:
        case "gristmill":
            side = Gristmill(Path(path), "bfloat16")
        case "gristmill_fp32":
            side = Gristmill(Path(path), "float32")
        case "transformers":
            side = Transformers(Path(path))
        case "llamacpp":
            side = LlamaCpp(Path(path))
        case _:
            raise SystemExit(f"there is no side {name}")
    for line in sys.stdin:
        asked = json.loads(line)
        way = next((way for way in ("judge", "quantize", "about") if way in asked), "answer")
        print(json.dumps(getattr(side, way)(**asked)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
