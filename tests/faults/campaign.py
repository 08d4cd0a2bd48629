"""Faults of every kind, one after the other, each against a training that ends: what was lost, and is the end the same?

    PYTHONPATH=tests python tests/faults/campaign.py [--share 1.0] [--table docs/reliability.md]

Each fault hits a run that would go on; then the same command is given again, until it is done. It must end with the
same bytes and the same curve as an unbroken run on as many ranks, and never go back by more than an interval and the
save that was under way.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from broken_runs import Run, copied, wait
from forked import SERVER
from network import two_hosts
from texts import write_texts

from gristmill.pipeline import run
from gristmill.recipe import load_recipe

EVERY = 4
SPLIT = ("train.parallel.shard=2", "train.parallel.expert=2")
BEGIN, END = "<!-- table of faults: written by tests/faults/campaign.py -->", "<!-- end of the table -->"
RECIPE = """\
name: faults
corpus:
  sources:
    notes: {{path: "{notes}", license: CC0-1.0, weight: {{0.0: 1.0, 0.5: [2.0, 1.0]}}}}
    verse: {{path: "{verse}", license: MIT}}
  split: {{validation: 0.1, test: 0.1}}
tokenizer: {{vocab_size: 384}}
shards: {{block_tokens: 256}}
model: {{d_model: 64, n_layers: 2, n_heads: 4, kv_n_heads: 2, ffn_hidden_size: 96, moe_num_experts: 8, moe_top_k: 2,
  max_seq_len: 128}}
train: {{steps: 24, batch_tokens: 512, seq_len: 64, micro_batch: 8, log_every: 1, dtype: float32, threads: 1,
  rank_timeout_s: 20, optimizer: {{name: muon, lr: 0.01}}, checkpoint: {{every: {every}, keep: 2}},
  tracking: {{enabled: false}}}}
