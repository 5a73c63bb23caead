"""
The requests of tools/serve.py, as they come over the wire.

pydantic reads the JSON into these classes, checks types and ranges, and says what is wrong. Its words go to the client.
A setting that nobody here reads is refused where it would change the answer; of other fields nobody knows, the answer
says that they were ignored.
"""
from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from readers.calls import call_tools, list_tools

# what clients send besides, and what is true of every answer here
HARMLESS = {
    "model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "cache_prompt", "keep_alive", "id_slot", "timings_per_token", "return_progress",
    "include_reasoning", "session_id", "chat_id"}
# the same of a message
HARMLESS_IN_MESSAGES = {"annotations", "id", "reasoning", "reasoning_content", "tool_call_id"}
# fields by which other servers change an answer, though their values are texts or objects
CONSTRAINTS = {
    "logit_bias", "suffix", "grammar", "json_schema", "structured_outputs", "structural_tag", "regex", "ebnf", "format",
    "functions", "function_call", "prediction", "chat_template", "audio", "thinking", "system", "instructions",
    "prompt", "input", "stop_sequence"}
# values of settings elsewhere that change nothing
NEUTRAL = {"typical_p": 1, "tfs_z": 1, "best_of": 1, "length_penalty": 1, "num_beams": 1, "do_sample": True,
           "add_generation_prompt": True, "skip_special_tokens": True, "add_special_tokens": True,
           "modalities": ["text"], "parallel_tool_calls": True}
# what -1 says of each, elsewhere: no limit, another draw each time
MINUS_ONE = {"max_tokens": 2 ** 62, "max_completion_tokens": 2 ** 62, "top_k": 0, "seed": None}


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


def unread(data):
    """Names of the fields of a Wire that say something and that nobody here reads; "think": false says something."""
    said = {name for name, value in data.model_extra.items() if value or value is False and "think" in name}
    return said - HARMLESS - NEUTRAL.keys()


class StreamOptions(Wire):
    model_config = ConfigDict(strict=True, extra="allow")
    include_usage: bool = False


class ResponseFormat(Wire):
    type: Literal["text"]


StopString = Annotated[str, StringConstraints(min_length=1)]  # an empty one would be found at once


class Settings(Wire):
    """What both kinds of completion may say."""
    model_config = ConfigDict(strict=True, extra="allow")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int = Field(None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    temperature: float = Field(None, ge=0, le=2)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, ge=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(
        1.0, gt=0, le=100, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty"))
    n: int = Field(1, ge=1)
    seed: int = Field(None, ge=-2 ** 63, lt=2 ** 63)
    stop: StopString | Annotated[list[StopString], Field(max_length=64)] = []
    response_format: ResponseFormat = None

    @model_validator(mode="before")
    @classmethod
    def heard(cls, data):
        """Refuse settings that nobody here reads and that would change the answer."""
        if not isinstance(data, dict):
            return data
        known = {*cls.model_fields, "max_completion_tokens", "repeat_penalty"}
        for name in sorted(data.keys() - known - HARMLESS):
            if is_setting(name, data[name], known):
                raise ValueError(f"{name}={data[name]!r:.40} is not offered here; what is: {', '.join(sorted(known))}")
        return {**data, **{name: value for name, value in MINUS_ONE.items() if is_minus_one(data.get(name))}}

    def ignored(self):
        """What the answer names as ignored."""
        return sorted(unread(self) | {f"stream_options.{name}" for name in unread(self.stream_options)})


def is_setting(name, value, known):
    """Whether an unknown field may be meant to change the answer: a number, a yes, a list, one known to, or what holds
    a setting, {"options": {"top_k": 1}}. Names and notes of the client's own pass."""
    if name in NEUTRAL:
        return value is not None and value != NEUTRAL[name]
    names = {name, *value} if isinstance(value, dict) else {name}
    if known & {str(inside).lower() for inside in names}:
        return True
    if not value:
        return False
    return isinstance(value, (bool, int, float, list)) or name in CONSTRAINTS or name.startswith("guided_")


def is_minus_one(value):
    return value == -1 and type(value) is int


class TextPart(Wire):
    type: Literal["text"]
    text: str


class ToolCall(Wire):
    function: dict


class Message(Wire):
    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    tool_calls: list[ToolCall] = []

    @model_validator(mode="before")
    @classmethod
    def whole(cls, data):
        """Refuse what belongs to a message elsewhere and would be lost here: images, function_call, prefix; and a
        message that says nothing: its text may stand under another name."""
        if isinstance(data, dict):
            role = data.get("role")
            if role in ("system", "developer", "user") and data.get("content") is None:
                raise ValueError(f"a message of the {role} needs a content")
            for name in sorted(data.keys() - cls.model_fields.keys() - {"annotations"}):
                if data[name] and isinstance(data[name], (bool, list, dict)):
                    raise ValueError(f"a message with {name} is not offered here; what is: role, content, tool_calls")
        return data


class Tool(Wire):
    type: Literal["function"]
    function: dict


class CompletionRequest(Settings):
    prompt: str | list[str]          # no lists of token ids: these could hold control tokens
    logprobs: int = Field(-1, ge=0, le=5)


class ChatRequest(Settings):
    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] = []
    tool_choice: Literal["auto", "none"] = "auto"
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @model_validator(mode="after")
    def together(self):
        """Refuse what the other settings leave no place for."""
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs={self.top_logprobs} shows nothing without logprobs=true")
        if not self.parallel_tool_calls and self.tools and self.tool_choice == "auto":
            raise ValueError("parallel_tool_calls=false is not offered here: an answer may call several tools")
        return self

    def ignored(self):
        names = {name for message in self.messages for name in unread(message) - HARMLESS_IN_MESSAGES}
        return sorted({*super().ignored(), *(f"messages.{name}" for name in names)})


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
            offer = f"{turns.pop(0)['content']}\n\n{offer}".lstrip()
        turns.insert(0, {"role": "system", "content": offer})
    return turns
