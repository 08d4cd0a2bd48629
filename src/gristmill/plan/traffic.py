"""Computes the bytes that ranks send each other in a step, and the time of a step, with a roofline model.

    step = micro-batches x (max(forward, gather) + max(backward, gather + scatter) + loss + exchange + context)
           + the first gather and the last scatter + repeat + optimizer

forward, backward, loss: the operations of each matrix product over its share of the peak, plus the bytes of
element-wise work over the memory's bandwidth. gather, scatter: FSDP's, which overlap with the products of the previous
block. Not overlapped: the all-to-all of tokens (exchange), the keys and values of context parallelism, and the
all-reduce over replicas (repeat).

A collective of n ranks takes bytes x (n - 1) / n over a bandwidth, plus a latency per hop of its ring. Inside a node
the bandwidth is NVLink's. Between nodes it is the sum of the network cards of the group's members in one node, because
each card carries its own part of a ring. All shares and latencies are assumptions, to be replaced by measurements.
"""

from dataclasses import dataclass

from gristmill.model.counts import Part, count_parts
from gristmill.plan.footprint import FP32, Footprint
from gristmill.plan.hardware import Hardware

LINK_SHARE = 0.8  # share of a link's published bandwidth
MEMORY_SHARE = 0.8  # share of the memory's published bandwidth
NETWORK_HOP_S = 10e-6  # latency of a hop between nodes
NODE_HOP_S = 2e-6  # latency of a hop inside a node
SCORES_BACKWARD = 2.5  # attention's products in the backward pass per product in the forward pass: five for two
# Bytes moved per gathered weight: to reorder and to cast it; the backward pass also casts its gradient to fp32.
WEIGHT_FORWARD, WEIGHT_BACKWARD = 8, 24
OPTIMIZER_BYTES = 40  # moved per parameter: weight, gradient and moments read and written, the norm and the clipping