evaluate: {{training_bytes: 2000, prompt_tokens: 16, sample_tokens: 8}}
"""


@dataclass
class Tally:
    """What a kind of fault did. `lost`: for each, the steps that were computed again."""

    name: str
    hits: int = 0
    while_saving: int = 0
    lost: list[int] = field(default_factory=list)
    runs: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def row(self) -> str:
        lost = f"{max(self.lost)} (mean {sum(self.lost) / len(self.lost):.1f})" if self.lost else "-"
        saving = f"{self.while_saving}" if self.while_saving else "-"
        return f"| {self.name} | {self.hits} | {saving} | {lost} | {self.runs} of {self.runs} |"


class Campaign:
    """A prepared run folder, the unbroken runs beside it, and a folder for each broken one."""

    def __init__(self, work: Path, recipe: Path, seed: int = 0) -> None:
        self.work, self.recipe = work, recipe
        self.chance = random.Random(seed)
        self.number = 0
        ready = SERVER.Process(target=int)  # the server has imported all that it needs: runs are timed without that
        ready.start()
        ready.join()
        self.prepared = run(load_recipe(str(recipe)), work / "prepared", "shards")
        self.unbroken: dict[tuple[int, tuple[str, ...]], tuple[str, list[dict[str, object]], float]] = {}

    def new(self, ranks: int = 1, *overrides: str) -> Run:
        self.number += 1
        return Run(self.recipe, copied(self.prepared, self.work / f"run-{self.number}"), overrides, ranks)

    def expected(self, ranks: int, *split: str) -> tuple[str, list[dict[str, object]], float]:
        """Content, curve and seconds of an unbroken run, the model split over the ranks or not."""
        if (ranks, split) not in self.unbroken:
            whole = self.new(ranks, *split)
            started = time.monotonic()
            assert whole.finish() == [0] * ranks, whole.said()
            self.unbroken[ranks, split] = whole.content(), whole.curve(), time.monotonic() - started
        return self.unbroken[ranks, split]

    def check_end(self, broken: Run, tally: Tally, same_curve: bool = True) -> None:
        """Train to the end, and compare with the unbroken run; the folder goes."""
        codes = broken.finish()
        assert codes == [0] * broken.ranks, (tally.name, codes, broken.said()[-3000:])
        split = tuple(override for override in broken.overrides if override.startswith("train.parallel"))
        content, curve, _ = self.expected(broken.ranks, *split)
        assert broken.content() == content, f"{tally.name}: other bytes than the unbroken run"
        assert not same_curve or broken.curve() == curve, f"{tally.name}: another curve than the unbroken run"
        tally.runs += 1
        shutil.rmtree(broken.out)

    # ---- kills ---------------------------------------------------------------------------------------

    def kills(self, count: int, ranks: int, *split: str) -> Tally:
        """kill -9 of one rank: every second one inside a save, the others anywhere."""
        who = "one process" if ranks == 1 else f"{ranks} ranks"
        tally = Tally(f"kill -9, {who}{', the model split' if split else ''}")
        _, _, duration = self.expected(ranks, *split)
        while tally.hits < count:
            broken = self.new(ranks, *split)
            for _ in range(min(count - tally.hits, 8)):
                processes = broken.start()
                victim = self.chance.choice(processes)
                if tally.hits % 2 == 0:
                    moment: Callable[[], bool] = broken.is_saving
                    while broken.is_saving() and any(p.is_alive() for p in processes):
                        time.sleep(0.0005)  # what the run before left; this one clears it away first
                else:
                    deadline = time.monotonic() + self.chance.uniform(0, 1.1) * duration
                    moment = lambda at=deadline: time.monotonic() > at  # noqa: E731
                while all(p.is_alive() for p in processes) and not moment():
                    time.sleep(0.0005)
                if all(p.is_alive() for p in processes):
                    saving = broken.is_saving()
                    victim.kill()
                    tally.hits += 1
                    tally.while_saving += saving
                codes = wait(processes, 60)
                assert set(codes) <= {0, 1, -signal.SIGKILL}, (codes, broken.said()[-3000:])
                assert codes.count(-signal.SIGKILL) <= 1, (
                    f"another rank did not end within 60 s: {broken.said()[-3000:]}"
                )
                if ranks > 1 and 1 in codes:
                    said = broken.said(codes.index(1))
                    assert "is gone" in said or "did not find each other" in said, said[-3000:]
                if -signal.SIGKILL not in codes:
                    break
                stands = max(broken.committed(), default=0)
                lost = broken.last_logged() - stands
                assert lost < 2 * EVERY, f"{lost} steps lost: {broken.last_logged()} were logged, {stands} stand"
                tally.lost.append(lost)
            self.check_end(broken, tally)
        return tally

    def signals(self, count: int) -> Tally:
        """SIGTERM, again and again, every second one twice."""
        tally = Tally("SIGTERM storm")
        _, _, duration = self.expected(1)
        broken = self.new(1, "train.log_every=3")
        while tally.hits < count:
            (process,) = broken.start()
            time.sleep(self.chance.uniform(0, 1) * duration)
            if process.is_alive():
                before = broken.last_logged()
                for _ in range(1 + tally.hits % 2):
                    os.kill(process.pid, signal.SIGTERM)
                asked = time.monotonic()
                tally.hits += 1
                (code,) = wait([process])
                assert time.monotonic() - asked < 30
                assert code in (0, 75, -signal.SIGTERM), (code, broken.said()[-3000:])
                if code == 75:
                    tally.lost.append(max(0, before - max(broken.committed(), default=0)))
            else:
                self.check_end(broken, tally, same_curve=False)
                broken = self.new(1, "train.log_every=3")
        self.check_end(broken, tally, same_curve=False)
        return tally

    # ---- damage --------------------------------------------------------------------------------------

    def damage(self, kind: str, count: int) -> Tally:
        """A file of a checkpoint is changed behind the run's back; the checkpoint before it serves."""
        tally = Tally({"flip": "one bit flipped", "cut": "a file cut short", "delete": "a file deleted"}[kind])
        while tally.hits < count:
            broken = self.new()
            processes = broken.start()
            while len(broken.committed()) < 2 and processes[0].is_alive():
                time.sleep(0.001)
            processes[0].kill()
            wait(processes)
            stands = broken.committed()
            newest = broken.training / f"step-{stands[-1]:08d}"
            file = self.chance.choice(sorted(f for f in newest.rglob("*") if f.is_file()))
            data = bytearray(file.read_bytes())
            match kind:
                case "flip":
                    data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
                    file.write_bytes(data)
                case "cut":
                    file.write_bytes(data[: self.chance.randrange(len(data))])
                case "delete":
                    file.unlink()
            tally.hits += 1
            self.check_end(broken, tally)
            said = Path(f"{broken.out}.0.log").read_text()
            without_manifest = kind == "delete" and file.name == "manifest.json"  # then it is no checkpoint at all
            assert without_manifest or file.name in said, f"{kind} of {file} was not named: {said[-2000:]}"
            tally.lost.append(stands[-1] - (stands[-2] if len(stands) > 1 else 0))
        return tally

    # ---- the disk, the ranks -------------------------------------------------------------------------

    def full_disk(self) -> Tally:
        """A file system that is too small: the old checkpoint stands, and training stops or goes on, as told."""
        tally = Tally("a full disk of 64 MB")
        for policy in ("stop", "go_on"):
            with mounted(self.work / f"disk-{policy}") as disk:
                broken = Run(self.recipe, copied(self.prepared, disk / "run"), (f"train.checkpoint.on_error={policy}",))
                ballast = disk / "ballast"
                (process,) = broken.start()
                while not broken.committed() and process.is_alive():
                    time.sleep(0.001)
                fill(ballast)
                if policy == "go_on":
                    time.sleep(0.5)
                    ballast.unlink()
                (code,) = wait([process])
                stands = broken.committed()
                assert stands, "the older checkpoint is gone"
                if policy == "stop" and code != 0:
                    assert code == 1, (code, broken.said()[-2000:])
                    assert "No space left" in broken.said(), broken.said()[-2000:]
                    ballast.unlink()
                    tally.hits += 1
                elif policy == "go_on":
                    assert code == 0, (code, broken.said()[-2000:])
                    tally.hits += "was not saved" in broken.said()
                ballast.unlink(missing_ok=True)
                self.check_end(broken, tally)
        return tally

    def stopped_rank(self, *split: str) -> Tally:
        """One of two ranks is stopped (SIGSTOP): the other ends within its timeout and says which."""
        tally = Tally(f"a rank stopped (SIGSTOP){', the model split' if split else ''}")
        broken = self.new(2, *split)
        processes = broken.start()
        while not broken.committed() and all(p.is_alive() for p in processes):
            time.sleep(0.001)
        victim = processes[1]
        os.kill(victim.pid, signal.SIGSTOP)
        asked = time.monotonic()
        processes[0].join(60)
        took = time.monotonic() - asked
        assert processes[0].exitcode == 1, broken.said()[-2000:]
        assert "rank 1 (process" in broken.said(), broken.said()[-2000:]
        victim.kill()
        wait(processes)
        tally.hits += 1
        tally.notes.append(f"the other rank ended after {took:.0f} s (timeout 20 s) and named it")
        tally.lost.append(broken.last_logged() - max(broken.committed()))
        self.check_end(broken, tally)
        return tally

    def cut_off_rank(self) -> Tally:
        """The network of one of two ranks is gone, without a word: both end in a bounded time, and say which it is."""
        tally = Tally("a rank cut off (its network is gone)")
        with two_hosts() as network:
            broken = replace(self.new(2), network=network)
            processes = broken.start()
            while not broken.committed() and all(p.is_alive() for p in processes):
                time.sleep(0.001)
            network.cut_off(network.hosts[1])
            asked = time.monotonic()
            took: dict[int, float] = {}
            while len(took) < 2 and time.monotonic() < asked + 60:
                time.sleep(0.05)
                ended = {rank for rank in (0, 1) if not processes[rank].is_alive()}
                took |= {rank: time.monotonic() - asked for rank in ended - took.keys()}
            codes = wait(processes, 0)
        assert codes == [1, 1], (codes, broken.said(0)[-2000:], broken.said(1)[-2000:])
        assert "rank 1 (process" in broken.said(0), broken.said(0)[-2000:]
        assert "rank 1 is cut off" in broken.said(1), broken.said(1)[-2000:]
        tally.hits += 1
        tally.notes.append(
            f"the other rank ended after {took[0]:.0f} s (timeout 20 s) and named it, that one after {took[1]:.0f} s"
        )
        tally.lost.append(broken.last_logged() - max(broken.committed()))
        self.check_end(replace(broken, network=None), tally)
        return tally

    def other_world_sizes(self) -> Tally:
        """One process to two to four and back."""
        tally = Tally("1, 2, 4, 2, 1 processes in turn")
        broken = self.new()
        for ranks in (1, 2, 4, 2):
            broken.ranks = ranks
            before = len(broken.committed()) and broken.committed()[-1]
            processes = broken.start()
            while max(broken.committed(), default=0) <= before and all(p.is_alive() for p in processes):
                time.sleep(0.001)
            for process in processes:
                process.kill()
            wait(processes)
            tally.hits += 1
        broken.ranks = 1
        codes = broken.finish()
        assert codes == [0], broken.said()[-2000:]
        _, curve, _ = self.expected(1)
        largest = max(abs(a["loss"] - b["loss"]) for a, b in zip(broken.curve(), curve, strict=True) if "loss" in a)
        assert [a.get("source_tokens") for a in broken.curve()] == [b.get("source_tokens") for b in curve]
        assert largest < 2e-3, largest
        tally.runs += 1
        tally.notes.append(f"the same batches; largest difference of the loss {largest:.1e} nats")
        return tally


