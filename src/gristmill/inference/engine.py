"""Many requests, one model: each step takes some tokens of many sequences through it, together.

A step is three calls: schedule (`scheduler.py`), run (`runner.py`, `sampler.py`) and postprocess, which returns the
tokens to the scheduler and to the streams. docs/life-of-a-request.md follows one request through all of it.

An engine belongs to one thread; other threads send their requests through a queue. Any number of engines, in a thread
each, may share one model.
"""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from gristmill.inference.answer import Answer
from gristmill.inference.errors import SettingError
from gristmill.inference.grammar import Constraint, Grammars
from gristmill.inference.requests import Chosen, Piece, Request, Token
from gristmill.inference.routing import Routes, append_to, chosen
from gristmill.inference.runner import Runner, torch_threads
from gristmill.inference.sampler import History, chance, pick
from gristmill.inference.scheduler import EngineConfig, Finish, Job, Part, Plan, Scheduler
from gristmill.inference.tree import Layers
from gristmill.model import Transformer
from gristmill.tokenizer import Tokenizer


class Choice:
    """One answer on its way: its job, and what is made of its tokens."""

    def __init__(
        self, stream: "Stream", number: int, job: Job, answer: Answer, constraint: Constraint | None, vocab_size: int
    ) -> None:
        self.stream, self.number, self.job, self.answer, self.constraint = stream, number, job, answer, constraint
        self.is_broken = False  # its grammar passed a limit
        request = stream.request
        self.history = History(job.prompt, vocab_size) if request.sampling.has_penalties else None
        self.scores_prompt = request.scores_prompt
        known = 0 if not request.echo else 1 if self.scores_prompt else len(job.prompt)
        self.echoed = [Token(id) for id in job.prompt[:known]]  # until it is given away

    def asked(self, part: Part) -> list[int]:
        """The positions in its sequence whose tokens the logits of this part are to predict."""
        scored = range(part.start + 1, min(part.end + 1, len(self.job.prompt))) if self.scores_prompt else ()
        return [*(p for p in scored if p >= len(self.echoed)), *([part.end] if part.samples else [])]


class Stream:
    """A request's answers. Iterating over it runs the engine until they are complete; `take` gives what is there."""

    def __init__(self, engine: "Engine", request: Request) -> None:
        self.request = request
        self.choices: list[Choice] = []
        self._engine = engine
        self._pieces: deque[Piece] = deque()

    @property
    def is_done(self) -> bool:
        """Whether no more pieces will come; there may be some to take."""
        return all(choice.job.finish is not None for choice in self.choices)

    def put(self, piece: Piece) -> None:
        self._pieces.append(piece)

    def take(self) -> list[Piece]:
        taken = list(self._pieces)
        self._pieces.clear()
        return taken

    def __iter__(self) -> Iterator[Piece]:
        while True:
            yield from self.take()
            if self.is_done:
                return
            self._engine.step()