@dataclass(frozen=True)
class Group:
    """`size` ranks whose numbers are `stride` apart."""

    size: int
    stride: int = 1

    def per_node(self, hardware: Hardware) -> int:
        """Return the number of members in one node."""
        return max(1, min(self.size, hardware.per_node // self.stride))

    def inside(self, hardware: Hardware) -> bool:
        return self.size == 1 or hardware.per_node % (self.size * self.stride) == 0


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Traffic of one GPU in one step. It receives `bytes_sent` too. `hidden`: overlaps with matrix products."""

    name: str
    ranks: int
    link: str
    bytes_sent: int
    seconds: float
    hidden: bool


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of a step's parts on the busiest rank. Hidden traffic counts only as far as nothing hides it."""

    forward: float
    backward: float
    loss: float
    gather_and_scatter: float
    exchange: float
    context: float
    repeat: float
    optimizer: float

    @property
    def step(self) -> float:
        parts = (self.forward, self.backward, self.loss, self.gather_and_scatter)
        return sum(parts) + self.exchange + self.context + self.repeat + self.optimizer


class Clock:
    """The times of one training on one kind of hardware."""

    def __init__(self, footprint: Footprint, hardware: Hardware) -> None:
        self.of, self.hardware = footprint, hardware
        layout = footprint.way.layout
        self.split = Group(layout.split)
        self.expert_split = Group(layout.expert_split, layout.expert)
        self.experts = Group(layout.expert)
        self.context = Group(layout.context)
        self.replicas = Group(layout.replicate, layout.split)

    # ---- collectives ------------------------------------------------------------------------------------

    def _bandwidth(self, group: Group) -> float:
        hw = self.hardware
        link = hw.nvlink if group.inside(hw) else min(hw.nvlink, group.per_node(hw) * hw.network)
        return link * LINK_SHARE

    def _ring(self, whole: float, group: Group) -> tuple[float, float]:
        """Return (bytes that each rank sends, seconds) of one all-gather or reduce-scatter of `whole` bytes."""
        if group.size == 1:
            return 0.0, 0.0
        sent = whole * (group.size - 1) / group.size
        nodes = 1 if group.inside(self.hardware) else -(-group.size // group.per_node(self.hardware))
        latency = (nodes - 1) * NETWORK_HOP_S + (group.size - nodes) * NODE_HOP_S
        return sent, sent / self._bandwidth(group) + latency

    def _all_to_all(self, given: float, group: Group) -> tuple[float, float]:
        """Return (bytes sent, seconds) of an all-to-all in which each rank has `given` bytes, an equal part per rank.

        NVLink and the network work at the same time.
        """
        hw, size = self.hardware, group.size
        if size == 1:
            return 0.0, 0.0
        near = group.per_node(hw)
        inside = given * (near - 1) / size / (hw.nvlink * LINK_SHARE)
        beyond = given * (size - near) / size / (hw.network * LINK_SHARE)
        return given * (size - 1) / size, max(inside, beyond) + NETWORK_HOP_S

    def _link(self, group: Group) -> str:
        near = "NVLink" if self.hardware.on_gpu else "memory"
        return near if group.inside(self.hardware) else "network"

    # ---- one micro-batch --------------------------------------------------------------------------------

    def gathers(self) -> list[tuple[str, Group, float, float]]:
        """Return (name, group, bytes, seconds) of FSDP's collectives in one micro-batch.

        Weights are gathered once for the forward pass and once for the backward pass.
        """
        of = self.of
        L, found = of.cfg.n_layers, []
        for name, group, numel in (("weights", self.split, of.dense), ("experts", self.expert_split, of.stacks)):
            gather, gather_s = self._ring(of.gathered * numel, group)
            scatter, scatter_s = self._ring(FP32 * numel, group)
            found.append((f"all-gather of {name}", group, 2 * L * gather, 2 * L * gather_s))
            found.append((f"reduce-scatter of {name}", group, L * scatter, L * scatter_s))
        # The embedding in fp32, in the forward pass and, if it was released, again in the backward pass.
        times = 1 if of.cfg.tie_word_embeddings else 2
        gather, gather_s = self._ring(of.gathered * of.root + times * FP32 * of.vocabulary, self.split)
        scatter, scatter_s = self._ring(FP32 * (of.root + of.vocabulary), self.split)
        found.append(("all-gather of embedding and output", self.split, gather, gather_s))
        found.append(("reduce-scatter of embedding and output", self.split, scatter, scatter_s))
        return found

    def exchange(self) -> tuple[float, float]:
        """Return (bytes, seconds) of sending rows to their experts and back, in all passes of a micro-batch."""
        of = self.of
        passes = 4 if of.way.recompute == "none" else 6
        rows = of.tokens * of.cfg.moe_top_k * of.load * of.cfg.d_model * of.a
        sent, seconds = self._all_to_all(rows, self.experts)
        times = passes * of.cfg.n_layers if of.cfg.ffn == "moe" else 0
        return times * sent, times * seconds

    def context_gather(self) -> tuple[float, float]:
        """Return (bytes, seconds) of gathering keys and values of all positions and returning their gradients."""
        of = self.of
        whole = of.tokens * of.way.layout.context * 2 * of.cfg.kv_n_heads * of.cfg.head_dim * of.a
        sent, seconds = self._ring(whole, self.context)
        times = of.cfg.n_layers * (3 if of.way.recompute == "full" else 2)
        return times * sent, times * seconds

    def _products(self, part: Part) -> float:
        """Return the seconds of a part's forward products in all layers."""
        hw, load = self.hardware, self.of.load if part.name == "experts" else 1.0
        share = {"experts": hw.grouped, "attention scores": hw.attention}.get(part.name, hw.dense)
        return part.forward_flops * self.of.tokens * load / (hw.flops * share)

    def _moved(self, names: str) -> float:
        """Return the seconds of the element-wise work in all blocks' forward passes, from the bytes that it moves."""
        of, cfg = self.of, self.of.cfg
        D, K, F, a = cfg.d_model, cfg.moe_top_k, cfg.ffn_hidden_size, of.a
        heads = (cfg.n_heads + 2 * cfg.kv_n_heads) * cfg.head_dim
        attention = a * (5 * D + 2 * heads)  # norm, rotation, sum
        ffn = a * 5 * D + (a * (2 * K + 2) * D + 8 * D + a * 3 * F * K if cfg.ffn == "moe" else a * 5 * F)
        each = ffn if names == "ffn" else attention + ffn
        return cfg.n_layers * of.tokens * each / (self.hardware.memory_bandwidth * MEMORY_SHARE)

    def passes(self) -> tuple[float, float, float]:
        """Return the seconds of (all blocks forward, all blocks backward, the loss) of one micro-batch."""
        of, hw = self.of, self.hardware
        parts = {part.name: self._products(part) for part in count_parts(of.cfg, of.training.seq_len)}
        output = parts.pop("output")
        scores, forward = parts["attention scores"], sum(parts.values())
        weights = of.cfg.n_layers * (of.dense + of.stacks) / (hw.memory_bandwidth * MEMORY_SHARE)
        backward = 2 * forward + (SCORES_BACKWARD - 2) * scores + 2 * self._moved("all") + WEIGHT_BACKWARD * weights
        match of.way.recompute:
            case "selective":
                backward += sum(parts.get(name, 0.0) for name in ("experts", "router", "dense")) + self._moved("ffn")
            case "full":
                backward += forward + self._moved("all")
        # Each chunk of the loss adds its part to the weight's gradient, and reads or writes its logits four times.
        added = of.vocabulary * (2 * of.a + 2 * FP32) * -(-of.tokens // of.chunk)
        logits = of.tokens * (of.cfg.vocab_size or 0) * 4 * of.a
        loss = 3 * output + (added + logits) / (hw.memory_bandwidth * MEMORY_SHARE)
        return forward + self._moved("all") + WEIGHT_FORWARD * weights, backward, loss

    # ---- one step ---------------------------------------------------------------------------------------

    def times(self) -> Times:
        of = self.of
        n, L = of.micro_batches, of.cfg.n_layers
        forward, backward, loss = self.passes()
        sums = {"all-gather": 0.0, "reduce-scatter": 0.0}
        for name, _, _, seconds in self.gathers():
            if "output" not in name:
                sums[name.partition(" ")[0]] += seconds
        root = sum(seconds for name, _, _, seconds in self.gathers() if "output" in name)
        gather, scatter = sums["all-gather"] / 2, sums["reduce-scatter"]
        shown = max(0.0, gather - forward) + max(0.0, gather + scatter - backward) + root
        edges = (gather + scatter) / L
        return Times(
            forward=n * forward,
            backward=n * backward,
            loss=n * loss,
            gather_and_scatter=n * shown + edges,
            exchange=n * self.exchange()[1],
            context=n * self.context_gather()[1],
            repeat=self.repeat()[1],
            optimizer=self.optimizer(),
        )

    def repeat(self) -> tuple[float, float]:
        """Return (bytes, seconds) of the gradients' all-reduce over replicas: a reduce-scatter and an all-gather."""
        sent, seconds = self._ring(self.of.state, self.replicas)
        return 2 * sent, 2 * seconds

    def optimizer(self) -> float:
        of, hw = self.of, self.hardware
        seconds = of.state / FP32 * OPTIMIZER_BYTES / (hw.memory_bandwidth * MEMORY_SHARE)
        iterations = of.training.optimizer.iterations
        if iterations == 0:
            return seconds
        flops = sum(copies * iterations * (4 * few * few * many + 2 * few**3) for few, many, copies in of.matrices())
        return seconds + flops / (hw.flops * hw.dense) + 2 * self._all_to_all(of.alike, self.split)[1]

    def traffic(self) -> list[Traffic]:
        n = self.of.micro_batches
        rows = [(name, group, n * sent, n * seconds, True) for name, group, sent, seconds in self.gathers()]
        sent, seconds = self.repeat()
        rows.append(("all-reduce over repeats", self.replicas, sent, seconds, False))
        sent, seconds = self.exchange()
        rows.append(("all-to-all of tokens", self.experts, n * sent, n * seconds, False))
        sent, seconds = self.context_gather()
        rows.append(("keys and values of a sequence", self.context, n * sent, n * seconds, False))
        return [
            Traffic(name=name, ranks=group.size, link=self._link(group), bytes_sent=round(sent), seconds=seconds,
                    hidden=hidden)
            for name, group, sent, seconds, hidden in rows if sent
        ]  # fmt: skip
