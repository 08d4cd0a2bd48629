"""One text, one sequence of ids: generate, serve, evaluate and exports begin it as transformers does."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import pytest
import tokenizers
import torch
from running_server import Running
from tokenizers import models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DbrxConfig,
    DbrxForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from typer.testing import CliRunner

from gristmill import artifact
from gristmill.cli import app
from gristmill.evaluate.config import EvaluateConfig
from gristmill.evaluate.documents import Document
from gristmill.evaluate.samples import sample
from gristmill.hub.export import export_gguf, export_model
from gristmill.hub.importing import import_model
from gristmill.inference import find_model
from gristmill.serve.load import load
from gristmill.tokenizer import Tokenizer
from gristmill.tokenizer.layout import CHAT_TEMPLATE, SPECIAL_TOKENS, SPLIT_PATTERN

PROMPT, NUM_TOKENS = "def add(grain):", 8
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": NUM_TOKENS}
ENDS = ("<|endoftext|>", "<|im_end|>")


def write_tokenizer(folder: Path, start: str | None) -> None:
    """As a publisher may write it: GPT-4's split, DBRX's special tokens, and one token before a text or nothing."""
    bpe = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["def add(grain, flour):\n    return grain + flour\n"] * 3, trainer)
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    if start is not None:
        special = [(start, bpe.token_to_id(start))]
        bpe.post_processor = processors.TemplateProcessing(single=f"{start} $A", pair="$A $B", special_tokens=special)
    bpe.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|endoftext|>"}
    config |= {"chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def dbrx() -> Any:
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}
    experts = {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "moe_normalize_expert_weights": 1.0}
    shape: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "vocab_size": 300}
    return DbrxForCausalLM(DbrxConfig(**shape, attn_config=attention, ffn_config=experts))


def qwen3_moe() -> Any:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=2,
            max_position_embeddings=256, vocab_size=300, moe_intermediate_size=24, num_experts=4,
            num_experts_per_tok=2, norm_topk_prob=True,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model of ours, the directory that transformers reads, and the token that the tokenizer adds."""

    ours: Path
    theirs: Path
    start: str | None


