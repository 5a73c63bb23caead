"""
Records to what a stage learns from: every schema there is, told by the names of a record's fields.

    convert({"question": "月亮是什么？", "answer": "地球的卫星。"}, "sft")
        → [{"role": "user", "content": "月亮是什么？"}, {"role": "assistant", "content": "地球的卫星。"}], notes

text      "…"
sft       messages that end with an answer; "weight": 0 in an answer that is not to be learned
prompts   messages that end with a question
pairs     {"prompt": messages, "answers": [best, …, worst]}

Nothing is left out in silence: the notes say which fields were used, which ignored, and what was cut off. A record that
cannot be used raises Skip with the reason; where it is unclear which field holds what, the reason asks for --fields.
"""
import collections
import dataclasses
import itertools
import json
import re
import unicodedata

from recipes.records import Skip

# The names that fields have in data sets. Of questions all that are there are joined, of answers there can be but one.
SYSTEM = ("system", "system_prompt")
QUESTION = ("instruction", "prompt", "question", "query", "context", "input")
ANSWER = ("output", "answer", "response", "completion", "target")
TURNS = ("messages", "conversations", "conversation", "dialogue")
CHOSEN = ("chosen", "response_chosen", "chosen_messages", "chosen_response")
REJECTED = ("rejected", "reject", "response_rejected", "rejected_messages", "rejected_response")
REASONING = ("reasoning_content", "reasoning", "thinking")
TOOLS = ("tools", "functions")
THUMB = ("label", "kto_tag")
RANKING = ("responses", "ranks", "order", "scores")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
CHAT = {"history", "data", *RANKING, *SYSTEM, *QUESTION, *ANSWER, *TURNS, *CHOSEN, *REJECTED, *REASONING, *TOOLS,
        *THUMB}
TEXT = {"text", "content", "completion", "title", "summary", "sections"}

# The fields of one turn.
SPEAKER = ("role", "from")
CONTENT = ("content", "value", "text")
CALLS = ("tool_calls", "function_call")
WEIGHT = ("weight", "loss", "train", "loss_mask", "trainable", "train_on_turn")
TURN = {*SPEAKER, *CONTENT, *CALLS, *WEIGHT, *REASONING}
ROLES = {
    **dict.fromkeys(("user", "human", "用户", "问", "q"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai", "moss", "助手", "答", "a",
                     "function_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function"), "tool")}

# What the names of files, folders and splits say of what is held out.
TRAIN_WORDS = ("train", "training", "trainset", "训练", "训练集", "训练数据")
VAL_WORDS = ("val", "valid", "validation", "valset", "dev", "devel", "development", "devset", "test", "testing",
             "testset", "eval", "evaluation", "heldout", "holdout", "held", "验证", "验证集", "验证数据", "测试", "测试集",
             "测试数据", "开发集")


class Drop(Skip):
    """Why a record is left out although nothing is wrong with it."""


@dataclasses.dataclass
class Notes:
    """What became of the fields of one record."""
    used: set = dataclasses.field(default_factory=set)
    ignored: dict = dataclasses.field(default_factory=dict)  # name → characters of text in it
    cut: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # what was cut off → how often
    split: str = None  # "train" or "val", where the record asks for one


class Tally:
    """What became of the fields of all records of a file: name → in how many records it was used, or ignored."""

    def __init__(self):
        self.used = collections.Counter()
        self.ignored = collections.Counter()
        self.ignored_characters = collections.Counter()
        self.characters = 0  # of all that is made of the records

    def add(self, notes, characters):
        self.characters += characters
        self.used.update(notes.used)
        for name, n in notes.ignored.items():
            if len(self.ignored) >= 100 and name not in self.ignored:
                name = "(other fields)"  # of records whose names are numbers or words
            self.ignored[name] += 1
            self.ignored_characters[name] += n


