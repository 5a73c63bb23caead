"""
Serve a run: an HTTP API like OpenAI's, and a page to chat in.

    python -m tools.serve out/poems-sft                      # then open http://127.0.0.1:8000
    curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"messages": [{"role": "user", "content": "写一首诗"}], "stream": true}'

in: out/<run>/ckpt.pt and tokenizer.model.

A request passes the gate (tools/gate.py), is checked (tools/wire.py) and becomes rows of tools/engine.py, which decodes
all rows together in a thread of its own; a Choice (tools/answers.py) turns the tokens of a row into what the client may
see; Service sends it. Differences from OpenAI's API:
1. One model answers, whatever name a request gives.
2. max_tokens beyond the model's room is cut, not refused.
3. Log-probs are the model's own, before temperature and filters.
4. top_k, min_p and repetition_penalty are there, too, as in sample.py. Other settings are refused where they would
   change the answer; fields that nobody knows are named in the answer as "ignored".
5. A page of any web site may use it, as long as --api_key asks for none.
"""
import asyncio
import contextlib
import os
import socket
import sys
import time
import uuid
from dataclasses import dataclass

from common.checkpoint import load_model
from common.distributed import start
from common.generate import draw_uniforms
from configurator import Count, NonNegative, Whole, check, run
from tokenizer import render_chat
from tools.answers import ChatChoice, Choice
from tools.engine import Engine, Full, Row, Sampling

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import FileResponse, Response, StreamingResponse
except ImportError as error:
    sys.exit(f"error: tools/serve.py needs {error.name}: pip install fastapi uvicorn")

from tools.gate import Gate, Refused, event, tell_errors, to_json
from tools.wire import ChatRequest, CompletionRequest, chat_turns

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "chat.html")


@dataclass
class Config:
    run: str = ""                    # the run's folder (the bare word)
    host: str = "127.0.0.1"          # this machine alone; 0.0.0.0: whoever can reach it
    port: Whole = 8000
    api_key: str = ""                # if set, clients must send it
    slots: Count = 16                # answers decoded at once; each holds keys and values of the longest row
    queue: Whole = 64                # more answers that may wait; beyond them a client gets 429
    max_tokens: Count = 512          # of an answer, where a request names no number
    temperature: NonNegative = 0.8   # where a request names none
    device: str = "auto"
    seed: int = 1234                 # of the machine; answers draw anew each time, unless a request names a seed


class Job:
    """The choices of one request, and the queue through which the engine's thread hands over their tokens."""

    def __init__(self, kind, body):
        self.ignored = body.ignored()    # fields of the request that nobody read
        self.kind = kind                 # "chat.completion" or "text_completion"
        self.id = f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.items = asyncio.Queue()     # (number of a choice, what the engine put)
        self.choices = []
        self.prompt_tokens = 0

    def receiver(self, index):
        """A function for the engine's thread, which must not touch a queue of asyncio itself."""
        loop = asyncio.get_running_loop()
        return lambda item: loop.call_soon_threadsafe(self.items.put_nowait, (index, item))

    async def steps(self):
        """Yield lists of the choices that have grown, until all have ended."""
        while any(choice.reason is None for choice in self.choices):
            # wait for one token; where more have come since, take them along
            items = [await self.items.get()]
            while not self.items.empty():
                items.append(self.items.get_nowait())
            grown = {}
            for index, item in items:
                choice = self.choices[index]
                if isinstance(item, Exception):
                    raise Refused(500, f"the engine failed: {item}", "server_error")
                if choice.reason is None:  # else it has met a stop string, and the engine did not know yet
                    choice.push(item)
                    grown[index] = choice
            yield list(grown.values())

    def cancel(self):
        for choice in self.choices:
            choice.row.cancelled = True

    def usage(self):
        completion_tokens = sum(choice.n_tokens for choice in self.choices)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion_tokens,
                "total_tokens": self.prompt_tokens + completion_tokens}


class Stream(StreamingResponse):
    """A streamed answer; its rows stop when it ends, even where the client left before the first byte."""

    def __init__(self, content, job):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.job = job

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