@contextmanager
def mounted(at: Path) -> Iterator[Path]:
    """A tmpfs of 64 MB."""
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as out, suppress(OSError):
        while out.write(b"\0" * (1 << 16)):
            pass


def faults(campaign: Campaign, share: float) -> dict[str, Callable[[], Tally]]:
    """The whole campaign, or a share of it."""

    def count(whole: int) -> int:
        return max(1, round(whole * share))

    return {
        "kill": lambda: campaign.kills(count(160), ranks=1),
        "kill-rank": lambda: campaign.kills(count(40), ranks=2),
        "flip": lambda: campaign.damage("flip", count(40)),
        "cut": lambda: campaign.damage("cut", count(20)),
        "delete": lambda: campaign.damage("delete", count(20)),
        "disk": campaign.full_disk,
        "kill-split": lambda: campaign.kills(count(10), 2, *SPLIT),
        "stop-rank": campaign.stopped_rank,
        "stop-split": lambda: campaign.stopped_rank(*SPLIT),
        "cut-off": campaign.cut_off_rank,
        "sigterm": lambda: campaign.signals(count(40)),
        "world-size": campaign.other_world_sizes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the number of faults")
    parser.add_argument("--only", nargs="*", help="some of: kill, kill-rank, flip, cut, delete, disk, ...")
    parser.add_argument("--table", type=Path, help="a Markdown file whose table of faults is written anew")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        campaign = Campaign(work, write_recipe(work))
        rows, notes = [], []
        for name, fault in faults(campaign, args.share).items():
            if args.only and name not in args.only:
                continue
            started = time.monotonic()
            tally = fault()
            tally.seconds = time.monotonic() - started
            print(tally.row(), f"{tally.seconds:.0f} s", *tally.notes, flush=True)
            rows.append(tally.row())
            notes += [f"{tally.name}: {note}" for note in tally.notes]
    if args.table:
        head = "| fault | hits | inside a save | steps computed again, at most | ended as the unbroken run |"
        table = "\n".join([head, "|---|---|---|---|---|", *rows, "", *(f"- {note}." for note in notes)])
        text = args.table.read_text()
        before, rest = text.split(BEGIN)
        args.table.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


def write_recipe(work: Path) -> Path:
    notes, verse = write_texts(work / "notes", 1), write_texts(work / "verse", 2)
    file = work / "faults.yaml"
    file.write_text(RECIPE.format(notes=notes, verse=verse, every=EVERY))
    return file


if __name__ == "__main__":
    main()