def convert(record, kind, fields=()):
    """Return (content, Notes) of a record, or raise Skip.

    fields: [(our name, the name in the record), …] of --fields; all other fields are ignored then.
    """
    if isinstance(record, Skip):
        raise record
    if not isinstance(record, (dict, list, str)):
        raise Skip("wrong type", f"wanted an object with named fields, got {brief(record)}")
    notes = Notes()
    try:
        named = rename(record, fields) if fields else record
        content = CONVERTERS[kind](named, notes)
        if isinstance(record, dict):
            note_split(record, named, fields, notes)
            note_rest(record, notes.used, notes)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as e:
        raise Skip("wrong type", f"{e} in {brief(record)}") from e  # a field holds something unheard of
    if not content:
        raise Skip("empty", brief(record))
    media = [name for name in MEDIA if isinstance(record, dict) and not is_blank(record.get(name))]
    if media and kind != "text" and not fields:
        raise Skip("not text alone", f"the record has {media[0]}, which a model of text cannot see. --fields=… learns "
                   "what it names, without that")
    return content, notes


def note_split(record, named, fields, notes):
    """Note which split the record asks for; and with --fields, which of its fields were used under our names."""
    notes.split = split_of(named.get("split") or record.get("split"))
    if fields:
        notes.used = {theirs.split(".")[0] for ours, theirs in fields if ours in notes.used}
    if notes.split:
        notes.used.add("split")


def split_of(name):
    """The split that is meant by "validation", "train-00001", "cmrc2018_dev" and the like: "train", "val" or None."""
    words = re.findall(r"[a-z]{2,}|[\u4e00-\u9fff]+", str(name).lower())  # of "dev_v2" not the v
    for word in words[:1] + words[-1:]:
        if word in TRAIN_WORDS:
            return "train"
        if word in VAL_WORDS:
            return "val"
    return None


def rename(record, fields):
    """The record under our names. Fields that get one name are joined by a line break."""
    renamed = {}
    for ours, theirs in fields:
        value = record
        for name in [theirs] if theirs in record else theirs.split("."):  # "meta.text" lies inside of meta
            value = value.get(name) if isinstance(value, dict) else None
        if is_empty(value):
            continue
        if ours in renamed:
            value = as_text([renamed[ours], value], theirs, glue="\n")
        renamed[ours] = value
    if not renamed:
        raise Skip("no such field", f"--fields names {', '.join(theirs for _, theirs in fields)}, {there(record)}")
    return renamed


# ---------------------------------------------------------------------------- fields


def is_empty(value):
    """Whether there is nothing in a field. 0 and False are something: answers to sums may be 0. NaN, which is not equal
    to itself, is what pandas writes for nothing."""
    return value is None or value in ("", [], {}) or value != value


def is_blank(value):
    """Whether there is nothing in a field, however deep it is: [None], {"bytes": None, "path": None}, False."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return all(is_blank(part) for part in value)
    return is_empty(value) or value is False


def filled(record, names):
    """Those of the names whose fields are not empty."""
    return [name for name in names if not is_empty(record.get(name))]


def first(record, names):
    """The first of these fields that is not empty, else None."""
    for name in names:
        if not is_empty(record.get(name)):
            return record[name]
    return None


def take(record, notes, *names):
    """first(), and it counts as used."""
    for name in names:
        if not is_empty(record.get(name)):
            notes.used.add(name)
            return record[name]
    return None


def as_text(value, name, glue=""):
    """The text in a field: a string, a number, or a list of parts such as {"type": "text", "text": "…"}."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        return glue.join(as_text(part, name, glue) for part in value)
    if isinstance(value, dict) and str(value.get("type", "text")).endswith("text"):
        for key in ("text", "value", "content"):
            if isinstance(value.get(key), str):
                return value[key]
    what = value.get("type", "fields") if isinstance(value, dict) else type(value).__name__
    raise Skip("wrong type", f"{name} holds {what}, wanted text: {brief(value)}")


