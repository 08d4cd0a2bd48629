import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from gristmill import artifact
from gristmill.artifact import Artifact, Built
from gristmill.errors import Failure, InputError
from gristmill.hub import in_memory, write_published, write_weights
from gristmill.hub.settings import SpecialIds
from gristmill.inference import (
    Engine,
    EngineConfig,
    Request,
    Sampling,
    generate,
    load_for_answer,
    load_model,
    parse_bytes,
    stream,
)
from gristmill.model import Transformer
from gristmill.tokenizer import Tokenizer

Tiny = Callable[..., Transformer]


def copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def commit(path: Path, kind: str, **inputs: Artifact) -> Artifact:
    return artifact.commit(path, kind=kind, key=kind, config={}, inputs=inputs, built=Built())


def save_step(folder: Path, model: Transformer, tokenizer_dir: Path) -> Artifact:
    artifact.prepare(folder)
    write_weights(folder, in_memory(model.state_dict()))
    (folder / "model.json").write_bytes(artifact.canonical(asdict(model.cfg)))
    copy_tokenizer(tokenizer_dir, folder / "tokenizer")
    return commit(folder, "checkpoint")


def assert_same(model: Transformer, other: Transformer) -> None:
    assert model.cfg == other.cfg
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_run_folder_stage_checkpoint_and_hugging_face_directory_load_the_same_model(
    tiny: Tiny, tokenizer_dir: Path, tmp_path: Path
) -> None:
    early, late = tiny(initializer_range=0.1), tiny()
    run = tmp_path / "run"
    stage = run / "train" / "0123abcd"
    save_step(stage / "step-00000010", early, tokenizer_dir)
    last = save_step(stage / "step-00000200", late, tokenizer_dir)
    artifact.prepare(stage / "step-00000300")  # interrupted: no manifest
    published = tmp_path / "published"
    published.mkdir()
    copy_tokenizer(tokenizer_dir, published)
    write_published(
        published, late.cfg, in_memory(late.state_dict()), SpecialIds(eot_id=262, pad_id=267, im_end_id=269)
    )
    for path in (run, stage, last.path, published):
        model, tokenizer = load_model(path)
        assert_same(model, late)
        assert tokenizer.encode("river") == Tokenizer.load(tokenizer_dir).encode("river")
        assert not model.training