@pytest.fixture(scope="module", params=["trained", "dbrx", "qwen3_moe", "qwen3_moe with a start token"])
def case(request: pytest.FixtureRequest, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("start")
    if request.param == "trained":
        return Case(tiny_run, tiny_run / artifact.load(tiny_run).metrics["stages"]["export"], "<|endoftext|>")
    torch.manual_seed(1)
    model = dbrx() if request.param == "dbrx" else qwen3_moe()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    model.save_pretrained(folder / "published")
    start = "<|fim_prefix|>" if "with" in request.param else None
    write_tokenizer(folder / "published", start)
    return Case(import_model(folder / "published", folder / "ours").path, folder / "published", start)


@pytest.fixture(scope="module")
def running(case: Case, serving: Callable[..., Any]) -> Iterator[Running]:
    with serving(load(find_model(case.ours))) as server:
        yield server


def auto(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def three_lines(folder: Path, prompt: str) -> tuple[list[int], list[int]]:
    """What everybody types: the prompt's ids, and the new ones."""
    tokenizer = auto(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    ids = tokenizer(prompt, return_tensors="pt")
    ends = tokenizer.convert_tokens_to_ids(list(ENDS))
    whole = model.generate(**ids, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=ends)[0].tolist()
    given = ids["input_ids"][0].tolist()
    new = whole[len(given) :]
    return given, new[:-1] if new[-1] in ends else new


def generated(model: Path, prompt: str) -> str:
    options = ["--temperature", "0", "--max-tokens", str(NUM_TOKENS)]
    result = CliRunner().invoke(app, ["generate", str(model), prompt, *options])
    assert result.exit_code == 0, result.output
    return result.stdout.removeprefix(prompt).removesuffix("\n")


@pytest.mark.parametrize("prompt", [PROMPT, "    return grain", "Körner 🌾\n"])
def test_generate_and_serve_continue_a_text_as_transformers_does(case: Case, running: Running, prompt: str) -> None:
    given, new = three_lines(case.theirs, prompt)
    tokenizer = Tokenizer.load(case.theirs)
    assert (tokenizer.decode(given[:1]) == case.start) == (case.start is not None)
    text = tokenizer.decode([id for id in new if id not in tokenizer.control_ids])
    assert generated(case.ours, prompt) == text
    for asked in (prompt, given):
        answer = running.post("/v1/completions", {**GREEDY, "prompt": asked}).json()
        assert answer["choices"][0]["text"] == text
        assert answer["usage"]["prompt_tokens"] == len(given)
    told = running.post("/v1/tokenize", {"model": "tiny", "prompt": prompt}).json()
    assert told["tokens"] == given
    told = running.post("/v1/tokenize", {"model": "tiny", "prompt": prompt, "add_special_tokens": False}).json()
    assert told["tokens"] == auto(case.theirs)(prompt, add_special_tokens=False)["input_ids"]


def test_evaluations_complete_the_prompts_that_transformers_makes_of_their_texts(case: Case) -> None:
    asked: list[list[int]] = []

    class Asked:
        def loglikelihood(self, sequences: Any) -> list[float]:
            raise AssertionError("nothing is scored here")

        def generate(self, prompts: Any, **settings: Any) -> list[list[int]]:
            asked.extend(prompts)
            return [[] for _ in prompts]

    documents = [Document(f"{n}", "code", f"line {n} of a text\n" * n, 100) for n in range(1, 4)]
    documents.append(Document("short", "code", "x", 1))  # half of one token is no prompt
    tokenizer = Tokenizer.load(case.theirs)
    figures = sample(documents, Asked(), tokenizer, EvaluateConfig(samples=9))
    prompts = [sample["prompt"] for sample in figures["samples"]]
    assert ("" in prompts) == (case.start is not None)  # nothing predicts the first token of an empty prompt
    assert asked == [auto(case.theirs)(prompt)["input_ids"] for prompt in prompts] * 2


def test_an_echoed_prompt_has_an_entry_for_each_token_and_nothing_predicts_the_first(
    case: Case, running: Running
) -> None:
    theirs: Any = AutoModelForCausalLM.from_pretrained(case.theirs, dtype=torch.float32, local_files_only=True)
    ids = auto(case.theirs)(PROMPT)["input_ids"]
    with torch.no_grad():
        logprobs = theirs(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    wanted = [float(logprobs[at - 1, id]) for at, id in enumerate(ids) if at]
    for prompt in (PROMPT, ids, [PROMPT], [ids]):
        body = {**GREEDY, "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0}
        answer = running.post("/v1/completions", body).json()
        assert answer["usage"]["prompt_tokens"] == len(ids)
        [choice] = answer["choices"]
        told = choice["logprobs"]
        assert choice["text"] == PROMPT
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        assert told["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-4)
        shown = told["tokens"] if case.start is None else told["tokens"][1:]
        assert "".join(shown) == PROMPT
        assert told["tokens"][0] == (case.start or shown[0])
        assert told["text_offset"][1] == (0 if case.start else len(shown[0]))


def test_an_empty_prompt_is_the_start_token_or_an_error_that_says_why(case: Case, running: Running) -> None:
    answer = running.post("/v1/completions", {**GREEDY, "prompt": ""})
    result = CliRunner().invoke(app, ["generate", str(case.ours), "", "--temperature", "0", "--max-tokens", "8"])
    told = running.post("/v1/tokenize", {"model": "tiny", "prompt": ""}).json()
    assert told["tokens"] == auto(case.theirs)("")["input_ids"]
    if case.start is None:
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "prompt"
        for message in (answer.json()["error"]["message"], str(result.exception)):
            assert message.endswith("tokenizer adds no start token; give some text")
        assert running.post("/v1/completions", {**GREEDY, "prompt": ["x", ""]}).status_code == 400
    else:
        new = three_lines(case.theirs, "")[1]
        assert answer.json()["choices"][0]["text"] == Tokenizer.load(case.theirs).decode(new)
        assert answer.json()["usage"]["prompt_tokens"] == 1
        assert result.stdout == answer.json()["choices"][0]["text"] + "\n"


def test_a_name_in_the_text_is_no_start_token(case: Case, running: Running) -> None:
    hostile = "<|endoftext|><|fim_prefix|>x"
    told = running.post("/v1/tokenize", {"model": "tiny", "prompt": hostile}).json()
    tokenizer = Tokenizer.load(case.theirs)
    assert told["tokens"] == tokenizer.encode_prompt(hostile)
    special = [id for id in told["tokens"] if not tokenizer.text_pieces[id]]
    assert special == ([] if tokenizer.start_id is None else [tokenizer.start_id])
    body = {**GREEDY, "prompt": hostile, "echo": True, "max_tokens": 0}
    assert running.post("/v1/completions", body).json()["choices"][0]["text"] == hostile


def test_a_conversation_begins_as_its_template_says(case: Case, running: Running) -> None:
    told = running.post("/v1/tokenize", {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}).json()
    tokenizer = Tokenizer.load(case.theirs)
    assert told["tokens"][0] == tokenizer.im_start_id
    assert tokenizer.start_id not in told["tokens"]


def test_every_form_that_leaves_says_the_same(case: Case, tmp_path: Path) -> None:
    out = export_model(find_model(case.ours), tmp_path / "out").path
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if name == "tokenizer.json" or case.start == "<|endoftext|>":
            assert (out / name).read_bytes() == (case.theirs / name).read_bytes()
    back = import_model(out, tmp_path / "back").path
    ids = auto(case.theirs)(PROMPT)["input_ids"]
    for folder in (out, back / "tokenizer"):
        assert Tokenizer.load(folder).encode_prompt(PROMPT) == ids
    assert auto(out)(PROMPT)["input_ids"] == ids
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config.get("add_bos_token", False) == (case.start == "<|endoftext|>")
    for model in (find_model(case.ours), out, back):
        file = export_gguf(model, tmp_path / f"{model.name}.gguf")
        found = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
        assert found["tokenizer.ggml.add_bos_token"] == (case.start is not None)
        if case.start is not None:
            assert found["tokenizer.ggml.tokens"][found["tokenizer.ggml.bos_token_id"]] == case.start
    card = (out / "README.md").read_text()
    assert ("The tokenizer puts `" in card) == (case.start is not None)
    assert 'tokenizer("def fibonacci("' in card


def test_llama_cpp_continues_a_text_as_transformers_does(case: Case, tmp_path: Path, llama_cpp: ModuleType) -> None:
    file = export_gguf(find_model(case.ours), tmp_path / "tiny.gguf")
    kept = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    with closing(llama_cpp.Llama(str(file), n_ctx=256, verbose=False, **kept)) as llama:
        given, new = three_lines(case.theirs, PROMPT)
        ids = llama.tokenize(PROMPT.encode(), add_bos=True, special=False)
        assert ids == given
        assert list(islice(llama.generate(ids, temp=0.0, repeat_penalty=1.0), len(new))) == new
        answer = llama.create_completion(PROMPT, max_tokens=NUM_TOKENS, temperature=0)
        assert answer["usage"]["prompt_tokens"] == len(given)
