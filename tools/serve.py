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
from readers.calls import call_tools, list_tools
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
    """Length of the longest end of `text` with which one of `words` begins: hold it back until more text has come."""
    longest = 0
    for word in words:
        for length in range(1, len(word)):
            if text.endswith(word[:length]):
                longest = max(longest, length)
    return longest


# In what part of an answer we are → the tags that may end it → the part that they begin
TAGS = {
    "content": {"<think>": "reasoning_content", "<tool_call>": "tool_calls"},
    "reasoning_content": {"</think>": "content"},
    "tool_calls": {"</tool_call>": "content"},
}


class Parts:
    """Tells the reasoning and the tool calls of an answer from its content. The text may come in pieces of any size."""

    def __init__(self):
        self.part = "content"
        self.held = ""               # not yet given out
        self.after_tag = False
        self.n_calls = 0             # tool calls so far

    def push(self, text, final):
        """Take more text (final: the last); return what it adds to a message, as {field: text or list of calls}."""
        self.held += text
        fields = {}
        while True:
            # space around tags belongs to the tags: a model writes "</think>\n\n" before it answers
            if self.after_tag:
                self.held = self.held.lstrip()
            tags = TAGS[self.part]
            match = re.search("|".join(tags), self.held)
            if match is None:
                break
            # the part before the tag is whole; go on behind the tag
            self.add(fields, self.held[:match.start()].rstrip())
            self.held = self.held[match.end():]
            self.part = tags[match[0]]
            self.after_tag = True
        # No tag is left in `held`, but it may end with the beginning of one, or with space before one.
        if final and self.part == "tool_calls":
            # cut short, so it is no call, but text like other text
            self.part = "content"
            self.held = f"<tool_call>\n{self.held}"
        if final:
            self.add(fields, self.held)
        elif self.part != "tool_calls":
            shown = self.held[:len(self.held) - tail(self.held, tags)].rstrip()
            self.add(fields, shown)
            self.held = self.held[len(shown):]
        return fields

    def add(self, fields, text):
        """Put text of the present part into fields."""
        part = self.part
        if part == "tool_calls":
            call = self.read_call(text)
            if call:
                fields.setdefault(part, []).append(call)
                return
            # what is no call is shown as the model wrote it
            part = "content"
            text = f"<tool_call>\n{text}\n</tool_call>"
        if text:
            self.after_tag = False
            fields[part] = fields.get(part, "") + text

    def read_call(self, text):
        """The call that a model wrote as {"name": …, "arguments": {…}}, in OpenAI's form; None where it is none."""
        # the model may write anything: broken JSON, a list, a number for the name
        try:
            call = json.loads(text)
            name = call["name"]
            arguments = call.get("arguments", {})
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        index = self.n_calls
        self.n_calls += 1
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {"index": index, "id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


class Choice:
    """One answer of /v1/completions: takes tokens, gives text, ends at a stop string."""

    def __init__(self, tokenizer, row, stops, index):
        self.tokenizer = tokenizer
        self.row = row
        self.stops = stops
        self.index = index
        self.reason = None           # why it ended, in the words of the API
        self.n_tokens = 0
        self.held = ""               # not yet given out: it may be the beginning of a stop string
        self.given = 0               # characters given out
        self.tokens = []             # not yet given out: (number of characters before it, Token)
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
            self.reason = item
            self.held += self.decoder.flush()
        # Look for stop strings after each single token. After several at once another one might be found first, and the
        # answer would depend on how fast its client reads.
        found = [self.held.index(stop) for stop in self.stops if stop in self.held]
        if found:
            # the answer ends here, and the engine need not go on
            self.held = self.held[:min(found)]
            self.reason = "stop"
            self.row.cancelled = True

    def take(self):
        """What is new since the last time, as a choice of the API's answer; None where nothing is."""
        done = self.reason is not None
        keep = 0 if done else tail(self.held, self.stops)
        text = self.held[:len(self.held) - keep]
        if not text and not done:
            return None
        self.held = self.held[len(text):]
        self.given += len(text)
        # a token goes out with the text that it begins; of those behind a stop string nobody hears
        tokens = [token for begin, token in self.tokens if begin < self.given]
        offsets = [begin for begin, _ in self.tokens[:len(tokens)]]
        self.tokens = self.tokens[len(tokens):]
        choice = {"index": self.index, **self.body(text, done), "logprobs": None, "finish_reason": self.reason}
        if self.row.top_logprobs >= 0:
            choice["logprobs"] = self.logprobs(tokens, offsets)
        return choice

    def body(self, text, done):
        return {"text": text}

    def logprobs(self, tokens, offsets):
        likeliest = []
        for token in tokens:
            likeliest.append({self.name(id): logprob for id, logprob in token.likeliest})
        return {"tokens": [self.name(token.id) for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": likeliest,
                "text_offset": offsets}

    def name(self, id):
        """A token as text; a part of a character as its bytes."""
        return self.tokenizer.decode_bytes([id]).decode(errors="backslashreplace")


class ChatChoice(Choice):
    """One answer of /v1/chat/completions: the same, but what is new stands in the fields of a message."""

    def __init__(self, *args):
        super().__init__(*args)
        self.parts = Parts()

    def body(self, text, done):
        delta = self.parts.push(text, final=done)
        if self.reason == "stop" and self.parts.n_calls:
            self.reason = "tool_calls"
        return {"delta": delta}

    def logprobs(self, tokens, offsets):
        content = []
        for token in tokens:
            likeliest = [self.entry(id, logprob) for id, logprob in token.likeliest]
            content.append({**self.entry(token.id, token.logprob), "top_logprobs": likeliest})
        return {"content": content}

    def entry(self, id, logprob):
        return {"token": self.name(id), "logprob": logprob, "bytes": list(self.tokenizer.decode_bytes([id]))}


# ---------------------------------------------------------------------------- requests, as they come over the wire


# pydantic reads the JSON into these classes, checks types and ranges, and says what is wrong. Its words go to the
# client.


class Wire(BaseModel):
    """A JSON object. Strict about types ("7" is no number); unknown fields are passed over."""
    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, data):
        # clients send null for what they do not set
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}