class Service:
    """What the endpoints do."""

    def __init__(self, cfg, engine, tokenizer):
        self.cfg = cfg
        self.engine = engine
        self.tokenizer = tokenizer
        self.name = os.path.basename(os.path.normpath(cfg.run))
        self.started = int(time.time())
        self.longest_piece = max(len(piece) for piece in tokenizer.pieces.values())  # bytes

    # ---- endpoints

    async def page(self):
        return FileResponse(PAGE, headers={"Cache-Control": "no-cache"})

    async def health(self):
        engine = self.engine
        return {"status": "ok", "running": len(engine.rows), "waiting": len(engine.waiting), "slots": engine.slots}

    async def models(self):
        return {"object": "list", "data": [await self.model(self.name)]}

    async def model(self, name: str):
        if name != self.name:
            raise Refused(404, f"no model {name} here, but {self.name}", code="model_not_found", param="model")
        return {"id": name, "object": "model", "created": self.started, "owned_by": "mingyue",
                "max_model_len": self.engine.room}

    async def chat(self, body: ChatRequest, request: Request):
        turns = chat_turns(body)
        self.check(body, 1, sum(n_bytes(turn["content"]) for turn in turns))
        # encode() never yields a control token, whatever a text says: the template alone begins and ends turns
        prompt, _ = render_chat(self.tokenizer, turns, add_generation_prompt=True)
        job = Job("chat.completion", body)
        for row in self.rows(job, body, prompt, body.top_logprobs if body.logprobs else -1):
            job.choices.append(ChatChoice(self.tokenizer, row, stop_strings(body), len(job.choices)))
        return await self.answer(job, body, request)

    async def complete(self, body: CompletionRequest, request: Request):
        texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        self.check(body, len(texts), max(map(n_bytes, texts), default=0))
        job = Job("text_completion", body)
        for text in texts:
            prompt = self.tokenizer.encode_start(text)
            for row in self.rows(job, body, prompt, body.logprobs):
                job.choices.append(Choice(self.tokenizer, row, stop_strings(body), len(job.choices)))
        return await self.answer(job, body, request)

    # ---- from a request to rows

    def check(self, body, n_prompts, size):
        """Refuse what is surely too much, before it is cut into tokens: that takes seconds for a book. size: bytes."""
        n_rows = n_prompts * body.n
        if not 1 <= n_rows <= self.engine.slots:
            message = f"{n_rows} answers asked for: from 1 to {self.engine.slots} fit into a request"
            raise Refused(400, message, param="n")
        if size > self.engine.room * self.longest_piece:
            self.too_long(f"{size:,} bytes")

    def too_long(self, size):
        message = f"the prompt has {size}, but the model was trained on rows of up to {self.engine.room}, answer included"
        raise Refused(400, message, code="context_length_exceeded")

    def rows(self, job, body, prompt, top_logprobs):
        """Yield body.n rows that answer one prompt (ids)."""
        room = self.engine.room - len(prompt)
        if room < 1:
            self.too_long(f"{len(prompt):,} tokens")
        job.prompt_tokens += len(prompt)
        max_new_tokens = min(room, body.max_tokens or self.cfg.max_tokens)
        temperature = self.cfg.temperature if body.temperature is None else body.temperature
        if temperature < 1e-5:
            temperature = 0.0  # logits divided by less could overflow; what they say is the same
        sampling = Sampling(temperature, body.top_k, body.top_p, body.min_p, body.repetition_penalty)
        # answer i draws as row i of generate() would
        for uniforms in draw_uniforms(body.seed, body.n, max_new_tokens).tolist():
            put = job.receiver(len(job.choices))
            yield Row(prompt, max_new_tokens, sampling, uniforms, top_logprobs, put)

    # ---- from rows to an answer

    async def answer(self, job, body, request):
        # all rows get in, or none
        try:
            self.engine.submit([choice.row for choice in job.choices])
        except Full:
            raise Refused(429, "too many requests: try again later", "rate_limit_error", "rate_limit_exceeded")
        if body.stream:
            return Stream(self.events(job, body.stream_options.include_usage), job)
        return await self.whole(job, request)

    async def whole(self, job, request):
        """Wait for all of the answer, but no longer than the client does."""

        async def finish():
            async for _ in job.steps():
                pass

        async def hang_up():
            while (await request.receive())["type"] != "http.disconnect":
                pass

        # both at once; the first to end decides
        finished = asyncio.ensure_future(finish())
        gone = asyncio.ensure_future(hang_up())
        try:
            await asyncio.wait([finished, gone], return_when=asyncio.FIRST_COMPLETED)
            if not finished.done():
                return Response(status_code=499)  # nobody reads it
            finished.result()                     # raises what went wrong
        finally:
            # whatever happened, nothing of this request goes on
            finished.cancel()
            gone.cancel()
            job.cancel()
        choices = [choice.take() for choice in job.choices]
        if job.kind == "chat.completion":
            for choice in choices:
                # all that is new since the beginning is the message
                delta = choice.pop("delta")
                content = None if "tool_calls" in delta else ""
                choice["message"] = {"role": "assistant", "content": content, **delta}
        answer = {**self.head(job), "choices": choices, "usage": job.usage()}
        return Response(to_json(answer), media_type="application/json")

    async def events(self, job, include_usage):
        """The answer piece by piece, as server-sent events."""
        head = self.head(job)
        if job.kind == "chat.completion":
            head["object"] = "chat.completion.chunk"
            for choice in job.choices:
                first = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield event({**head, "choices": [first]})
        try:
            # every step: what is new of each choice that has grown
            async for grown in job.steps():
                for choice in grown:
                    new = choice.take()
                    if new:
                        yield event({**head, "choices": [new]})
            # the usage comes last, in an event of its own, where the client asked for it
            if include_usage:
                yield event({**head, "choices": [], "usage": job.usage()})
        except Refused as refused:
            # status 200 was sent long ago, so the error comes as an event
            yield event(refused.error)
        yield b"data: [DONE]\n\n"

    def head(self, job):
        ignored = {"ignored": job.ignored} if job.ignored else {}
        return {"id": job.id, "object": job.kind, "created": job.created, "model": self.name, **ignored}


