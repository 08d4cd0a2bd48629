"""Generation beside llama.cpp and transformers: decoding, prompts, the memory's rate, what exactness costs.

    make bench-inference       or       python benchmarks/inference.py [tiny] [bf16] [int8] [int4]

Random weights in the Qwen3-MoE layout, written by our own export, as GGUF too; llama.cpp makes its Q8_0 and Q4_0 of
that (every matrix, the output one included), `gristmill quantize` our int8 and int4 in groups of 64. Each side is a
process of its own (inference_worker.py) with THREADS threads that keeps its model, and they take turns; every prompt is
new. Decoding is greedy, after prompts of 64; a prompt to be measured has 512 tokens. The figures are medians over the
rounds, the ratio that of each round's. Ours and the peer's are tokens/s, so a ratio is better when it is larger; of
`deterministic_cost_*` the peer is our engine with the matrix library's products of any number of rows, which promise
no bits, and of the share ours are the GB/s of weights that decoding reads, the peer those of reading memory.

Beside the speed, the checks, without which nothing is kept: a sequence's tokens and log-probabilities are the same bits
alone and among eight, and a token of ours is the one that transformers finds best, or within TIE of it. Results to
results/inference.json, where rows that were not run stay; `tiny` only shows that everything runs.
"""

import ctypes
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from inference_worker import THREADS
from tokenizers import decoders, models, pre_tokenizers
from training import Side, route_as_trained

from gristmill.hub import in_memory, open_weights, write_weights
from gristmill.hub.export import export_gguf, export_model
from gristmill.hub.tensors import DTYPES, PACKED
from gristmill.model import ModelConfig, Transformer, init_weights
from gristmill.tokenizer.layout import SPECIAL_TOKENS, SPLIT_PATTERN, byte_of_symbol, write_tokenizer
from gristmill.train.machine import describe_machine

HERE = Path(__file__).parent
RESULTS, CACHE, PEERS = HERE / "results" / "inference.json", HERE / ".cache", HERE.parent / ".peers"
M = ModelConfig(
    d_model=1024, n_layers=16, n_heads=16, kv_n_heads=4, ffn_hidden_size=1152, moe_num_experts=16, moe_top_k=4,
    vocab_size=32768, max_seq_len=1024, norm="rms_norm", norm_eps=1e-6, qk_norm=True, clip_qkv=None,
)  # fmt: skip
TINY = replace(M, d_model=128, n_layers=2, n_heads=2, kv_n_heads=1, ffn_hidden_size=64, vocab_size=384)
GROUP = 64
BITS = {"bf16": None, "int8": ("8", "Q8_0"), "int4": ("4", "Q4_0")}
WARM_UP = 1
TIE = 2 * 2**-7  # of the largest logit: two steps of bf16 where they are widest
ROUTED_ELSEWHERE = 0.01  # of the tokens may lie further off: transformers' router in bf16 breaks ties of its own
MUSTS = {  # row -> what its ratio must reach, and what it aims at
    **{f"decode_b1_{bits}_over_llamacpp": (1.1, 1.6) for bits in BITS},
    **{f"decode_b8_{bits}_over_llamacpp": (1.5, 2.5) for bits in BITS},
    "prefill_over_transformers": (2.0, 3.0),
    "prefill_over_llamacpp": (6.0, 10.0),
    "decode_share_of_dram_int8": (0.6, 0.8),
    "deterministic_cost_b1": (0.9, 0.96),
    "deterministic_cost_b8": (0.9, 0.96),
}