def is_parts(value):
    """Whether a list holds the parts of one text, and not turns or several texts."""
    if not isinstance(value, list):
        return False
    return all(isinstance(part, dict) and "type" in part and not filled(part, SPEAKER) for part in value)


def as_list(value, name):
    """The list in a field; in CSV files lists are JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Skip("wrong type", f"{name} holds the text {brief(value)}, wanted a list") from None
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def note_rest(item, known, notes, prefix=""):
    """Note the fields of a record that are ignored, or of a part of it."""
    for key, value in item.items():
        if key not in known and not is_empty(value):
            name = clean(prefix + key)
            notes.ignored[name] = notes.ignored.get(name, 0) + prose(value)  # a conversation has many turns


def prose(value):
    """Characters of text in a field, however deep they lie."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sum(prose(part) for part in value)
    # addresses, numbers and the like are no text: it has spaces, or characters beyond ASCII
    is_text = isinstance(value, str) and (" " in value or not value.isascii())
    return len(value) if is_text else 0


NUMBER = re.compile(r"\s*[+-]?\d+(\.\d+)?\s*")


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def brief(value):
    """How a value begins."""
    try:
        return repr(value)[:60]
    except RecursionError:
        return "a deeply nested value"


def there(record):
    """Which fields there are, for an error message."""
    if isinstance(record, dict):
        names = f"the fields are {', '.join(map(str, record))}"
        for name, value in record.items():
            if isinstance(value, list) and value and isinstance(value[0], dict) and name not in CHAT - {"data"}:
                names += f" (are the records in {name}? Write them out: jq -c '.{name}[]' FILE > FILE.jsonl)"
        return names
    return f"the record is a {'list' if isinstance(record, list) else 'text'}"


# ---------------------------------------------------------------------------- text

LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\ufeff\ufffe\uffff\ud800-\udfff]")
BLANK_LINES = re.compile("\n{3,}")


def clean(text):
    """NFC, line ends as \\n, no control characters, no spaces at line ends, at most one blank line in a row.
    Punctuation stays as it is: full-width forms are how Chinese is written."""
    text = CONTROLS.sub("", LINE_ENDS.sub("\n", text))
    text = "\n".join([line.rstrip() for line in unicodedata.normalize("NFC", text).split("\n")])
    return BLANK_LINES.sub("\n\n", text).strip("\n")


def to_text(record, notes):
    """text | content, after its title | title + summary + sections [{title, content}] (Baidu Baike) | completion"""
    if isinstance(record, str):
        return clean(record)
    if isinstance(record, list):
        raise Skip("no text field", there(record))
    parts = [take(record, notes, "text")]
    if parts[0] is None:
        is_article = not (is_empty(record.get("title")) and is_empty(record.get("sections")))
        parts = [take(record, notes, "content", *["summary"] * is_article)]
        for section in as_list(take(record, notes, "sections"), "sections"):
            if not isinstance(section, dict):
                raise Skip("wrong type", f"sections holds {brief(section)}, wanted objects with title and content")
            parts += [take(section, notes, "title"), take(section, notes, "content")]
            note_rest(section, ("title", "content"), notes, "sections.")
        if any(parts):
            parts.insert(0, take(record, notes, "title"))
    if not any(parts) and not any(name in record for name in QUESTION):
        parts = [take(record, notes, "completion")]
    if not any(parts):
        if {"text", "content"} & set(record):
            raise Skip("empty", f"{brief(record)}")
        texts = {name: value for name, value in record.items() if isinstance(value, (str, list))}
        longest = max(texts, key=lambda name: (prose(texts[name]), len(texts[name])), default="…")
        raise Skip("no text field", f"{there(record)}; wanted text or content. --fields=text:{longest} learns "
                   f"{longest}")
    for part in parts:
        if not (part is None or isinstance(part, (str, list))):
            raise Skip("wrong type", f"wanted text, got {brief(part)}")
    return clean("\n".join(as_text(part, "text", glue="\n") for part in parts if part))


# ---------------------------------------------------------------------------- messages

