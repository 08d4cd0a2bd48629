"""Many requests at once: none of them notices the others."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from gristmill.errors import InputError
from gristmill.inference import Engine, EngineConfig, QueueFull, Request, Sampling, Stream, Token
from gristmill.inference.invariant import TorchLayers
from gristmill.inference.scheduler import Job, Part
from gristmill.inference.scorer import causal
from gristmill.kernels import native
from gristmill.model import Transformer
from gristmill.tokenizer import StreamDecoder

Tiny = Callable[..., Transformer]
QWEN = {"norm": "rms_norm", "qk_norm": True, "head_size": 6, "d_model": 25, "ffn_hidden_size": 33, "clip_qkv": None}
FINE = {"moe_num_experts": 16, "moe_top_k": 4, "d_model": 64, "n_heads": 8, "kv_n_heads": 2}


class Letters:
    """Every id is a text of its own: of the first ones a letter each, of the others two."""

    eot_id = start_id = 299

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(bytes([97 + id % 26]) + (b"" if id < 26 else bytes([97 + id // 26])) for id in ids)

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode()

    def stream_decoder(self, skip_control: bool = False) -> StreamDecoder:
        return StreamDecoder(self, frozenset({299}) if skip_control else frozenset())  # type: ignore[arg-type]


def engine(model: Transformer, tokenizer: Any = None, **changes: Any) -> Engine:
    return Engine(model, EngineConfig(**{"cache_tokens": 2048, **changes}), tokenizer)


def ids(chance: random.Random, length: int) -> list[int]:
    return [chance.randrange(300) for _ in range(length)]


def tokens(stream: Stream) -> list[Token]:
    return [token for piece in stream for token in piece.tokens]


def text(stream: Stream) -> str:
    return "".join(piece.text for piece in stream)


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"ffn": "dense", "ffn_hidden_size": 33}, QWEN, FINE])
def test_no_batch_chunking_prefix_or_preemption_changes_a_bit_of_a_sequences_logits(
    tiny: Tiny, changes: dict[str, Any], dtype: torch.dtype, kernels: str
) -> None:
    before = native.in_use()
    native.use("torch" if kernels == "torch" else native.available()[-1])
    try:
        model = tiny(max_seq_len=256, **changes)
        model.compute_dtype = dtype
        chance = random.Random(0)
        probe = Request(
            prompt=ids(chance, 70), max_tokens=30, sampling=Sampling(temperature=1.0, seed=1), logprobs=5, priority=1
        )
        alone, preemptions = tokens(engine(model).submit(probe)), 0
        for _ in range(25 if kernels == "native" else 6):  # of the four models, 100 batches a dtype
            crowd = [Request(prompt=ids(chance, chance.choice((1, 3, 17, 100))), max_tokens=20) for _ in range(4)]
            crowd += [replace(probe, prompt=probe.prompt[:40]), replace(probe, max_tokens=3, priority=0)]
            chance.shuffle(crowd)
            busy = engine(
                model,
                token_budget=chance.choice((8, 13, 64, 512)),
                max_running=chance.choice((3, 8)),
                cache_tokens=chance.choice((128, 208, 1024)),
            )
            for request in crowd[:4]:
                busy.submit(request)
            stream = busy.submit(probe)
            for _ in range(chance.choice((0, 6, 25))):
                busy.step()
            for request in crowd[4:]:
                busy.submit(request)
            assert tokens(stream) == alone
            preemptions += stream.choices[0].job.num_preemptions
        assert preemptions > 0
    finally:
        native.use(before)


@torch.no_grad()
def test_any_chunks_of_a_sequence_give_the_same_bits_and_those_are_the_models_logits(tiny: Tiny) -> None:
    for changes in ({}, FINE, {"kv_n_heads": 1}, {"kv_n_heads": 4}):
        model = tiny(max_seq_len=256, **changes)
        sequence = ids(random.Random(1), 150)
        hidden, _ = model(torch.tensor([sequence]), torch.arange(150)[None], causal)
        wanted, given = model.logits(hidden)[0], []
        for chunks in ([150], [1] * 150, [5, 1, 60, 10, 74]):
            runner = engine(model).runner
            job, start, logits = Job(prompt=sequence, max_tokens=1), 0, []
            job.blocks = random.Random(2).sample(range(128), 10)
            for size in chunks:
                hidden_TD = runner.run([Part(job, start, start + size, samples=False)])
                logits += [logits_V.clone() for logits_V in runner.logits(hidden_TD, range(size))]
                start += size
            given.append(torch.stack(logits))
        any_rows = Engine(model, EngineConfig(cache_tokens=2048), layers=TorchLayers(model, torch.mm)).runner
        job.blocks = list(range(10))
        plain = torch.stack(list(any_rows.logits(any_rows.run([Part(job, 0, 150, samples=False)]), range(150))))
        torch.testing.assert_close(plain, wanted, atol=1e-4, rtol=1e-5)
        assert torch.equal(given[0], given[1])
        assert torch.equal(given[0], given[2])
        torch.testing.assert_close(given[0], wanted, atol=1e-4, rtol=1e-5)


def test_numbers_that_are_none_in_anothers_old_blocks_do_not_come_through(tiny: Tiny) -> None:
    spoiled = engine(tiny())
    request = Request(prompt=[1, 2, 3], max_tokens=20, sampling=Sampling(temperature=0.0), logprobs=1)
    for cache in vars(spoiled.runner.paged).values():
        if isinstance(cache, torch.Tensor):
            cache.fill_(float("nan"))
    assert tokens(spoiled.submit(request)) == tokens(engine(tiny()).submit(request))


def test_answers_of_one_request_differ_and_each_has_its_text_in_any_company(tiny: Tiny) -> None:
    model = tiny()
    request = Request(prompt=[5, 6, 7], max_tokens=12, n=4, sampling=Sampling(seed=9))

    def answers(busy: Engine) -> list[list[int]]:
        made: list[list[int]] = [[] for _ in range(4)]
        for piece in busy.submit(request):
            made[piece.choice] += [token.id for token in piece.tokens]
        return made

    wanted = answers(engine(model))
    assert len({tuple(answer) for answer in wanted}) == 4
    crowded = engine(model, max_running=3)
    for seed in range(5):
        crowded.submit(Request(prompt=[seed, 8], max_tokens=20, sampling=Sampling(seed=seed)))
    assert answers(crowded) == wanted
    assert answers(engine(model)) != answers(engine(tiny(initializer_range=0.3)))


def test_a_stop_string_over_tokens_ends_the_answer_before_it_and_no_part_of_it_is_seen(tiny: Tiny) -> None:
    model, letters = tiny(), Letters()
    request = Request(prompt=[5, 6, 7], max_tokens=40, sampling=Sampling(temperature=0.0))
    whole = text(engine(model, letters).submit(request))
    for start, length in ((4, 1), (7, 3), (11, 5), (20, 2)):
        stop = whole[start : start + length]
        pieces = list(engine(model, letters).submit(replace(request, stop=("no such text", stop), logprobs=0)))
        told = "".join(piece.text for piece in pieces)
        assert told == whole[: whole.find(stop)]
        assert pieces[-1].finish == "stop"
        made = [token for piece in pieces for token in piece.tokens]  # also those of the stop string
        assert letters.decode([token.id for token in made]).startswith(told + stop)
        assert not letters.decode([token.id for token in made[:-1]]).startswith(told + stop)
        assert all(token.logprob is not None for token in made)
    late = list(engine(model, letters).submit(replace(request, stop=(whole + "!", whole[-1] + "!"))))
    assert "".join(piece.text for piece in late) == whole  # what was held back comes at the end
    assert late[-1].finish == "length"


def test_a_stop_id_has_its_log_probability_and_is_not_part_of_the_text(tiny: Tiny) -> None:
    request = Request(prompt=[5, 6, 7], max_tokens=40, sampling=Sampling(temperature=0.0))
    free = [token.id for token in tokens(engine(tiny()).submit(request))]
    stopping = replace(request, stop_ids=frozenset({free[6]}), logprobs=0)
    *_, last = pieces = list(engine(tiny(), Letters()).submit(stopping))
    made, end = [token for piece in pieces for token in piece.tokens], free.index(free[6])
    assert [token.id for token in made] == free[: end + 1]
    assert "".join(piece.text for piece in pieces) == Letters().decode(free[:end])
    assert last.finish == "stop"
    whole = tokens(engine(tiny()).submit(replace(request, logprobs=0)))
    assert made == whole[: end + 1]


def test_control_tokens_are_in_texts_only_where_they_are_asked_for(tiny: Tiny) -> None:
    request = Request(
        prompt=[3, 299, 4], max_tokens=12, sampling=Sampling(seed=1, logit_bias={299: 6.0, 7: 6.0}), echo=True
    )
    made = [token.id for token in tokens(engine(tiny(), Letters()).submit(request))]
    assert made[3:].count(299) > 1
    assert text(engine(tiny(), Letters()).submit(request)) == Letters().decode([id for id in made if id != 299])
    assert text(engine(tiny(), Letters()).submit(replace(request, skip_control=False))) == Letters().decode(made)


@torch.no_grad()
@pytest.mark.parametrize("budget", [7, 512])
def test_log_probabilities_of_prompt_and_answer_are_the_models(tiny: Tiny, budget: int) -> None:
    model, prompt = tiny(), ids(random.Random(3), 30)
    asking = engine(model, Letters(), token_budget=budget, max_running=4)
    request = Request(prompt=prompt, max_tokens=6, logprobs=3, echo=True, sampling=Sampling(temperature=0.5, top_k=5))
    for _ in range(2):  # the second time the prompt is known
        told = tokens(asking.submit(request))
        assert [token.id for token in told[:30]] == prompt
        sequence = [token.id for token in told]
        hidden, _ = model(torch.tensor([sequence]), torch.arange(36)[None], causal)
        wanted = model.logits(hidden)[0].log_softmax(-1)
        assert told[0] == Token(prompt[0])
        for position, token in enumerate(told[1:]):
            assert token.logprob == pytest.approx(float(wanted[position, token.id]), abs=1e-4)
            values, best = wanted[position].topk(3)
            assert [id for id, _ in token.top] == best.tolist()
            assert [logprob for _, logprob in token.top] == pytest.approx(values.tolist(), abs=1e-4)
    scored = tokens(asking.submit(replace(request, max_tokens=0)))  # how a text is scored over an API
    assert scored == told[:30]


def test_an_echo_is_the_prompts_text_before_each_answer(tiny: Tiny) -> None:
    request = Request(prompt=[299, 1, 2, 3], max_tokens=4, n=2, sampling=Sampling(seed=2))
    plain, echoed = (
        ["".join(p.text for p in list(stream) if p.choice == n) for n in range(2) for stream in [ask()]]
        for ask in (
            lambda: engine(tiny(), Letters()).submit(request),
            lambda: engine(tiny(), Letters()).submit(replace(request, echo=True)),
        )
    )
    assert echoed == ["bcd" + answer for answer in plain]  # <|endoftext|> is not part of the text


def test_penalties_and_bias_change_what_is_said(tiny: Tiny) -> None:
    def said(**settings: Any) -> list[int]:
        sampling = Sampling(temperature=0.0, **settings)
        return [t.id for t in tokens(engine(tiny()).submit(Request(prompt=[1, 2], max_tokens=30, sampling=sampling)))]

    assert len(set(said(presence_penalty=100.0))) == 30
    assert len(set(said(frequency_penalty=100.0))) == 30
    assert said(logit_bias={77: 1000.0}) == [77] * 30
    assert said() == said(presence_penalty=0.0, logit_bias={})


def test_a_cancelled_request_says_so_and_gives_its_blocks_back(tiny: Tiny) -> None:
    busy = engine(tiny(), max_running=2)
    streams = [busy.submit(Request(prompt=[n, 2, 3], max_tokens=50)) for n in range(4)]
    for _ in range(5):
        busy.step()
    for stream in (streams[0], streams[3]):  # one runs, one waits
        busy.cancel(stream)
        busy.cancel(stream)
        assert [piece.finish for piece in stream][-1] == "cancelled"
    assert len(tokens(streams[1])) == len(tokens(streams[2])) == 50
    assert busy.scheduler.is_idle
    assert busy.scheduler.blocks.available == busy.cfg.num_blocks
    assert not busy.step()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": []}, "no token"),
        ({"prompt": [1] * 64}, "the context is 64 tokens; the prompt has 64: shorten the prompt"),
        ({"prompt": [300]}, "an id outside of 0 to 299"),
        ({"prompt": [1] * 60, "max_tokens": 5}, "context is 64 tokens; the prompt has 60 and 5 new ones"),
        ({"max_tokens": -1}, "max_tokens=-1 must not be negative"),
        ({"n": 0}, "n=0 must be from 1 to 128"),
        ({"stop": ("",)}, "must be a tuple of texts that are not empty"),
        ({"stop": "a"}, "must be a tuple of texts"),
        ({"stop": ("a",)}, "stop strings need a tokenizer"),
        ({"logprobs": 21}, "logprobs=21 must be from 0 to 20"),
        ({"priority": -1}, "priority=-1 must be from 0"),
        ({"sampling": {"logit_bias": {300: 1.0}}}, "logit_bias has an id above the model's last, 299"),
    ],
)
def test_what_cannot_be_done_is_an_input_error(tiny: Tiny, changes: dict[str, Any], says: str) -> None:
    if "sampling" in changes:
        changes = {"sampling": Sampling(**changes["sampling"])}
    with pytest.raises(InputError, match=says):
        engine(tiny()).submit(Request(**{"prompt": [1], **changes}))


def test_a_full_queue_refuses_and_without_a_number_the_room_is_used(tiny: Tiny) -> None:
    busy = engine(tiny(), max_waiting=2, max_running=1)
    streams = [busy.submit(Request(prompt=[1, 2])) for _ in range(2)]
    with pytest.raises(QueueFull):
        busy.submit(Request(prompt=[3]))
    assert [len(tokens(stream)) for stream in streams] == [62, 62]
