"""
Serve a run: an HTTP API like OpenAI's, and a page to chat in.

    python -m tools.serve out/poems-sft                      # then open http://127.0.0.1:8000
    curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"messages": [{"role": "user", "content": "写一首诗"}], "stream": true}'

in: out/<run>/ckpt.pt and tokenizer.model.

A request becomes rows of tools/engine.py, which decodes all rows together in a thread of its own; a Choice turns the
tokens of a row into what the client may see; Service sends it. Differences from OpenAI's API:
1. One model answers, whatever name a request gives.
2. max_tokens beyond the model's room is cut, not refused.
3. Log-probs are the model's own, before temperature and top_p.
4. Settings that are not here are refused where they would change the answer, fields nobody knows are passed over.
"""
import asyncio
import contextlib
import json
import os
import re
import secrets
import socket
import sys
import time
import uuid
from dataclasses import dataclass
from typing import Annotated, Literal

from common import load_model, start
from configurator import Count, NonNegative, Whole, check, run
from generate import draw_uniforms
from recipes.schemas import call_tools, list_tools
from tokenizer import StreamDecoder, render_chat
from tools.engine import Engine, Full, Row, Token

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, Response, StreamingResponse
    from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StringConstraints, model_validator
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
except ImportError as error:
    sys.exit(f"error: tools/serve.py needs {error.name}: pip install fastapi uvicorn")

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "chat.html")
MAX_BODY = 2 ** 24  # bytes of one request


@dataclass
class Config:
    run: str = ""                    # the run's folder (the bare word)
    host: str = "127.0.0.1"          # this machine alone; 0.0.0.0: whoever can reach it
    port: Whole = 8000
    api_key: str = ""                # if set, clients must send it
    slots: Count = 16                # answers decoded at once; each holds keys and values of max_seq_len tokens
    queue: Whole = 64                # more answers that may wait; beyond them a client gets 429
    max_tokens: Count = 512          # of an answer, where a request names no number
    temperature: NonNegative = 0.8   # where a request names none
    device: str = "auto"
    seed: int = 1234                 # of the machine; answers draw anew each time, unless a request names a seed


# ---------------------------------------------------------------------------- text: what a client sees of the tokens


def tail(text, words):
    """Length of the longest end of `text` that may become one of `words`: it must be held back until it is sure."""
    longest = 0
    for word in words:
        for length in range(1, len(word)):
            if text.endswith(word[:length]):
                longest = max(longest, length)
    return longest


# the tags that may come next, and what each begins
TAGS = {
    "content": {"<think>": "reasoning_content", "<tool_call>": "tool_calls"},
    "reasoning_content": {"</think>": "content"},
    "tool_calls": {"</tool_call>": "content"},
}


class Parts:
    """Tells reasoning and tool calls from the rest of an answer, while it comes."""

    def __init__(self):
        self.kind = "content"
        self.held = ""
        self.after_tag = False
        self.n_calls = 0

    def push(self, text, final):
        """Take more text; return the fields of a message that it adds to, none of them empty. final: it was the last."""
        self.held += text
        fields = {}
        while True:
            if self.after_tag:
                self.held = self.held.lstrip()  # line breaks around a tag belong to the tag
            tags = TAGS[self.kind]
            match = re.search("|".join(tags), self.held)
            if match is None:
                break
            self.add(fields, self.held[:match.start()].rstrip())
            self.held = self.held[match.end():]
            self.kind = tags[match[0]]
            self.after_tag = True
        if final:
            if self.kind == "tool_calls":  # it never ended: a text like others
                self.kind = "content"
                self.held = f"<tool_call>\n{self.held}"
            self.add(fields, self.held)
        elif self.kind != "tool_calls":  # a call is shown when it is whole
            # space before a tag is dropped as well, so it waits for what comes next
            shown = self.held[:len(self.held) - tail(self.held, tags)].rstrip()
            self.add(fields, shown)
            self.held = self.held[len(shown):]
        return fields

    def add(self, fields, text):
        kind = self.kind
        if kind == "tool_calls":
            call = self.read_call(text)
            if call:
                fields.setdefault(kind, []).append(call)
                return
            kind = "content"
            text = f"<tool_call>\n{text}\n</tool_call>"
        if text:
            self.after_tag = False
            fields[kind] = fields.get(kind, "") + text

    def read_call(self, text):
        """The call that the model wrote as {"name": …, "arguments": {…}}, or None where it is none."""
        try:
            call = json.loads(text)
            name = call["name"]
            arguments = call.get("arguments", {})
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        self.n_calls += 1
        return {"index": self.n_calls - 1, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                "function": function}


