"""The page in Chromium, over a real server: what it shows is what the API says, and what a model writes stays text."""

import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from running_server import HTTP, Direct, Running

from gristmill.inference import Engine, EngineConfig, Sampling
from gristmill.inference.settings import Published
from gristmill.kernels.attention import packed_attention_reference
from gristmill.model import ModelConfig, Transformer, init_weights
from gristmill.serve import keys, page
from gristmill.serve.database import Database
from gristmill.serve.gate import Gate
from gristmill.serve.limits import Limits
from gristmill.serve.load import Served
from gristmill.tokenizer import Tokenizer

PROMPT = "The miller's"
SETTINGS = {"model": "tiny", "max_tokens": 12, "temperature": 0.8, "seed": 7}
PHONE = {"width": 390, "height": 844}
Opening = Callable[..., Any]


def not_run(why: str) -> None:
    """Skips, or fails where the environment says that a browser must be there."""
    if "chromium" in os.environ.get("GRISTMILL_REQUIRE", "").split(","):
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        not_run("there is no Chromium: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError as missing:
        not_run(f"{missing.name} is not installed")
    with sync_playwright() as playwright:
        yield (it := playwright.chromium.launch(executable_path=found, args=["--no-sandbox"]))
        it.close()


@pytest.fixture
def opening(browser: Any) -> Iterator[Opening]:
    """Opens a server's page. At the end: nothing was asked of another host, and the console has no complaint but of
    answers that the test provokes."""
    opened: list[tuple[Any, Running, list[str], list[str]]] = []

    def make(running: Running, *, is_ready: bool = True, **settings: Any) -> Any:
        context = browser.new_context(**settings)
        context.set_default_timeout(20_000)
        it, asked, complaints = context.new_page(), [], []
        it.on("request", lambda request: asked.append(request.url))
        it.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        it.on("pageerror", lambda error: complaints.append(str(error)))
        opened.append((context, running, asked, complaints))
        it.goto(running.url)
        if is_ready:
            it.locator("#shape", has_text="context").wait_for()
        return it

    yield make
    for context, running, asked, complaints in opened:
        context.close()
        assert len(asked) >= len(page.FILES)
        assert all(url.startswith(running.url + "/") for url in asked)
        assert not [said for said in complaints if not re.search(r"status of (401|429|503)|net::ERR_CONNECTION", said)]


def set_fields(it: Any, **fields: Any) -> None:
    it.click("#tab-settings")
    for name, value in fields.items():
        it.fill(f"#{name}", str(value))
    it.click("#tab-token")


def begin(it: Any, text: str) -> None:
    it.fill("#prompt", text)
    it.press("#prompt", "Enter")


def send(it: Any, text: str) -> Any:
    """The turn, when its answer is there."""
    turn = it.locator(".turn").nth(it.locator(".turn").count())
    begin(it, text)
    turn.locator("button", has_text="Copy").wait_for()
    return turn


def alternatives(it: Any) -> list[tuple[str, float]]:
    listed = "all => all.map(i => [i.querySelector('code').textContent, Number(i.querySelector('data').value)])"
    return [tuple(one) for one in it.locator("#alternatives li").evaluate_all(listed)]


def numbers(it: Any, id: str) -> list[list[str]]:
    """The cells of one of the tables of experts."""
    if it.locator(f"#{id}").get_attribute("open") is None:
        it.click(f"#{id} summary")
    it.locator(f"#{id} td").first.wait_for()
    rows = "all => all.map(row => [...row.querySelectorAll('td')].map(cell => cell.textContent))"
    return it.locator(f"#{id} tbody tr").evaluate_all(rows)  # type: ignore[no-any-return]


@contextmanager
def holding(engine: Engine, steps: int) -> Iterator[None]:
    """The engine makes so many steps, and the others at the end."""
    step, left = engine.step, threading.Semaphore(steps)

    def held() -> bool:
        left.acquire()
        return step()

    engine.step = held  # type: ignore[method-assign]
    try:
        yield
    finally:
        left.release(100_000)


def visible(text: str) -> str:
    """Text as the page shows it: white space has symbols, and so has an empty token."""
    return text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍") or "∅"


def by_hand(model: Transformer, ids: Sequence[int]) -> list[list[list[int]]]:
    """Of each position, of each layer, the experts: those whose rows of the router's matrix give the most."""
    heard: list[torch.Tensor] = []
    hooks = [block.norm_2.register_forward_hook(lambda _, __, out: heard.append(out[0])) for block in model.blocks]
    starts, positions = torch.zeros(1, len(ids), dtype=torch.long), torch.arange(len(ids))[None]
    with torch.no_grad():
        model(torch.tensor([ids]), positions, lambda _, q, k, v: packed_attention_reference(q, k, v, starts))
    for hook in hooks:
        hook.remove()
    best = [
        (hidden_SD @ block.ffn.router.weight.T).sort(descending=True).indices[:, : model.cfg.moe_top_k].tolist()
        for block, hidden_SD in zip(model.blocks, heard, strict=True)
    ]
    return [[layer[position] for layer in best] for position in range(len(ids))]


def test_each_token_shows_the_apis_alternatives_and_the_models_experts(
    server: Running, opening: Opening, model: Transformer, direct: Direct
) -> None:
    it = opening(server)
    set_fields(it, max_tokens=12, temperature=0.8, seed=7)
    turn = send(it, PROMPT)
    told = server.post("/v1/completions", {**SETTINGS, "prompt": PROMPT, "logprobs": 8}).json()["choices"][0]
    assert turn.locator(".said").text_content() == PROMPT + told["text"]

    prompt = direct.text_ids(PROMPT)
    [(_, tokens, _)] = direct.ask(prompt, max_tokens=12, sampling=Sampling(temperature=0.8, seed=7))
    ids = [*prompt, *(token.id for token in tokens)]
    wanted_experts = by_hand(model, ids)
    counts = [[0] * model.cfg.moe_num_experts for _ in range(model.cfg.n_layers)]
    for number in range(len(tokens)):
        for layer, experts in enumerate(wanted_experts[len(prompt) - 1 + number]):
            for expert in experts:
                counts[layer][expert] += 1

    spans = it.locator(".t")
    assert spans.count() > 5
    for place in range(spans.count()):
        number = spans.nth(place).evaluate("span => span.tokens[0].index")
        spans.nth(place).hover()
        it.locator("#token-place", has_text=f"token {number + 1} of {len(tokens)}").wait_for()
        probabilities = {
            visible(text): math.exp(value) for text, value in told["logprobs"]["top_logprobs"][number].items()
        }
        assert dict(alternatives(it)) == pytest.approx(probabilities)
        assert it.locator("#alternatives .taken code").all_text_contents() == [
            visible(told["logprobs"]["tokens"][number])
        ]
        shown = [[int(cell.split(" · ")[0]) for cell in row] for row in numbers(it, "token-numbers")]
        assert shown == wanted_experts[len(prompt) - 1 + number]
    balanced = len(tokens) * model.cfg.moe_top_k / model.cfg.moe_num_experts
    assert numbers(it, "share-numbers") == [
        [f"{counts[layer][expert] / balanced:.2f}\u00d7" for layer in range(model.cfg.n_layers)]
        for expert in range(model.cfg.moe_num_experts)
    ]


def test_keys_do_all_that_the_pointer_does(server: Running, opening: Opening) -> None:
    it = opening(server)
    set_fields(it, max_tokens=12, temperature=0.8, seed=7)
    it.focus("#prompt")
    it.keyboard.type("a")
    it.keyboard.press("Shift+Enter")
    it.keyboard.type("b")
    assert it.locator("#prompt").input_value() == "a\nb"
    it.keyboard.press("Enter")
    it.locator(".turn footer button", has_text="Copy").wait_for()
    assert it.evaluate("document.activeElement.id") == "prompt"
    assert it.locator(".asked").text_content() == "a\nb"
    last = it.locator(".t").count() - 1
    it.locator("#thread").focus()
    it.keyboard.press("Tab")
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", last), ("Home", 0)):
        it.keyboard.press(key)
        assert it.evaluate("document.activeElement.place") == place
    span = it.locator(".t:focus")
    assert span.evaluate("span => getComputedStyle(span).outlineStyle") == "solid"
    it.locator("#token-place", has_text="token 1 of").wait_for()
    heard = it.locator(f"#{span.get_attribute('aria-describedby')}").text_content()
    assert all(text in heard for text, _ in alternatives(it))
    it.focus("#tab-token")
    it.keyboard.press("ArrowLeft")
    assert it.evaluate("document.activeElement.id") == "tab-server"
    assert it.locator("#panel-server").is_visible()
    assert not it.locator("#panel-token").is_visible()


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stopping_frees_the_server_and_keeps_what_came(serving: Any, opening: Opening, how: str) -> None:
    with serving() as running:
        it = opening(running)
        set_fields(it, max_tokens=2000, temperature=0)
        with holding(running.at.served.engine, steps=6):
            begin(it, PROMPT)
            it.locator(".t").nth(3).wait_for()
            if how == "button":
                it.click("#stop")
            else:
                it.keyboard.press("Escape")
            it.locator(".turn footer", has_text="stopped").wait_for()
            assert running.get("/v1/load").json()["running"] == 1  # in its step
        it.click("#tab-server")
        it.locator("#running", has_text=re.compile("^0$")).wait_for()
        assert running.at.metrics.finishes == {"stop": 0, "length": 0, "cancelled": 1}
        assert 4 <= it.locator(".t").count() <= 6
        assert it.locator("#send").is_visible()


def test_chat_tells_the_system_prompt_and_all_turns(server: Running, opening: Opening) -> None:
    it = opening(server)
    it.click("#modes label:has-text('Chat')")
    set_fields(it, max_tokens=8, temperature=0.8, seed=7, system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for text in ("Hello", "And then?"):
        turn = send(it, text)
        messages.append({"role": "user", "content": text})
        body = {**SETTINGS, "max_tokens": 8, "messages": messages}
        said = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
        assert turn.locator(".said").text_content() == said
        messages.append({"role": "assistant", "content": said})
    turn.locator(".t").first.hover()
    it.locator("#alternatives li").first.wait_for()
    assert it.locator("#token-grid path").count() > 1
    it.click("#new")
    assert it.locator(".turn").count() == 0
    send(it, "Hello")
    assert it.locator(".said").text_content() == messages[2]["content"]


def test_a_model_without_chat_or_experts_offers_neither(serving: Any, opening: Opening, tokenizer: Tokenizer) -> None:
    cfg = ModelConfig(d_model=32, n_layers=1, n_heads=4, kv_n_heads=2, ffn_hidden_size=24, ffn="dense",
                      vocab_size=tokenizer.vocab_size, max_seq_len=64)  # fmt: skip
    engine = Engine(init_weights(Transformer(cfg), seed=0).eval(), EngineConfig(cache_tokens=256), tokenizer)
    it = Served(engine=engine, tokenizer=tokenizer, published=Published(), no_chat="no")
    with serving(it) as running:
        it = opening(running)
        assert not it.locator("#modes").is_visible()
        set_fields(it, max_tokens=4, temperature=0)
        send(it, "a").locator(".t").first.hover()
        it.locator("#alternatives li").first.wait_for()
        assert it.locator("#dense").is_visible()
        assert not it.locator("#mixture").is_visible()


def test_a_key_is_asked_for_used_and_kept_in_the_tab_alone(serving: Any, opening: Opening, database: Database) -> None:
    key = keys.create(database, "alice", Limits(output_tokens_per_minute=10))
    with serving(gate=Gate(database)) as running:
        it = opening(running, is_ready=False)
        for given in ("gm-wrong", key):
            it.locator("#key").wait_for()
            it.fill("#key", given)
            it.press("#key", "Enter")
            if given != key:
                it.locator("#key-problem", has_text="not one of this server's").wait_for()
        it.locator("#shape", has_text="context").wait_for()
        set_fields(it, max_tokens=5, temperature=0)
        send(it, PROMPT)
        assert it.evaluate("Object.values(sessionStorage)") == [key]
        assert key not in it.evaluate("JSON.stringify(localStorage) + document.cookie + document.body.innerHTML")
        set_fields(it, max_tokens=9)
        begin(it, PROMPT)  # the budget is used up: the API's own words, and the text is not lost
        it.locator("#problem", has_text="output tokens").wait_for()
        assert it.locator("#prompt").input_value() == PROMPT
        assert it.locator(".turn").count() == 1
        it.click("#tab-server")
        it.click("#forget")
        it.locator("#key").wait_for()
        assert it.evaluate("sessionStorage.length") == 0


def test_the_figures_of_the_whole_server_are_for_operators(serving: Any, opening: Opening, database: Database) -> None:
    plain, operator = (keys.create(database, name, Limits(), is_operator=name == "b") for name in ("a", "b"))
    with serving(gate=Gate(database)) as running:
        for given in (plain, operator):
            it = opening(running, is_ready=False)
            it.locator("#key").wait_for()
            it.fill("#key", given)
            it.press("#key", "Enter")
            it.locator("#shape", has_text="context").wait_for()
            set_fields(it, max_tokens=5, temperature=0)
            send(it, PROMPT)
            it.click("#tab-server")
            it.locator("#own_made", has_text="5").wait_for()
            it.locator("#whole-server").wait_for(state="visible" if given == operator else "hidden")


def test_the_load_view_shows_the_servers_figures_and_this_pages_times(
    serving: Any, served: Any, opening: Opening
) -> None:
    with serving(served(max_running=6, token_budget=64)) as running:
        it = opening(running)
        set_fields(it, max_tokens=9, temperature=0)
        for _ in range(2):
            send(it, PROMPT * 9)
        it.click("#tab-server")
        told = running.get("/v1/load").json()
        assert told["cached_tokens"] > 0
        for name, value in (
            ("running", "0"), ("waiting", "0"), ("generation_tokens", str(told["generation_tokens"])),
            ("prompt_tokens", str(told["prompt_tokens"])),
            ("hits", f"{100 * told['cached_tokens'] / told['prompt_tokens']:.1f}%"),
        ):  # fmt: skip
            it.locator(f"#{name}", has_text=re.compile(f"^{re.escape(value)}$")).wait_for()
        assert it.locator("#own_made").text_content() == "18"
        assert it.locator("#own_prompt").text_content() == str(told["prompt_tokens"])
        assert it.locator("#own_cached").text_content() == str(told["cached_tokens"])
        for name in ("first", "each"):
            assert re.fullmatch(r"[\d.]+ m?s", it.locator(f"#{name}").text_content())
        with holding(running.at.served.engine, steps=3):  # of a request that stands in the middle of its work
            body = {"model": "tiny", "prompt": "a", "max_tokens": 20, "stream": True, "n": 8, "ignore_eos": True}
            with HTTP.stream("POST", f"{running.url}/v1/completions", json=body) as answer:
                next(parts := answer.iter_bytes())
                for name, value in (("running", "6"), ("waiting", "2"), ("pulse", "8 at work")):
                    it.locator(f"#{name}", has_text=value).wait_for()
                load = running.get("/v1/load").json()
                share = load["blocks_in_use"] / load["blocks"]
                assert it.locator("#cache").text_content() == f"{100 * share:.1f}%"
                parts.close()


MARKUP = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


def test_markup_stays_text_wherever_it_comes_from(serving: Any, opening: Opening) -> None:
    logprobs = {"tokens": [MARKUP], "token_logprobs": [-1.0], "top_logprobs": [{MARKUP: -1.0, "__proto__": -2.0}]}
    choice = {"index": 0, "text": MARKUP, "logprobs": {**logprobs, "text_offset": [0]}, "finish_reason": "length"}
    with serving(name=MARKUP) as running:
        it = opening(running)
        events = [{"choices": [choice]}, {"error": {"message": MARKUP}}]
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        it.route("**/v1/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
        turn = send(it, MARKUP)
        assert turn.locator(".said").text_content() == 2 * MARKUP
        assert it.locator("#problem").text_content() == it.locator("#model").text_content() == MARKUP
        turn.locator(".t").hover()
        it.locator("#alternatives code", has_text="__proto__").wait_for()
        assert it.locator("#alternatives .taken code").text_content() == visible(MARKUP)
        assert it.locator("img, body script").count() == 0
        assert MARKUP in it.title()


def test_characters_of_several_tokens_are_whole(server: Running, opening: Opening) -> None:
    said = [("bytes:\\xf0\\x9f", ""), ("bytes:\\x8c\\xbe", "🌾"), (" ok", " ok"), ("!", "! cut")]
    events = [
        {"index": 0, "text": text, "finish_reason": None,
         "logprobs": {"tokens": [token], "token_logprobs": [-0.5], "top_logprobs": [{token: -0.5}], "text_offset": [0]}}
        for token, text in said
    ]  # fmt: skip
    it = opening(server)
    body = "".join(f"data: {json.dumps({'choices': [event]})}\n\n" for event in events) + "data: [DONE]\n\n"
    it.route("**/v1/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    turn = send(it, "a")
    assert turn.locator(".t").all_text_contents() == ["🌾", " ok", "!"]
    assert turn.locator(".answer").text_content() == "🌾 ok! cut"  # of a token that a stop text cut
    turn.locator(".t").first.hover()
    it.locator("#token-place", has_text="token 1 of 4, the first of 2 that make it").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [{"width": 1280, "height": 800}, PHONE], ids=["wide", "phone"])
def test_axe_finds_nothing(
    server: Running, serving: Any, opening: Opening, database: Database, scheme: str, size: dict[str, int]
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    def check(it: Any) -> None:
        found = Axe().run(it).response["violations"]
        assert not [(one["id"], [node["html"] for node in one["nodes"]]) for one in found]

    it = opening(server, color_scheme=scheme, viewport=size, has_touch=size == PHONE)
    check(it)
    set_fields(it, max_tokens=40, temperature=1.5, seed=1)
    turn = send(it, PROMPT)
    turn.locator(".t").nth(4).click()
    assert turn.locator(".t.here").count() == 1
    for table in ("token-numbers", "share-numbers"):
        assert numbers(it, table)
    check(it)
    it.select_option("#tint", "1")
    assert it.locator(".t.hue").count() == it.locator(".t").count()
    it.click("#modes label:has-text('Chat')")
    send(it, "Hello")
    for name in ("settings", "server"):
        it.click(f"#tab-{name}")
        check(it)
    assert it.evaluate("document.documentElement.scrollWidth") <= size["width"]
    if size != PHONE:
        keys.create(database, "alice", Limits())
        with serving(gate=Gate(database)) as running:
            it = opening(running, is_ready=False, color_scheme=scheme)
            it.locator("#key").wait_for()
            check(it)


def test_on_a_phone_a_token_opens_the_insight_and_its_tab_closes_it(server: Running, opening: Opening) -> None:
    it = opening(server, viewport=PHONE, has_touch=True, is_mobile=True, reduced_motion="reduce")
    assert not it.locator("#panel-token").is_visible()
    it.evaluate("[['max_tokens', 12], ['temperature', 0]].forEach(([id, n]) => document.getElementById(id).value = n)")
    turn = send(it, PROMPT)
    turn.locator(".t").nth(2).tap()
    it.locator("#alternatives li").first.wait_for()
    box = it.locator("#panel-token").bounding_box()
    assert box["y"] + box["height"] <= PHONE["height"]
    assert it.locator("#prompt").bounding_box()["y"] < box["y"]
    it.tap("#tab-token")
    assert not it.locator("#panel-token").is_visible()
    assert it.evaluate("document.getAnimations().length") == 0


def test_the_page_needs_no_key_names_no_other_host_and_runs_nothing_else(serving: Any, database: Database) -> None:
    keys.create(database, "alice", Limits())
    with serving(gate=Gate(database)) as running:
        for path in page.FILES:
            answer = running.get(path)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|innerHTML| on\w+=| style=", answer.text)
            again = running.get(path, headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        assert running.get("/page/../page.py").status_code == 401
        assert sum(len(running.get(path).content) for path in page.FILES) < 100_000