# Those who speak in a transcript are of one of these groups: "A:" between "Human:" and "Assistant:" is a part of what
# they say, and "B:" after "Q:" and "A:" a choice.
SPEAKERS = ("Human|User|用户|Assistant|Bot|GPT|AI|助手", "Q|A|B", "问|答", "Instruction|Response")
TRANSCRIPTS = [re.compile(rf"(?:^|\n|###)[ \t]*<?({names})>?[ \t]*[:：]", re.IGNORECASE) for names in SPEAKERS]
SYSTEM_FIRST = re.compile(r"\s*(?:###)?[ \t]*<?System>?[ \t]*[:：]", re.IGNORECASE)


def message(role, text, weight=1):
    """One message as render_chat() takes it. weight 0: an answer that is not learned."""
    made = {"role": role, "content": clean(text).strip()}
    if weight == 0:
        made["weight"] = 0
    return made


def said(text, role, is_whole=False, has_answer=False):
    """Messages of a text: one, or those of a transcript, "Human: … Assistant: …".

    is_whole: the text is all there is, so it may end with an answer. has_answer: an answer stands beside it, so it may
    not: then it is a question that quotes a dialogue.
    """
    for number, transcript in enumerate(TRANSCRIPTS):
        # split() gives what comes before the first speaker, a speaker, the words, a speaker, the words, …
        before, *parts = transcript.split(text)
        system = SYSTEM_FIRST.match(before)
        speakers = [speaker_of(name.lower()) for name in parts[::2]]
        if before.strip() and not system or speakers[:1] != ["user"] or "assistant" not in speakers:
            continue
        messages = [message(speaker, words) for speaker, words in zip(speakers, parts[1::2])]
        if not messages[-1]["content"]:
            messages.pop()  # "Assistant:" at the end asks for the answer
        ends_with_answer = messages[-1]["role"] == "assistant"
        if ends_with_answer and (has_answer or number and not is_whole):
            continue
        # "Q:" and the like stand in many texts: only if they strictly take turns is it a transcript
        if number and (set(speakers[::2]) != {"user"} or set(speakers[1::2]) != {"assistant"}):
            continue
        if system:
            messages.insert(0, message("system", before[system.end():]))
        return messages
    return [message(role, text)]


def read_turns(value, name, notes, role=None):
    """Messages of a field that holds turns: a list, a single turn, a transcript, or JSON text of these.

    A turn is {role|from, content|value|text}; {human: …, assistant: …}; a pair [question, answer]; or a text: texts in
    a list are said in turns, the user begins. role: who says what does not tell.
    """
    if isinstance(value, str) and not value.lstrip().startswith(("[", "{")):
        return said(value, role or "user", is_whole=role is None)
    messages = []
    for turn in as_list(value, name):
        if isinstance(turn, dict):
            messages += read_turn(turn, name, notes, role)
            continue
        for text in turn if isinstance(turn, list) else [turn]:
            asked = messages and messages[-1]["role"] == "user"
            messages.append(message("assistant" if asked else "user", as_text(text, name)))
    return messages