class Choice:
    """One answer of a completion: takes tokens, gives text, ends at a stop string."""

    def __init__(self, tokenizer, row, stops, index):
        self.tokenizer = tokenizer
        self.row = row
        self.stops = stops
        self.index = index
        self.reason = None           # why it ended, in the words of the API
        self.n_tokens = 0
        self.held = ""               # not yet given out: it may be the beginning of a stop string
        self.given = 0               # characters given out
        self.tokens = []             # (where its text begins, Token) of those not yet given out
        self.decoder = StreamDecoder(tokenizer, skip_special=True)

    def push(self, item):
        """Take what the engine put: a Token, or the reason of the end."""
        if isinstance(item, Token):
            self.n_tokens += 1
            if item.id in (self.tokenizer.eot_id, self.tokenizer.im_end_id):
                return               # it counts as a token, but says nothing
            self.tokens.append((self.given + len(self.held), item))
            self.held += self.decoder.push(item.id)
        else:
            self.held += self.decoder.flush()
            self.reason = item
        # A stop string is looked for after each single token. All of `held` at once could find another one, and what a
        # client gets would depend on how many tokens come together.
        found = [self.held.index(stop) for stop in self.stops if stop in self.held]
        if found:
            self.held = self.held[:min(found)]
            self.reason = "stop"
            self.row.cancelled = True

    def take(self, key):
        """What is new, as a choice of the API's answer, None where it is nothing; all, if taken once at the end."""
        done = self.reason is not None
        keep = 0 if done else tail(self.held, self.stops)
        text = self.held[:len(self.held) - keep]
        self.held = self.held[len(text):]
        self.given += len(text)
        # the tokens that begin in this text; of those after a stop string nobody hears
        tokens = [(begin, token) for begin, token in self.tokens if begin < self.given]
        self.tokens = self.tokens[len(tokens):]
        if not text and not done:
            return None
        choice = {"index": self.index, **self.body(text, key, done), "logprobs": None, "finish_reason": self.reason}
        if self.row.top_logprobs >= 0:
            choice["logprobs"] = self.logprobs(tokens)
        return choice

    def name(self, id):
        """A token as text; one that is a part of a character as its bytes."""
        data = self.tokenizer.decode_bytes([id])
        return data.decode(errors="backslashreplace")

    def body(self, text, key, done):
        return {"text": text}

    def logprobs(self, tokens):
        likeliest = []
        for _, token in tokens:
            likeliest.append({self.name(id): logprob for id, logprob in token.likeliest})
        return {"tokens": [self.name(token.id) for _, token in tokens],
                "token_logprobs": [token.logprob for _, token in tokens],
                "top_logprobs": likeliest,
                "text_offset": [begin for begin, _ in tokens]}


class ChatChoice(Choice):
    """The same for a chat, where an answer is a message."""

    def __init__(self, tokenizer, row, stops, index):
        super().__init__(tokenizer, row, stops, index)
        self.parts = Parts()

    def body(self, text, key, done):
        fields = self.parts.push(text, done)
        if done and self.parts.n_calls and self.reason == "stop":
            self.reason = "tool_calls"
        return {key: fields}

    def logprobs(self, tokens):
        content = []
        for _, token in tokens:
            likeliest = [self.entry(id, logprob) for id, logprob in token.likeliest]
            content.append({**self.entry(token.id, token.logprob), "top_logprobs": likeliest})
        return {"content": content}

    def entry(self, id, logprob):
        data = self.tokenizer.decode_bytes([id])
        return {"token": self.name(id), "logprob": logprob, "bytes": list(data)}


# ---------------------------------------------------------------------------- requests, as they come over the wire


class Wire(BaseModel):
    """A JSON object: strict about types ("7" is no number), null means not given, unknown fields are passed over."""
    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, data):
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}


class StreamOptions(Wire):
    include_usage: bool = False


