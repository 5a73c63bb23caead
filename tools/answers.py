"""
From the tokens of a row to what a client of tools/serve.py may see: whole characters, no stop string, and in a chat the
reasoning and the calls of tools told from the words.
"""
import json
import re
import uuid

from readers.calls import ARGUMENTS
from tokenizer import StreamDecoder
from tools.engine import Token


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
        # the model may write anything: broken JSON, a list, a number for the name, arguments by another name
        try:
            call = json.loads(text)
            name = call["name"]
            arguments = next((call[key] for key in ARGUMENTS if key in call), {})
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
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
    is_start = False                 # it goes on with the prompt, so the space before its first word stays

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
        self.decoder = StreamDecoder(tokenizer, skip_special=True, is_start=self.is_start)

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
    is_start = True

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
