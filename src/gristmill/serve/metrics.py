"""Figures for Prometheus, under the names that vLLM's dashboards ask for. The text format 0.0.4, written by hand."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)


class Histogram:
    """One thread adds; another may read at any time."""

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def samples(self) -> Iterable[tuple[str, Mapping[str, str], float]]:
        counts, so_far = list(self.counts), 0
        for bound, count in zip([*self.bounds, float("inf")], counts, strict=True):
            so_far += count
            yield "_bucket", {"le": "+Inf" if bound == float("inf") else f"{bound:g}"}, so_far
        yield "_sum", {}, self.total
        yield "_count", {}, so_far


class Metrics:
    """What the engine's thread counts. Tokens, and seconds since a request came."""

    def __init__(self) -> None:
        self.first_token, self.between_tokens, self.whole_request = Histogram(), Histogram(), Histogram()
        self.prompt_tokens = self.cached_tokens = self.made_tokens = 0
        self.finishes: Counter[str] = Counter({"stop": 0, "length": 0, "cancelled": 0})

    def text(self, model: str, gauges: Mapping[str, float]) -> str:
        """gauges: what stands now, by vLLM's names."""
        lines: list[str] = []

        def write(name: str, kind: str, help: str, samples: Iterable[tuple[str, Mapping[str, str], float]]) -> None:
            lines.extend((f"# HELP {name} {help}", f"# TYPE {name} {kind}"))
            for suffix, labels, value in samples:
                said = ",".join(f'{key}="{_escaped(text)}"' for key, text in {"model_name": model, **labels}.items())
                lines.append(f"{name}{suffix}{{{said}}} {value:.17g}")

        for name, help in GAUGES.items():
            write(f"vllm:{name}", "gauge", help, [("", {}, gauges[name])])
        for name, help, value in (
            ("prompt_tokens", "Prompt tokens of the requests that were accepted.", self.prompt_tokens),
            ("generation_tokens", "Tokens made.", self.made_tokens),
            ("prefix_cache_queries", "Prompt tokens that were looked for in the cache.", self.prompt_tokens),
            ("prefix_cache_hits", "Prompt tokens that were found there when their request came.", self.cached_tokens),
        ):
            write(f"vllm:{name}_total", "counter", help, [("", {}, value)])
        finishes = [("", {"finished_reason": reason}, float(count)) for reason, count in self.finishes.items()]
        write("vllm:request_success_total", "counter", "Answers that ended, by why.", finishes)
        for name, help, histogram in (
            ("time_to_first_token_seconds", "From a request's arrival to its first token.", self.first_token),
            ("inter_token_latency_seconds", "Between an answer's tokens.", self.between_tokens),
            ("e2e_request_latency_seconds", "From a request's arrival to an answer's end.", self.whole_request),
        ):
            write(f"vllm:{name}", "histogram", help, histogram.samples())
        return "\n".join(lines) + "\n"


GAUGES = {
    "num_requests_running": "Sequences in the engine's steps.",
    "num_requests_waiting": "Sequences that wait for their first step.",
    "kv_cache_usage_perc": "Share of the cache's blocks that running sequences hold; 1 is all.",
}


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