class StreamOptions(Wire):
    include_usage: bool = False


StopString = Annotated[str, StringConstraints(min_length=1)]  # an empty one would be found at once


class Settings(Wire):
    """What both kinds of completion may say."""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int = Field(None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    temperature: float = Field(None, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    n: int = Field(1, ge=1)
    seed: int = Field(None, ge=-2 ** 63, lt=2 ** 63)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] = []

    @model_validator(mode="before")
    @classmethod
    def nothing_missing(cls, data):
        # settings that are not here may be sent as long as they change nothing: zeros, empty objects
        for name in ("logit_bias", "presence_penalty", "frequency_penalty", "echo", "suffix"):
            if isinstance(data, dict) and data.get(name):
                raise ValueError(f"{name} is not offered here")
        return data


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


class CompletionRequest(Settings):
    prompt: str | list[str]          # no lists of token ids: these could hold control tokens
    logprobs: int = Field(-1, ge=0, le=5)


class ChatRequest(Settings):
    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] = []
    tool_choice: Literal["auto", "none"] = "auto"
    response_format: ResponseFormat = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


def chat_turns(body):
    """The messages of a request as turns of the chat template.

    Tools, and calls of them, are text there: the text that prepare.py makes of those in a data set. What a model
    thought in earlier turns is left out.
    """
    turns = []
    for message in body.messages:
        # a content is a text, or a list of parts that are texts
        text = message.content
        if isinstance(text, list):
            text = "".join(part.text for part in text)
        if message.tool_calls:
            # after what the model said, if it said something
            calls = call_tools([call.model_dump() for call in message.tool_calls])
            text = f"{text}\n{calls}" if text else calls
        # "developer" is a younger name for the same thing
        role = "system" if message.role == "developer" else message.role
        turns.append({"role": role, "content": text})
    if body.tools and body.tool_choice == "auto":
        # the tools on offer stand below the system message
        offer = list_tools([tool.function for tool in body.tools])
        if turns[0]["role"] == "system":
            offer = f"{turns.pop(0)['content']}\n\n{offer}"
        turns.insert(0, {"role": "system", "content": offer})
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
    # half a surrogate pair, from an escape in JSON of a user or of the model, is no UTF-8: it becomes "?"
    return json.dumps(value, ensure_ascii=False).encode(errors="replace")