def read_turn(turn, name, notes, role=None):
    """Messages of a turn that is a dict, as a rule one."""
    speaker = turn.get("role") or turn.get("from") or role
    if speaker is None:
        # {human: …, assistant: …}
        speakers = {key: speaker_of(key) for key in filled(turn, turn) if speaker_of(key)}
        if speakers:
            note_rest(turn, speakers, notes, f"{name}.")
            return [message(speaker, as_text(turn[key], name)) for key, speaker in speakers.items()]
    role = ROLES.get(str(speaker).lower())
    if role is None:
        raise Skip("unknown role", f"{speaker!r} in {name}, {there(turn)}; wanted one of {', '.join(ROLES)}")
    content = first(turn, CONTENT)
    if not {*CONTENT, *CALLS, *REASONING} & set(turn):
        raise Skip("wrong type", f"{name} holds a turn without words, {there(turn)}; wanted {', '.join(CONTENT)}")
    if speaker == "function_call":
        content = call_tools(content)
    elif role == "tool" and isinstance(content, (dict, list)):
        content = content if is_parts(content) else as_json(content)
    # what a model thinks, says and calls are one text to learn, in this order
    parts = [think(first(turn, REASONING)), as_text(content, name)]
    parts += [call_tools(turn[key]) for key in filled(turn, CALLS)]
    text = "\n".join(part for part in parts if part)
    # there are answers to learn and answers to read, nothing between
    weights = [key for key in WEIGHT if str(turn.get(key)).lower() in ("1", "1.0", "true", "0", "0.0", "false")]
    is_learned = all(str(turn[key]).lower() in ("1", "1.0", "true") for key in weights)
    used = {*SPEAKER, *CALLS, *weights, *filled(turn, CONTENT)[:1], *filled(turn, REASONING)[:1]}
    note_rest(turn, used, notes, f"{name}.")
    return [message(role, text, weight=int(is_learned))]


def speaker_of(key):
    """Who says what a field of this name holds, or stands behind it: "user", "assistant", … or None."""
    if key in QUESTION:
        return "user"
    if key in ANSWER:
        return "assistant"
    return ROLES.get(key.lower())


def think(reasoning):
    """What a model thinks before it answers, as the text it writes; "" where it does not."""
    return f"<think>\n{as_text(reasoning, 'reasoning').strip()}\n</think>\n" if reasoning else ""


def as_json(value):
    return json.dumps(value, ensure_ascii=False)