class Settings(Wire):
    """What both kinds of completion may say."""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int = Field(None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    temperature: float = Field(None, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    n: int = Field(1, ge=1)
    seed: int = Field(None, ge=-2 ** 63, lt=2 ** 63)
    # an empty stop string would be found at once
    stop: Annotated[str, StringConstraints(min_length=1)] | list[Annotated[str, StringConstraints(min_length=1)]] = []

    @model_validator(mode="before")
    @classmethod
    def nothing_missing(cls, data):
        """Settings that are not here may be sent as long as they change nothing."""
        for name in ("logit_bias", "presence_penalty", "frequency_penalty", "echo", "suffix"):
            if isinstance(data, dict) and data.get(name):
                raise ValueError(f"{name} is not offered here")
        return data


class CompletionRequest(Settings):
    # texts alone, no lists of token ids: these could hold control tokens
    prompt: str | list[str]
    logprobs: int = Field(-1, ge=0, le=5)


class TextPart(Wire):
    type: Literal["text"]
    text: str


class Function(Wire):
    name: str
    arguments: str = "{}"


class ToolCall(Wire):
    function: Function


class Message(Wire):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    tool_calls: list[ToolCall] = []


class Tool(Wire):
    type: Literal["function"]
    function: dict


class ResponseFormat(Wire):
    type: Literal["text"]


class ChatRequest(Settings):
    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] = []
    tool_choice: Literal["auto", "none"] = "auto"
    response_format: ResponseFormat = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


def chat_turns(body):
    """The messages of a request as turns of the chat template. Tools, and calls of them, are text there, the same text
    that prepare.py makes of a data set's; what the model thought in earlier turns is left out."""
    turns = []
    for message in body.messages:
        text = message.content
        if isinstance(text, list):
            text = "".join(part.text for part in text)
        if message.tool_calls:
            calls = [call.model_dump() for call in message.tool_calls]
            text = f"{text}\n{call_tools(calls)}".lstrip("\n")
        # "developer" is a younger name for the same thing
        role = "system" if message.role == "developer" else message.role
        turns.append({"role": role, "content": text})
    if body.tools and body.tool_choice == "auto":
        if turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": ""})
        offered = list_tools([tool.function for tool in body.tools])
        turns[0]["content"] = f"{turns[0]['content']}\n\n{offered}".lstrip("\n")
    return turns


# ---------------------------------------------------------------------------- HTTP


class Refused(Exception):
    """An error that goes to the client in OpenAI's form."""

    def __init__(self, status, message, type="invalid_request_error", code=None, param=None):
        self.status = status
        self.error = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self):
        headers = {"Retry-After": "1"} if self.status == 429 else {}
        return Response(to_json(self.error), self.status, headers, media_type="application/json")


def to_json(value):
    # half a surrogate pair (from an escape in a model's tool call or in a user's text) is not UTF-8: it becomes "?"
    return json.dumps(value, ensure_ascii=False).encode(errors="replace")


def event(value):
    """A server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


class Gate:
    """Turns away, before a byte of the body is read: wrong keys and bodies too long."""

    def __init__(self, app, api_key):
        self.app = app
        self.expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope, receive, send):
        refused = None
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            refused = self.look_at(scope["method"], Headers(scope=scope))
        app = refused.response() if refused else self.app
        await app(scope, receive, send)

    def look_at(self, method, headers):
        given = headers.get("authorization", "").encode("latin-1")
        # compare_digest takes equally long wherever the first difference is: nobody can guess letter by letter
        if self.expected and not secrets.compare_digest(given, self.expected):
            return Refused(401, "wrong or missing API key (Authorization: Bearer …)", code="invalid_api_key")
        if "transfer-encoding" in headers:
            return Refused(411, "say the length of the body (Content-Length)")
        if int(headers.get("content-length", 0)) > MAX_BODY:
            return Refused(413, f"a body has at most {MAX_BODY:,} bytes")
        # A page of any site may make a browser send us text or a form, but JSON only to its own site.
        if method == "POST" and not headers.get("content-type", "").startswith("application/json"):
            return Refused(415, "send JSON, and the header Content-Type: application/json")


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


class Job:
    """The choices of one request, and the queue through which the engine's thread hands over their tokens."""

    def __init__(self, chat):
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.chat = chat
        self.created = int(time.time())
        self.items = asyncio.Queue()     # (number of a choice, what the engine put)
        self.choices = []
        self.prompt_tokens = 0

    def receiver(self, index):
        """A function for the engine's thread, which must not touch asyncio's queue itself."""
        loop = asyncio.get_running_loop()
        return lambda item: loop.call_soon_threadsafe(self.items.put_nowait, (index, item))

    async def steps(self):
        """Yield lists of the choices that have grown, until all of them have ended."""
        while any(choice.reason is None for choice in self.choices):
            # where tokens come faster than the client reads, several of them make one step
            items = [await self.items.get()]
            while not self.items.empty():
                items.append(self.items.get_nowait())
            grown = {}
            for index, item in items:
                choice = self.choices[index]
                if isinstance(item, Exception):
                    raise Refused(500, f"the engine failed: {item}", "server_error")
                if choice.reason is None:  # else: drawn before the engine knew of a stop string
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