def test_a_finished_run_loads_the_checkpoint_that_it_names(tiny: Tiny, tokenizer_dir: Path, tmp_path: Path) -> None:
    mine, other = tiny(), tiny(initializer_range=0.1)
    run = tmp_path / "run"
    named = save_step(run / "train" / "0123abcd" / "step-00000010", mine, tokenizer_dir)
    save_step(run / "train" / "ffff0000" / "step-00000900", other, tokenizer_dir)  # of settings tried since
    commit(run, "run", train=named)
    assert_same(load_model(run)[0], mine)


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Without control tokens, which are no text."""
    return tokenizer.decode([id for id in ids if id not in tokenizer.control_tokens.values()])


def test_a_text_streams_in_whole_characters_that_join_to_the_decoded_ids(
    tiny: Tiny, tokenizer_dir: Path, tmp_path: Path
) -> None:
    save_step(tmp_path / "step-00000001", tiny(), tokenizer_dir)
    model, tokenizer = load_model(tmp_path / "step-00000001")
    for seed in range(3):
        sampling = Sampling(temperature=1.5, seed=seed)
        ids = [tokenizer.eot_id, *tokenizer.encode("é <|endoftext|>")]
        stops = frozenset({tokenizer.eot_id, tokenizer.im_end_id})
        made = list(generate(model, ids, sampling, 40, stops))
        told = "".join(stream(Engine(model, tokenizer=tokenizer), "é <|endoftext|>", sampling, 40))
        assert told == text_of(tokenizer, made)


def test_a_conversation_is_answered_after_its_chat_ids_and_stops_at_the_published_ids(
    tiny: Tiny, tokenizer_dir: Path, tmp_path: Path
) -> None:
    save_step(tmp_path / "step-00000001", tiny(), tokenizer_dir)
    model, tokenizer = load_model(tmp_path / "step-00000001")
    messages = [{"role": "system", "content": "Mill."}, {"role": "user", "content": "<|im_end|> é"}]
    prompt = tokenizer.chat(messages, generation_prompt=True)
    ends = frozenset({tokenizer.eot_id, tokenizer.im_end_id})
    for sampling in (Sampling(temperature=0.0), Sampling(temperature=1.5, seed=1)):
        made = list(generate(model, prompt, sampling, 20, ends))
        told = "".join(stream(Engine(model, tokenizer=tokenizer), messages, sampling, 20))
        assert told == text_of(tokenizer, made)
        stop = made[4]
        told = "".join(stream(Engine(model, tokenizer=tokenizer), messages, sampling, 20, frozenset({stop})))
        assert told == text_of(tokenizer, made[: made.index(stop)])


@pytest.mark.parametrize("max_tokens", [1, 20, 10**9, 10**30])
@pytest.mark.parametrize("prompt", ["", "The mill", [{"role": "user", "content": "river"}]])
def test_the_cache_for_an_answer_has_room_for_it_and_at_most_for_the_context(
    tiny: Tiny, tokenizer_dir: Path, tmp_path: Path, prompt: str | list[dict[str, str]], max_tokens: int
) -> None:
    context = tiny().cfg.max_seq_len
    path = save_step(tmp_path / "step-00000001", tiny(), tokenizer_dir).path
    engine = load_for_answer(path, prompt, max_tokens)
    assert engine.cfg.cache_tokens <= context
    greedy = Sampling(temperature=0.0)
    whole = "".join(stream(Engine(tiny(), tokenizer=engine.tokenizer), prompt, greedy, max_tokens))
    assert "".join(stream(engine, prompt, greedy, max_tokens)) == whole


@pytest.mark.parametrize("context", [64, 2**50])
def test_only_as_many_tokens_as_the_cache_has_room_for_cost_memory(tiny: Tiny, context: int) -> None:
    engine = Engine(tiny(max_seq_len=context), EngineConfig(cache_tokens=64))
    request = Request(prompt=[1, 2, 3], max_tokens=8, sampling=Sampling(temperature=0.0))
    assert sum(len(piece.tokens) for piece in engine.submit(request)) == 8


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports how much memory is available")
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.float64])  # native kernels, torch's attention
def test_a_cache_that_exceeds_the_memory_is_a_failure_before_any_of_it_is_taken(
    tiny: Tiny, compute_dtype: torch.dtype
) -> None:
    model = Transformer(tiny().cfg, compute_dtype)
    with pytest.raises(Failure, match=r"key/value cache needs .* GiB, and .* GiB of memory are available"):
        Engine(model, EngineConfig(cache_tokens=2**50))


def test_a_prompt_that_is_refused_is_refused_before_the_first_piece(
    tiny: Tiny, tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = save_step(tmp_path / "step-00000001", tiny(), tokenizer_dir).path
    prompt = "river " * 100
    with pytest.raises(InputError, match="context is 64 tokens"):
        stream(load_for_answer(path, prompt, 5), prompt, Sampling(), 5)


def test_a_place_without_a_model_is_an_input_error_that_says_what_may_stand_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="holds no model; give a run folder"):
            load_model(path)


def test_a_tokenizer_larger_than_the_model_is_refused(tiny: Tiny, tokenizer_dir: Path, tmp_path: Path) -> None:
    save_step(tmp_path / "step-00000001", tiny(vocab_size=200), tokenizer_dir)
    with pytest.raises(InputError, match="the tokenizer has 270 ids, the model 200"):
        load_model(tmp_path / "step-00000001")


@pytest.mark.parametrize("text", ["16", "-1GiB", "nanGB", "1e3GB", "9" * 400 + "TB", "\udcff", ""])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no amount of memory; write it like 16GiB"):
        parse_bytes(text)
    assert parse_bytes("1.5TiB") == 3 * 2**39


def test_a_damaged_description_is_named(tiny: Tiny, tokenizer_dir: Path, tmp_path: Path) -> None:
    path = save_step(tmp_path / "step-00000001", tiny(), tokenizer_dir).path
    (path / "model.json").write_text('{"d_model": 7, "width": 3}')
    with pytest.raises(Failure, match=r"model.json does not describe a model"):
        load_model(path)