def from_json(value):
    """The value that a text stands for as JSON, or the text itself."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def call_tools(calls):
    """Calls of tools as the text a model writes, each as <tool_call>, JSON, </tool_call> on three lines."""
    calls = from_json(calls)
    lines = []
    for call in calls if isinstance(calls, list) else [calls]:
        if isinstance(call, dict):
            call = call.get("function", call)
        if isinstance(call, dict) and "name" in call:
            call = as_json({"name": call["name"], "arguments": from_json(call.get("arguments", {}))})
        lines += ["<tool_call>", call if isinstance(call, str) else as_json(call), "</tool_call>"]
    return "\n".join(lines)


def list_tools(tools):
    """The tools a model may call, as text for the system message: one JSON a line."""
    tools = from_json(tools)
    lines = []
    for tool in tools if isinstance(tools, list) else [tools]:
        if isinstance(tool, dict):
            tool = tool.get("function", tool)  # {"type": "function", "function": …} says no more than what is in it
        lines.append(tool if isinstance(tool, str) else as_json(tool))
    return "\n".join(["<tools>", *lines, "</tools>"])


def until_answer(messages):
    """Without the turns after the last answer: there is nothing to learn from them."""
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    return messages


# ---------------------------------------------------------------------------- conversations


def to_prompt(record, notes):
    """What comes before the answer: system, tools, history, and turns or a question."""
    if isinstance(record, str):
        record = {"prompt": record}
    if isinstance(record, list):
        record = {"messages": record}
    messages = []
    system = take(record, notes, *SYSTEM)
    if system is not None:
        messages.append(message("system", as_text(system, "system")))
    messages += read_turns(take(record, notes, "history"), "history", notes)
    turns = take(record, notes, *TURNS)
    if turns is None and not any(name in record for name in QUESTION):
        turns = take(record, notes, "data")
    if turns is not None:
        messages += read_turns(turns, "messages", notes)
    else:
        messages += read_question(record, notes)
    tools = take(record, notes, *TOOLS)
    if tools is not None:
        if not messages or messages[0]["role"] != "system":
            messages.insert(0, message("system", ""))
        messages[0] = message("system", messages[0]["content"] + "\n\n" + list_tools(tools))
    return messages


def read_question(record, notes):
    """The question: all fields that are part of it, in the order of QUESTION; or a whole transcript in `text`."""
    messages = []
    texts = []
    for name in QUESTION:
        value = take(record, notes, name)
        is_texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
        if is_texts and len(filled(record, QUESTION)) > 1:
            value = "\n".join(value)  # passages beside a question, not turns
        if isinstance(value, (list, dict)):
            messages += read_turns(value, name, notes)
        elif value is not None and as_text(value, name) not in texts:
            texts.append(as_text(value, name))
    if texts:
        messages += said("\n".join(texts), "user", has_answer=bool(filled(record, ANSWER)))
    elif not messages and any(transcript.search(str(record.get("text"))) for transcript in TRANSCRIPTS):
        messages = said(as_text(take(record, notes, "text"), "text"), "user", is_whole=True)
    return messages


def read_answer(record, notes):
    """The answer to the question: the one field of ANSWER that is there."""
    names = filled(record, ANSWER)
    if not names:
        return []
    value = take(record, notes, *names)
    for name in names:
        notes.used.add(name)
        if record[name] != value:
            raise Skip("two answers", f"{' and '.join(names)} differ: --fields=question:…,answer:{name} learns {name}")
    if isinstance(value, dict) and isinstance(first(value, CONTENT), list):
        value = first(value, CONTENT)  # SQuAD: {"text": [several], "answer_start": […]}
    if is_parts(value):
        value = as_text(value, names[0])
    if isinstance(value, list) and all(is_answer(answer) for answer in value):
        if len(value) > 1:
            raise Skip("several answers", f"{names[0]} holds {len(value)}, best first? Then --kind=pairs ranks them")
        value = value[0]
    if isinstance(value, (list, dict)):
        return read_turns(value, names[0], notes, "assistant")
    parts = [think(take(record, notes, *REASONING)), as_text(value, names[0])]
    return [message("assistant", "\n".join(part for part in parts if part))]


def is_answer(value):
    """Whether an entry of a list is an answer by itself, and not a turn of one."""
    return isinstance(value, str) or isinstance(value, dict) and not filled(value, SPEAKER)


def is_thumbs_down(record, notes):
    """Whether a record says of its one answer that it is bad: label false. 0 means this beside a completion alone;
    other records have classes of that name."""
    bad = ("false", "0", "0.0", "-1") if "completion" in record else ("false",)
    good = ("true", "1", "1.0") if "completion" in record else ("true",)
    for name in filled(record, THUMB):
        word = str(record[name]).lower()
        if word in good + bad:
            notes.used.add(name)
            return word in bad
    return False


def to_conversation(record, notes):
    """A conversation that ends with an answer."""
    messages = to_prompt(record, notes)
    if isinstance(record, dict):
        if is_thumbs_down(record, notes):
            raise Drop("thumbs down")
        if not messages or messages[-1]["role"] != "assistant":
            messages += read_answer(record, notes)
        elif not filled(record, (*TURNS, "data")):
            for another in read_answer(record, notes):
                if another not in messages:
                    raise Skip("two answers", "the question ends with an answer, and there is another: "
                               f"{brief(another['content'])}")
    messages = [m for m in messages if m["content"] or m["role"] != "system"]
    # after an empty turn nobody knows who says what, and after the last answer there is nothing to learn
    before_empty = list(itertools.takewhile(lambda m: m["content"] or m["role"] == "tool", messages))
    if len(before_empty) < len(messages):
        notes.cut["turns from an empty one on"] += 1
    whole = until_answer(before_empty)
    if len(whole) < len(before_empty):
        notes.cut["a question without an answer"] += 1
    if any(m["role"] == "user" for m in whole):
        if all(m.get("weight") == 0 for m in whole if m["role"] == "assistant"):
            raise Drop("no answer to learn")
        return whole
    # there is nothing to learn: is that for lack of words, or are the fields unknown?
    names = set(TURNS) if isinstance(record, list) else set(record) if isinstance(record, dict) else set()
    is_known = names & {"data", *TURNS} or names & set(QUESTION) and names & set(ANSWER)
    if messages and is_known:
        raise Skip("empty", "no question with an answer")
    reason = "no answer" if messages else "no question and answer"
    raise Skip(reason, f"{there(record)}; wanted messages, or a question ({', '.join(QUESTION)}) and an answer "
               f"({', '.join(ANSWER)}). --fields=question:…,answer:… says which is which")


def to_question(record, notes):
    """For PPO: a conversation up to its last question."""
    messages = [m for m in to_prompt(record, notes) if m["content"]]
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise Skip("no question", f"{there(record)}; wanted messages, or one of {', '.join(QUESTION)}: "
                   "--fields=question:… says which is the question")
    return messages


# ---------------------------------------------------------------------------- ranked answers


def read_ranks(record, notes):
    """The answers to one question and their ranks, the lowest is the best: responses (or a list of answers) with ranks,
    scores or an order (their indices, best first); one chosen and one or more rejected; a list of answers, best
    first."""
    several = ["responses"]
    if filled(record, RANKING[1:]):
        several += [name for name in ANSWER if isinstance(record.get(name), list)]
    answers = take(record, notes, *several)
    if answers is not None:
        answers = as_list(answers, "responses")
        ranks = as_list(take(record, notes, "ranks"), "ranks")
        scores = as_list(take(record, notes, "scores"), "scores")
        if not ranks and all(is_number(score) for score in scores):
            ranks = [-score for score in scores]  # the highest is the best
        if not ranks:
            order = as_list(take(record, notes, "order"), "order")
            ranks = [order.index(i) if i in order else None for i in range(len(answers))]
        if not answers or len(ranks) != len(answers) or not all(map(is_number, ranks)):
            raise Skip("no ranking", f"{len(answers)} responses; wanted as many numbers in ranks (lowest best), scores "
                       f"(highest best) or order (their places, best first): {there(record)}")
        return answers, ranks
    chosen = take(record, notes, *CHOSEN)
    rejected = take(record, notes, *REJECTED)
    if chosen is not None and rejected is not None:
        lists = [name for name in ("responses", *ANSWER) if isinstance(record.get(name), list)]
        if is_number(chosen) and is_number(rejected) and lists:
            raise Skip("no ranking", f"are chosen {chosen} and rejected {rejected} places in {lists[0]}? Write the "
                       "texts themselves there")
        several = isinstance(rejected, list) and all(isinstance(answer, str) for answer in rejected)
        rejected = rejected if several else [rejected]
        if isinstance(chosen, list) and len(chosen) == 1:
            chosen = chosen[0]
        return [chosen, *rejected], [0] + [1] * len(rejected)
    answers = take(record, notes, *ANSWER)
    if isinstance(answers, list) and len(answers) > 1:
        check_best_first(answers, record)
        return answers, list(range(len(answers)))
    hint = "; thumbs up or down of one answer: --kind=sft learns the good ones" if filled(record, THUMB) else ""
    raise Skip("no ranked answers", f"{there(record)}; wanted chosen and rejected, responses and ranks, or a list of "
               f"answers{hint}. --fields=chosen:…,rejected:… says which is which")


def is_rank(value):
    """Whether a value may rank an answer: a number, also as a text, or whether it is the best."""
    if isinstance(value, str):
        return bool(NUMBER.fullmatch(value))
    return isinstance(value, bool) or is_number(value)


def check_best_first(answers, record):
    """Raise Skip where numbers stand beside a list of answers, or in each of them: then its order may mean nothing."""
    for answer in answers:
        for name in ("rank", "score", "rating", "reward", "label"):
            if isinstance(answer, dict) and is_rank(answer.get(name)):
                raise Skip("no ranking", f"does the {name} in each answer rank them? Write them as responses: [texts] "
                           "with ranks: [numbers] (lowest best) or scores: [numbers] (highest best)")
    for name, values in record.items():
        is_other = isinstance(values, list) and values is not answers
        if is_other and len(values) == len(answers) and all(is_rank(value) for value in values):
            raise Skip("no ranking", f"does {name} rank the answers? --fields=prompt:…,responses:…,ranks:{name} (lowest"
                       f" best) or scores:{name} (highest best); --fields=prompt:…,answer:… takes them as best first")


def to_ranking(record, notes):
    """A question and its answers: {"prompt": messages, "answers": [best, …, worst]}."""
    if not isinstance(record, dict):
        raise Skip("no ranked answers", there(record))
    prompt = to_prompt(record, notes)
    system = [m for m in prompt if m["role"] == "system"]
    answers, ranks = read_ranks(record, notes)
    # answers that are the whole text from its beginning, after a prompt that asks for them: "…### Response:"
    begin = record.get("prompt")
    is_begin = isinstance(begin, str) and begin.rstrip().endswith((":", "："))
    is_begin = is_begin and all(isinstance(answer, str) and answer.startswith(begin) for answer in answers)
    whole = []  # every answer at the end of its conversation, the best first
    by_rank = sorted(range(len(answers)), key=lambda i: ranks[i])
    for i in by_rank:
        if isinstance(answers[i], (list, dict)):
            turns = read_turns(answers[i], "answers", notes, "assistant")
        else:
            text = as_text(answers[i], "answers")
            turns = said(text.removeprefix(begin) if is_begin else text, "assistant", is_whole=not prompt)
        if turns and turns[0]["role"] == "assistant":
            turns = prompt + turns
        elif turns and turns[0]["role"] != "system":
            turns = system + turns  # the answer comes with the whole conversation
        whole.append(turns)
    if not all(turns and all(m["content"] for m in turns) for turns in whole):
        raise Skip("empty", "a question or an answer has no words")
    prompts = [turns[:-1] for turns in whole]
    if any(turns[:-1] != prompts[0] or turns[-1]["role"] != "assistant" for turns in whole):
        raise Skip("answers to different prompts")
    if not prompts[0]:
        raise Skip("empty", "no question")
    # "Best first" cannot say "equally good": of answers with one rank, or with the same words, the first stays.
    kept = []
    seen = set()
    for i, turns in zip(by_rank, whole):
        words = turns[-1]["content"]
        if ranks[i] not in seen and words not in seen:
            kept.append(words)
        seen |= {ranks[i], words}
    if len(kept) < len(whole):
        notes.cut["tied or equal answers"] += len(whole) - len(kept)
    return {"prompt": prompts[0], "answers": kept}


def words(content):
    """All text in what convert() returns."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return words(content["prompt"]) + "".join(content["answers"])
    return "".join(message["content"] for message in content)