class Service:
    """The endpoints."""

    def __init__(self, cfg, engine, tokenizer):
        self.cfg = cfg
        self.engine = engine
        self.tokenizer = tokenizer
        self.name = os.path.basename(os.path.normpath(cfg.run))
        self.started = int(time.time())
        self.longest_piece = max(len(piece) for piece in tokenizer.pieces.values())

    async def page(self):
        return FileResponse(PAGE, headers={"Cache-Control": "no-cache"})

    async def health(self):
        engine = self.engine
        return {"status": "ok", "running": len(engine.rows), "waiting": len(engine.waiting), "slots": engine.slots}

    def card(self):
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "mingyue",
                "max_model_len": self.engine.room}

    async def models(self):
        return {"object": "list", "data": [self.card()]}

    async def model(self, name: str):
        if name != self.name:
            raise Refused(404, f"no model {name} here, but {self.name}", code="model_not_found", param="model")
        return self.card()

    async def chat(self, body: ChatRequest, request: Request):
        top_logprobs = body.top_logprobs if body.logprobs else -1
        turns = chat_turns(body)
        self.check_size(sum(len(turn["content"].encode(errors="replace")) for turn in turns))
        # encode() never yields a control token, so only the template itself begins and ends turns
        ids, _ = render_chat(self.tokenizer, turns, add_generation_prompt=True)
        return await self.answer(body, [ids], top_logprobs, ChatChoice, request)

    async def complete(self, body: CompletionRequest, request: Request):
        texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        prompts = []
        for text in texts:
            self.check_size(len(text.encode(errors="replace")))
            # the end-of-text token stands before every document, so it opens ours too
            prompts.append([self.tokenizer.eot_id] + self.tokenizer.encode(text))
        return await self.answer(body, prompts, body.logprobs, Choice, request)

    def check_size(self, n_bytes):
        """Refuse what is surely too long before it is cut into tokens, which takes seconds for a book."""
        if n_bytes > self.engine.room * self.longest_piece:
            self.too_long(f"{n_bytes:,} bytes")

    def too_long(self, size):
        message = f"the prompt has {size}, but the model sees {self.engine.room} tokens, answer included"
        raise Refused(400, message, code="context_length_exceeded")

    async def answer(self, body, prompts, top_logprobs, Kind, request):
        """Decode body.n answers to each prompt (lists of ids), and send them as Kind of choice."""
        cfg = self.cfg
        n_rows = len(prompts) * body.n
        if not 1 <= n_rows <= self.engine.slots:
            raise Refused(400, f"{n_rows} answers asked for: from 1 to {self.engine.slots} fit into a request", param="n")
        stops = [body.stop] if isinstance(body.stop, str) else body.stop
        if len(stops) > 4:
            raise Refused(400, f"{len(stops)} stop strings: there may be 4", param="stop")
        temperature = cfg.temperature if body.temperature is None else body.temperature
        chat = Kind is ChatChoice
        job = Job(chat)
        for prompt in prompts:
            room = self.engine.room - len(prompt)
            if room < 1:
                self.too_long(f"{len(prompt):,} tokens")
            job.prompt_tokens += len(prompt)
            max_new_tokens = min(room, body.max_tokens or cfg.max_tokens)
            # answer i of a prompt draws as row i of generate() would
            for uniforms in draw_uniforms(body.seed, body.n, max_new_tokens).tolist():
                index = len(job.choices)
                row = Row(prompt, max_new_tokens, temperature, body.top_p, uniforms, top_logprobs, job.receiver(index))
                job.choices.append(Kind(self.tokenizer, row, stops, index))
        try:
            self.engine.submit([choice.row for choice in job.choices])
        except Full:
            raise Refused(429, "too many requests: try again later", "rate_limit_error", "rate_limit_exceeded")
        if body.stream:
            return Stream(self.events(job, body.stream_options.include_usage), job)
        return await self.whole(job, request)

    def head(self, job, chunk=False):
        object = "text_completion"
        if job.chat:
            object = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": job.id, "object": object, "created": job.created, "model": self.name}

    async def whole(self, job, request):
        """Wait for the answers, but no longer than the client does."""

        async def finish():
            async for _ in job.steps():
                pass

        async def hang_up():
            while (await request.receive())["type"] != "http.disconnect":
                pass

        finished = asyncio.ensure_future(finish())
        gone = asyncio.ensure_future(hang_up())
        try:
            await asyncio.wait([finished, gone], return_when=asyncio.FIRST_COMPLETED)
            if not finished.done():
                return Response(status_code=499)  # nobody reads it
            finished.result()                     # raises what went wrong
        finally:
            finished.cancel()
            gone.cancel()
            job.cancel()
        choices = [choice.take("message") for choice in job.choices]
        for choice in choices:
            if job.chat:
                message = choice["message"]
                no_content = None if "tool_calls" in message else ""
                choice["message"] = {"role": "assistant", "content": no_content, **message}
        answer = {**self.head(job), "choices": choices, "usage": job.usage()}
        return Response(to_json(answer), media_type="application/json")

    async def events(self, job, include_usage):
        """The answers piece by piece, as server-sent events."""
        head = self.head(job, chunk=True)
        if job.chat:
            for choice in job.choices:
                delta = {"role": "assistant", "content": ""}
                yield event({**head, "choices": [{"index": choice.index, "delta": delta, "finish_reason": None}]})
        try:
            async for grown in job.steps():
                for choice in grown:
                    delta = choice.take("delta")
                    if delta:
                        yield event({**head, "choices": [delta]})
            if include_usage:
                yield event({**head, "choices": [], "usage": job.usage()})
        except Refused as refused:  # the status has long been sent, so the error comes as an event
            yield event(refused.error)
        yield b"data: [DONE]\n\n"