class Engine:
    """Computes with the model's weights, kernels and number of threads as of its construction.

    The engine has its own modules and never changes the model. It has packed copies of the matrices (native kernels),
    copies of the other weights that require gradients, and shares those that don't. So training may continue while the
    engine answers; `refresh` takes the new weights. Construct and refresh an engine between two training steps.

    Args:
        tokenizer: without it there are ids and no texts.
        layers: what to compute with, of the same model; None chooses the best that this machine has.
    """

    def __init__(
        self,
        model: Transformer,
        cfg: EngineConfig | None = None,
        tokenizer: Tokenizer | None = None,
        layers: Layers | None = None,
    ) -> None:
        self.model, self.cfg, self.tokenizer = model, cfg or EngineConfig(), tokenizer
        self.runner = Runner(model, self.cfg.num_blocks, self.cfg.block_tokens, layers)  # first: it checks the memory
        self.runner.layers.freeze()
        self.scheduler = Scheduler(self.cfg, model.cfg.max_seq_len)
        self.grammars = Grammars(tokenizer, model.wte.num_embeddings) if tokenizer else None
        self._choices: dict[Job, Choice] = {}

    def submit(self, request: Request) -> Stream:
        """Raises InputError for what can never be done, QueueFull for what cannot be done now."""
        max_tokens = self.check(request)
        stream, vocab_size = Stream(self, request), self.model.wte.num_embeddings
        stop_ids = request.stop_ids | ({self.tokenizer.eot_id} if request.grammar and self.tokenizer else set())
        for number in range(request.n):
            job = Job(
                prompt=tuple(request.prompt),
                max_tokens=max_tokens,
                stop_ids=stop_ids,
                priority=request.priority,
                salt=request.tenant,
                reuse=not request.scores_prompt,  # which needs the logits of all of it
            )
            decoder = self.tokenizer.stream_decoder(request.skip_control) if self.tokenizer else None
            answer = Answer(decoder, request.stop)
            constraint = None
            if request.grammar is not None and self.grammars is not None:
                constraint = self.grammars.start(request.grammar, stop_ids)
            stream.choices.append(Choice(stream, number, job, answer, constraint, vocab_size))
        self.scheduler.submit([choice.job for choice in stream.choices])
        self._choices.update((choice.job, choice) for choice in stream.choices)
        return stream

    def cancel(self, stream: Stream) -> None:
        """Ends what is not complete; its last piece says so."""
        for choice in stream.choices:
            if choice.job.finish is None:
                self.scheduler.finish(choice.job, "cancelled")
                self._close(choice, "", [], None)

    def step(self) -> bool:
        """Whether there was anything to do."""
        plan = self.scheduler.schedule()
        tokens = self._run(plan)
        self._postprocess(plan, tokens)
        return bool(plan.parts)

    def refresh(self) -> None:
        """Compute with the model's weights as they are now. Requests that have begun continue with the new weights, for
        which their keys and values are computed again; cached prefixes are discarded."""
        self.runner.refresh()
        self.runner.layers.freeze()
        self.scheduler.recompute()

    def _run(self, plan: Plan) -> dict[Job, Token]:
        """The next token of each part that asks for one."""
        if not plan.parts:
            return {}
        routes: Routes = []
        wants_routes = any(self._choices[part.job].stream.request.experts for part in plan.parts)
        with torch_threads(self.runner.threads):
            hidden_TD = self.runner.run(plan.parts, append_to(routes) if wants_routes else None)
            return self._sample(plan, hidden_TD, routes)

    def _postprocess(self, plan: Plan, tokens: dict[Job, Token]) -> None:
        """Give the tokens to the scheduler, and to the streams what may go out."""
        self.scheduler.postprocess(plan, [tokens[part.job].id for part in plan.parts if part.samples])
        for part in plan.parts:
            self._deliver(self._choices[part.job], tokens.get(part.job))

    def check(self, request: Request) -> int:
        """Return the largest number of new tokens. Raises SettingError for a request that could never be answered.

        Any thread may call it.
        """
        vocab_size, prompt = self.model.wte.num_embeddings, request.prompt
        max_tokens = self.scheduler.new_tokens(len(prompt), request.max_tokens)
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise SettingError(
                "prompt",
                f"the prompt has an id outside of 0 to {vocab_size - 1}; encode it with the model's own tokenizer",
            )
        if any(id >= vocab_size for id in request.sampling.logit_bias):
            raise SettingError(
                "logit_bias", f"logit_bias has an id above the model's last, {vocab_size - 1}; leave it out"
            )
        if request.stop and self.tokenizer is None:
            raise SettingError("stop", "stop strings need a tokenizer, and this engine has none; give stop_ids")
        if request.experts and self.model.cfg.ffn != "moe":
            raise SettingError(
                "experts",
                "experts were asked for, and this model is dense: it has none; leave experts out",
                code="no_experts",
            )
        if request.grammar is not None and self.tokenizer is None:
            raise SettingError("grammar", "a grammar needs a tokenizer, and this engine has none; leave it out")
        return max_tokens

    @torch.inference_mode()
    def _sample(self, plan: Plan, hidden_TD: Tensor, routes: Routes) -> dict[Job, Token]:
        """The next token of each part that asks for one; on the way, the log-probabilities of echoed prompts."""
        asked: list[tuple[Part, int]] = []
        rows, first = [], 0
        for part in plan.parts:
            positions = self._choices[part.job].asked(part)
            asked += ((part, position) for position in positions)
            rows += [first + position - 1 - part.start for position in positions]
            first += part.end - part.start
        tokens = {}
        for row, (part, position), logits_V in zip(rows, asked, self.runner.logits(hidden_TD, rows), strict=True):
            choice, job = self._choices[part.job], part.job
            request = choice.stream.request
            experts = chosen(routes, row) if request.experts else ()
            if position < len(job.prompt):
                choice.echoed.append(_token(job.prompt[position], logits_V, request.logprobs, experts))
            else:
                id = self._pick(choice, position, logits_V)
                tokens[job] = _token(id, logits_V, request.logprobs, experts)
        return tokens

    def _pick(self, choice: Choice, position: int, logits_V: Tensor) -> int:
        allowed_V = choice.constraint.allowed() if choice.constraint else None
        if choice.constraint and allowed_V is None:
            choice.is_broken = True
            assert self.tokenizer is not None
            return self.tokenizer.eot_id  # ends it, and is not part of it
        sampling = choice.stream.request.sampling
        return pick(logits_V, sampling, chance(sampling.seed, choice.number, position), choice.history, allowed_V)

    def _deliver(self, choice: Choice, token: Token | None) -> None:
        """After a step: what may go out."""
        job, text = choice.job, ""
        tokens: list[Token] = []
        if choice.echoed and job.num_computed >= len(job.prompt):
            self._push(choice, self._prompt_text(choice.stream.request), choice.echoed, None)
            choice.echoed = []
        stop_token = token if token is not None and job.finish == "stop" and token.id in job.stop_ids else None
        if token is not None and stop_token is None:
            if choice.history is not None:
                choice.history.add(token.id)
            if choice.constraint is not None:
                choice.constraint.add(token.id)
            text, tokens = choice.answer.feed(token)
            if choice.answer.is_stopped:
                self.scheduler.finish(job, "stop")
        if job.finish is not None:
            self._close(choice, text, tokens, stop_token)
        elif text or tokens:
            self._push(choice, text, tokens, None)

    def _close(self, choice: Choice, text: str, tokens: list[Token], stop_token: Token | None) -> None:
        rest, last = choice.answer.end()
        if stop_token is not None:
            last.append(stop_token)
        finish = "stop" if choice.answer.is_stopped else choice.job.finish  # also where it was the last token anyway
        if choice.is_broken:
            finish = "error"
        self._push(choice, text + rest, tokens + last, finish)
        del self._choices[choice.job]

    def _push(self, choice: Choice, text: str, tokens: list[Token], finish: Finish | None) -> None:
        choice.stream.put(Piece(choice.number, text, tokens, finish))

    def _prompt_text(self, request: Request) -> str:
        """The echoed prompt, decoded as its answer is."""
        if self.tokenizer is None:
            return ""
        decoder = self.tokenizer.stream_decoder(request.skip_control)
        return "".join(map(decoder.feed, request.prompt)) + decoder.flush()


def _token(id: int, logits_V: Tensor, logprobs: int | None, experts: tuple[Chosen, ...]) -> Token:
    if logprobs is None:
        return Token(id, experts=experts)
    logprobs_V = logits_V.double().log_softmax(-1)
    values, ids = logprobs_V.topk(min(logprobs, len(logits_V)))
    return Token(id, float(logprobs_V[id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)), experts)