def n_bytes(text):
    return len(text.encode(errors="replace"))


def stop_strings(body):
    return [body.stop] if isinstance(body.stop, str) else body.stop


def make_app(service):
    """The endpoints as an ASGI application; its engine runs as long as it does."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
        service.engine.thread.start()
        yield
        service.engine.close()

    app = FastAPI(title="mingyue", lifespan=lifespan)
    app.add_middleware(Gate, api_key=service.cfg.api_key)
    # browsers ask first, from whatever page a client's program runs in; it stands before the gate to answer them
    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"],
                       allow_private_network=True)
    for path, endpoint in (("/", service.page), ("/health", service.health), ("/v1/models", service.models),
                           ("/v1/models/{name}", service.model)):
        app.api_route(path, methods=["GET", "HEAD"])(endpoint)
    app.post("/v1/chat/completions")(service.chat)
    app.post("/v1/completions")(service.complete)

    tell_errors(app)
    return app


def main(cfg):
    check(cfg.run, "name the run to serve: python -m tools.serve out/poems-sft")
    # model → engine → endpoints
    env = start(cfg, announce=False)
    model, tokenizer, checkpoint = load_model(cfg.run, env.device)
    engine = Engine(model, [tokenizer.im_end_id, tokenizer.eot_id], cfg.slots, cfg.queue, env)
    app = make_app(Service(cfg, engine, tokenizer))
    # take the port ourselves: where it is taken already, say so in a line
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    try:
        listener = socket.create_server((cfg.host, cfg.port), family=family)
    except (OSError, OverflowError) as error:
        check(False, f"cannot listen at {cfg.host}, port {cfg.port} ({error}): choose another with --port=")
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"{cfg.run}: {checkpoint['stage']}, step {checkpoint['step']}, at {address}", file=sys.stderr)
    if checkpoint["stage"] == "pretrain":
        print(f"note: {cfg.run} has not learned to chat. /v1/completions goes on with a text, as it has learned to",
              file=sys.stderr)
    if cfg.host not in ("127.0.0.1", "localhost", "::1") and not cfg.api_key:
        print("note: whoever reaches this machine can use the model; --api_key=… asks for a key", file=sys.stderr)
    # until Ctrl-C; answers under way then have 3 seconds
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))
    server.run(sockets=[listener])


if __name__ == "__main__":
    run(main, Config, positional="run")