def make_app(service):
    """The endpoints as an ASGI application; its engine runs as long as it does."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
        service.engine.thread.start()
        yield
        service.engine.close()

    app = FastAPI(title="mingyue", lifespan=lifespan)
    app.add_middleware(Gate, api_key=service.cfg.api_key)
    app.get("/")(service.page)
    app.get("/health")(service.health)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{name}")(service.model)
    app.post("/v1/chat/completions")(service.chat)
    app.post("/v1/completions")(service.complete)

    # whatever goes wrong, the client gets OpenAI's form of an error

    @app.exception_handler(Refused)
    async def refused(request, error):
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "json_invalid":
            return Refused(400, f"the body is not JSON: {first['ctx']['error']}").response()
        place = [str(part) for part in first["loc"][1:]]
        if not place:
            return Refused(400, message).response()
        return Refused(400, f"{'.'.join(place)}: {message}", param=place[0]).response()

    @app.exception_handler(HTTPException)
    async def http_error(request, error):
        return Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

    @app.exception_handler(Exception)
    async def our_fault(request, error):
        return Refused(500, f"{type(error).__name__}: {error}", "server_error").response()

    return app


def main(cfg):
    check(cfg.run, "name the run to serve: python -m tools.serve out/poems-sft")
    env = start(cfg, announce=False)
    model, tokenizer, checkpoint = load_model(cfg.run, env.device)
    engine = Engine(model, [tokenizer.im_end_id, tokenizer.eot_id], cfg.slots, cfg.queue, env)
    app = make_app(Service(cfg, engine, tokenizer))
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    try:
        listener = socket.create_server((cfg.host, cfg.port), family=family)
    except (OSError, OverflowError) as error:
        check(False, f"cannot listen at {cfg.host}, port {cfg.port} ({error}): choose another with --port=")
    address = "http://{}:{}".format(*listener.getsockname()[:2])
    print(f"{cfg.run}: {checkpoint['stage']}, step {checkpoint['step']}, at {address}", file=sys.stderr)
    if cfg.host not in ("127.0.0.1", "localhost", "::1") and not cfg.api_key:
        print("note: whoever reaches this machine can use the model; --api_key=… asks for a key", file=sys.stderr)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))
    server.run(sockets=[listener])


if __name__ == "__main__":
    run(main, Config, positional="run")