CONVERTERS = {"text": to_text, "sft": to_conversation, "pairs": to_ranking, "prompts": to_question}


def are_records(value):
    """Whether a list holds whole records, not the turns of one conversation."""
    names = {*QUESTION, *ANSWER, *TURNS, *CHOSEN, "text", "content"}
    if not value or not isinstance(value, list):
        return False
    return all(isinstance(item, dict) and names & set(item) and not filled(item, SPEAKER) for item in value)


def unfold(record, kind):
    """The records that are kept in one: a list of documents (WuDao) or of records, also under data; or {instruction,
    instances: [{input, output}]}."""
    if isinstance(record, dict) and are_records(record.get("data")) and not set(record) & (CHAT | TEXT) - {"data"}:
        shared = {name: value for name, value in record.items() if name != "data"}
        # what stands beside them is theirs, but a text is counted once, with the first
        marks = {name: value for name, value in shared.items() if name == "split" or not prose(value)}
        record = [{**(marks if i else shared), **one} for i, one in enumerate(record["data"])]
    if isinstance(record, list) and (kind == "text" or are_records(record)):
        yield from record
    elif isinstance(record, dict) and isinstance(record.get("instances"), list):
        shared = {name: value for name, value in record.items() if name != "instances"}
        for instance in record["instances"]:
            yield {**shared, **instance} if isinstance(instance, dict) else instance
    else:
        yield record