# ---- the models ----------------------------------------------------------------------------------------


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, made if it is not there: under another name, so that half of one is never found."""
    if not path.exists():
        print(f"  making {path.name}", flush=True)
        partial = path.with_name(f"partial-{path.name}")  # with the ending that a GGUF file must have
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
        make(partial)
        partial.rename(path)
    return path


def cached(cfg: ModelConfig) -> Path:
    """The folder of this shape's models."""
    folder = CACHE / hashlib.sha256(json.dumps(asdict(cfg)).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_checkpoint(folder: Path, cfg: ModelConfig) -> None:
    torch.manual_seed(0)
    model = init_weights(Transformer(cfg), seed=0)
    route_as_trained(model, skew=0.0)
    (folder / "model.json").write_text(json.dumps(asdict(cfg)))
    write_weights(folder, in_memory(model.bfloat16().state_dict()))
    # A GGUF file needs a tokenizer, and llama.cpp one merge at least.
    bpe = tokenizers.Tokenizer(models.BPE(byte_of_symbol() | {"th": 256}, [("t", "h")]))
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([split, by_bytes]), decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    (folder / "tokenizer").mkdir()
    write_tokenizer(folder / "tokenizer", bpe.to_str())


def checkpoint_of(cfg: ModelConfig) -> Path:
    def write(out: Path) -> None:
        out.mkdir()
        write_checkpoint(out, cfg)

    return made(cached(cfg) / "checkpoint", write)


def ours_of(cfg: ModelConfig, bits: str) -> Path:
    """The Hugging Face directory that the engine runs."""
    source = made(cached(cfg) / "bf16", lambda out: export_model(checkpoint_of(cfg), out, torch.bfloat16, "qwen3_moe"))
    if (kind := BITS[bits]) is None:
        return source
    quantize = [sys.executable, "-m", "gristmill.cli", "quantize", str(source)]
    options = ["--bits", kind[0], "--group", str(GROUP)]
    return made(cached(cfg) / bits, lambda out: subprocess.run([*quantize, str(out), *options], check=True))


def llamacpps_of(cfg: ModelConfig, bits: str) -> Path:
    """The GGUF file of as many bits."""
    source = made(cached(cfg) / "bf16.gguf", lambda out: export_gguf(checkpoint_of(cfg), out, torch.bfloat16))
    if (kind := BITS[bits]) is None:
        return source

    def quantize(out: Path) -> None:
        with side("llamacpp", source) as peer:
            peer.ask(json.dumps({"quantize": kind[1], "out": str(out)}))

    return made(cached(cfg) / f"{kind[1]}.gguf", quantize)


def read_bytes_per_token(folder: Path, cfg: ModelConfig) -> float:
    """What one token reads of the weights as they are stored: its own experts, of the embedding next to nothing."""
    total = 0.0
    for name, weight in open_weights(folder, DTYPES | PACKED).items():
        if "embed_tokens" not in name:
            total += weight.nbytes * (cfg.moe_top_k / cfg.moe_num_experts if ".experts." in name else 1)
    return total


# ---- measuring -----------------------------------------------------------------------------------------


@contextmanager
def side(name: str, model: Path) -> Iterator[Side]:
    python = str(PEERS / "bin" / "python") if name == "llamacpp" else sys.executable
    env = {"OMP_NUM_THREADS": str(THREADS)}
    worker = Side([str(HERE / "inference_worker.py"), name, str(model)], env, python=python)
    try:
        yield worker
    finally:
        worker.close()


def decode_rate(worker: Side, prompts: list[list[int]], new: int, **options: Any) -> float:
    answer = worker.ask(json.dumps({"prompts": prompts, "new": new, **options}))
    assert all(len(tokens) == new for tokens in answer["tokens"])
    return float(len(prompts) * (new - 1) / answer["rest"])


def prompt_rate(worker: Side, prompt: list[int], **options: Any) -> float:
    return float(len(prompt) / worker.ask(json.dumps({"prompts": [prompt], "new": 1, **options}))["first"])


class Memory:
    """How fast THREADS threads read memory: a sum over far more than the caches hold, in huge pages."""

    SOURCE = """
    #include <stddef.h>
    #include <stdint.h>
    uint64_t total(const uint64_t *restrict x, size_t count) {
        uint64_t sum = 0;
        for (size_t i = 0; i < count; i += 512) {  // ahead of the hardware, which stops at pages of 4 KiB
            for (size_t line = 0; line < 512; line += 8) __builtin_prefetch(x + i + line + 1024);
            for (size_t j = 0; j < 512; j++) sum += x[i + j];
        }
        return sum;
    }
    """

    def __init__(self, num_bytes: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "total.c"), Path(folder, "total.so")
            source.write_text(self.SOURCE)
            command = ["gcc", "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(source)]
            subprocess.run(command, check=True)
            self.total = ctypes.CDLL(str(library)).total
        self.total.argtypes, self.total.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_uint64
        huge = 2**21
        self.room = torch.empty(num_bytes + huge, dtype=torch.uint8)
        self.begin, self.num_bytes = -(-self.room.data_ptr() // huge) * huge, num_bytes
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(self.begin), ctypes.c_size_t(num_bytes), 14)  # MADV_HUGEPAGE
        self.room.fill_(1)

    def rate(self) -> float:
        """Bytes a second: the best of three, since others only ever make it slower."""
        share = self.num_bytes // THREADS // 4096 * 4096
        seconds = []
        for _ in range(3):
            starts = [self.begin + i * share for i in range(THREADS)]
            threads = [threading.Thread(target=self.total, args=(start, share // 8)) for start in starts]
            started = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds.append(time.perf_counter() - started)
        return THREADS * share / min(seconds)


class Rates:
    """Of each row, ours and the peer's, round by round."""

    def __init__(self) -> None:
        self.by_row: dict[str, list[tuple[float, float]]] = {}

    def add(self, row: str, ours: float, peer: float) -> None:
        self.by_row.setdefault(row, []).append((ours, peer))

    def rows(self) -> dict[str, dict[str, float]]:
        found = {}
        for row, pairs in self.by_row.items():
            ours, peer = (statistics.median(each) for each in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            found[row] = {"ours": round(ours, 2), "peer": round(peer, 2), "ratio": round(ratio, 3)}
        return found


def fresh(cfg: ModelConfig, count: int, length: int, seed: int) -> list[list[int]]:
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(cfg.vocab_size or 0, (count, length), generator=chance).tolist()


def measure(cfg: ModelConfig, bits: str, rounds: int, new: int, rates: Rates, memory: Memory) -> dict[str, Any]:
    """The rows of one precision; what was checked on the way."""
    ours_at, peer_at = ours_of(cfg, bits), llamacpps_of(cfg, bits)
    with side("gristmill", ours_at) as ours, side("llamacpp", peer_at) as peer:
        for number in range(-WARM_UP, rounds):
            counted = rates if number >= 0 else Rates()
            prompts, (long,) = fresh(cfg, 8, 64, 2 * number), fresh(cfg, 1, 512, 2 * number + 1)
            for batch in (1, 8):
                mine = decode_rate(ours, prompts[:batch], new)
                counted.add(f"decode_b{batch}_{bits}_over_llamacpp", mine, decode_rate(peer, prompts[:batch], new))
                if bits == "bf16":
                    free = decode_rate(ours, prompts[:batch], new, invariant=False)
                    counted.add(f"deterministic_cost_b{batch}", mine, free)
                if bits == "int8" and batch == 1:
                    read = mine * read_bytes_per_token(ours_at, cfg)
                    counted.add("decode_share_of_dram_int8", read / 1e9, memory.rate() / 1e9)
            if bits == "bf16":
                counted.add("prefill_over_llamacpp", prompt_rate(ours, long), prompt_rate(peer, long))
        return {f"same_bits_alone_and_among_eight_{bits}": same_bits(ours, fresh(cfg, 8, 64, 10**6), new)}


def beside_transformers(cfg: ModelConfig, rounds: int, new: int, rates: Rates) -> dict[str, Any]:
    folder = ours_of(cfg, "bf16")
    with side("gristmill", folder) as ours, side("transformers", folder) as peer:
        for number in range(-WARM_UP, rounds):
            prompt, again = fresh(cfg, 2, 512, 10**7 + number)
            mine = prompt_rate(ours, prompt)
            (rates if number >= 0 else Rates()).add("prefill_over_transformers", mine, prompt_rate(peer, prompt))
            free = prompt_rate(ours, again, invariant=False)
            (rates if number >= 0 else Rates()).add("deterministic_cost_prefill", prompt_rate(ours, again), free)
        return greedy_as(peer, ours, fresh(cfg, 4, 64, 10**6 + 1), new)


def in_fp32(cfg: ModelConfig, rounds: int, new: int, rates: Rates) -> None:
    """What exactness costs where the matrix library rounds one row in a way of its own."""
    with side("gristmill_fp32", ours_of(cfg, "bf16")) as ours:
        for number in range(-WARM_UP, rounds):
            prompts = fresh(cfg, 8, 64, 2 * 10**7 + number)
            for batch in (1, 8):
                mine, free = (decode_rate(ours, prompts[:batch], new, invariant=exact) for exact in (True, False))
                (rates if number >= 0 else Rates()).add(f"deterministic_cost_fp32_b{batch}", mine, free)


# ---- checks --------------------------------------------------------------------------------------------


def same_bits(ours: Side, prompts: list[list[int]], new: int) -> bool:
    together, alone = (
        ours.ask(json.dumps({"prompts": asked, "new": new, "logprobs": True})) for asked in (prompts, prompts[:1])
    )
    return all(together[what][0] == alone[what][0] for what in ("tokens", "logprobs"))


def greedy_as(theirs: Side, ours: Side, prompts: list[list[int]], new: int) -> dict[str, Any]:
    """Each token of ours is judged where it stands, so one that differs does not hide those after it."""
    outcomes, largest_gap = {"equal": 0, "tie": 0, "other": 0}, 0.0
    made = ours.ask(json.dumps({"prompts": prompts, "new": new}))["tokens"]
    for prompt, tokens in zip(prompts, made, strict=True):
        judged = theirs.ask(json.dumps({"prompt": prompt, "judge": tokens}))
        for below, largest in zip(judged["below"], judged["largest"], strict=True):
            outcomes["equal" if below == 0 else "tie" if below <= TIE * largest else "other"] += 1
            largest_gap = max(largest_gap, below / largest)
    return {"greedy_tokens_in_transformers": outcomes, "largest_gap_over_logit": round(largest_gap, 4)}


# ---- the whole -----------------------------------------------------------------------------------------


def about(load: float) -> dict[str, Any]:
    with side("llamacpp", Path()) as peer:
        built = peer.ask(json.dumps({"about": True}))
    flags = dict(line.split(": ", 1) for line in (PEERS / "built").read_text().splitlines())
    loads = {"load_before": round(load, 2), "load_after": round(os.getloadavg()[0], 2)}
    versions = {"torch": torch.__version__, "transformers": __import__("transformers").__version__}
    return describe_machine() | {"threads": THREADS, **loads, **versions, "llama.cpp": built | flags}


def table(rows: dict[str, dict[str, float]]) -> Iterator[str]:
    yield f"{'':34}{'ours':>9}{'peer':>9}{'ratio':>8}{'must':>7}{'aim':>7}"
    for row in [*(row for row in MUSTS if row in rows), *(row for row in rows if row not in MUSTS)]:
        each = rows[row]
        line = f"{row:34}{each['ours']:9.1f}{each['peer']:9.1f}{each['ratio']:8.2f}"
        if row in MUSTS:
            must, aim = MUSTS[row]
            verdict = "aim reached" if each["ratio"] >= aim else "reached" if each["ratio"] >= must else "missed"
            line += f"{must:7.2f}{aim:7.2f}  {verdict}"
        yield line


def main() -> None:
    tiny, load = "tiny" in sys.argv[1:], os.getloadavg()[0]
    cfg, rounds, new = (TINY, 1, 4) if tiny else (M, 5, 64)
    rates, checks, memory = Rates(), {}, Memory(2**26 if tiny else 2**30)
    for bits in [bits for bits in BITS if bits in sys.argv[1:]] or BITS:
        print(bits, flush=True)
        checks |= measure(cfg, bits, rounds, new, rates, memory)
        if bits == "bf16":
            checks |= beside_transformers(cfg, rounds, new, rates)
            in_fp32(cfg, min(rounds, 3), new // 2, rates)
    rows, machine = rates.rows(), about(load)
    print(*table(rows), json.dumps(checks), json.dumps(machine), sep="\n")
    judged = checks.get("greedy_tokens_in_transformers", {"other": 0})
    if any(check is False for check in checks.values()) or judged["other"] > ROUTED_ELSEWHERE * sum(judged.values()):
        raise SystemExit("the checks fail: nothing is kept")
    if not tiny:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        checks = known.get("machine", {}).get("checks", {}) | checks
        RESULTS.write_text(json.dumps(known | rows | {"machine": machine | {"checks": checks}}, indent=2) + "\n")


if __name__ == "__main__":
    main()