def event(value):
    """A server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


class Gate:
    """Stands before the application and looks at the headers alone: who is refused here has sent a body for nothing."""

    def __init__(self, app, api_key):
        self.app = app
        self.expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope, receive, send):
        # the page and /health are open to all
        app = self.app
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            refused = self.look_at(scope["method"], Headers(scope=scope))
            if refused:
                app = refused.response()
        await app(scope, receive, send)

    def look_at(self, method, headers):
        given = headers.get("authorization", "").encode("latin-1")  # the bytes, as they came
        # compare_digest takes equally long wherever the first difference is, so nobody can guess letter by letter
        if self.expected and not secrets.compare_digest(given, self.expected):
            return Refused(401, "wrong or missing API key (Authorization: Bearer …)", code="invalid_api_key")
        # a body is read whole into memory, so its length must be known and have a limit
        if "transfer-encoding" in headers:
            return Refused(411, "say the length of the body (Content-Length)")
        if int(headers.get("content-length", 0)) > MAX_BODY:
            return Refused(413, f"a body has at most {MAX_BODY:,} bytes")
        # Any web site can make its visitor's browser send text or a form to this machine, but not JSON.
        if method == "POST" and not headers.get("content-type", "").startswith("application/json"):
            return Refused(415, "send JSON, and the header Content-Type: application/json")


class Job:
    """The choices of one request, and the queue through which the engine's thread hands over their tokens."""

    def __init__(self, kind):
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
        job = Job("chat.completion")
        for row in self.rows(job, body, prompt, body.top_logprobs if body.logprobs else -1):
            job.choices.append(ChatChoice(self.tokenizer, row, stop_strings(body), len(job.choices)))
        return await self.answer(job, body, request)

    async def complete(self, body: CompletionRequest, request: Request):
        texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        self.check(body, len(texts), max(map(n_bytes, texts), default=0))
        job = Job("text_completion")
        for text in texts:
            # the end-of-text token stands before every document, so it opens ours too
            prompt = [self.tokenizer.eot_id] + self.tokenizer.encode(text)
            for row in self.rows(job, body, prompt, body.logprobs):
                choice = Choice(self.tokenizer, row, stop_strings(body), len(job.choices))
                for id in prompt:  # the text goes on, it does not begin: its first space stays
                    choice.decoder.push(id)
                job.choices.append(choice)
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
        message = f"the prompt has {size}, but the model sees {self.engine.room} tokens, answer included"
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
        # answer i draws as row i of generate() would
        for uniforms in draw_uniforms(body.seed, body.n, max_new_tokens).tolist():
            put = job.receiver(len(job.choices))
            yield Row(prompt, max_new_tokens, temperature, body.top_p, uniforms, top_logprobs, put)

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
        return {"id": job.id, "object": job.kind, "created": job.created, "model": self.name}


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
        # of all that pydantic found wrong, the first: {"loc": ("body", "messages", 0, "role"), "msg": …}
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
    address = "http://{}:{}".format(*listener.getsockname()[:2])
    print(f"{cfg.run}: {checkpoint['stage']}, step {checkpoint['step']}, at {address}", file=sys.stderr)
    if cfg.host not in ("127.0.0.1", "localhost", "::1") and not cfg.api_key:
        print("note: whoever reaches this machine can use the model; --api_key=… asks for a key", file=sys.stderr)
    # until Ctrl-C; answers under way then have 3 seconds
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))
    server.run(sockets=[listener])


if __name__ == "__main__":
    run(main, Config, positional="run")
