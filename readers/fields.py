"""
The fields of a record: the names they have in data sets, and what a value holds.
"""
import re

from common.documents import clean
from readers.account import Skip
from readers.calls import from_json


# The names that fields have in data sets. Of questions all that are there are joined, of answers there can be but one.
SYSTEM = ("system", "system_prompt", "meta_instruction")
QUESTION = ("instruction", "prompt", "question", "query", "context", "input")
ANSWER = ("output", "answer", "response", "completion", "target")
TURNS = ("messages", "conversations", "conversation", "dialogue", "chat")
CHOSEN = ("chosen", "response_chosen", "chosen_messages", "chosen_response", "pos_resp")
REJECTED = ("rejected", "reject", "response_rejected", "rejected_messages", "rejected_response", "neg_resp")
CHOICES = ("choices", "options", "choice", "option")  # of an exam, or fields A, B, C, D
LETTERS = "ABCDEFGHIJ"
CHOICE = re.compile(r"(?:option|choice|opt|op|选项)?[ _]?([a-j])", re.IGNORECASE)  # option_a, optionA, opa, 选项A
NOTHING = {"nan", "none", "null", "noinput", "no input", "n/a", "\\n", "无输入"}  # what programs write for nothing
REASONING = ("reasoning_content", "reasoning", "thinking")
TOOLS = ("tools", "functions")
THUMB = ("label", "kto_tag")
RANKING = ("responses", "ranks", "order", "scores")
NAN = ("nan", "NaN", "\\N")  # those of them that are no answer
MEDIA = re.compile("(^|_)(image|img|picture|photo|pixel|video|audio|wav)s?"
                   "(_?(path|file|url|id|name|bytes|base64|values))?s?$", re.IGNORECASE)
CHAT = {"history", "data", "answers", *RANKING, *SYSTEM, *QUESTION, *ANSWER, *TURNS, *CHOSEN, *REJECTED, *REASONING,
        *TOOLS, *THUMB, *CHOICES, *LETTERS}
TEXT = {"text", "content", "completion", "title", "summary", "sections"}
KNOWN = CHAT | TEXT | {"split"}

# The fields of one turn.
SPEAKER = ("role", "from")
CONTENT = ("content", "value", "text")
CALLS = ("tool_calls", "tool_call", "function_call")
WEIGHT = ("weight", "loss", "loss_weight", "loss_scale", "loss_mask", "train", "trainable", "train_on_turn")
TURN = {*SPEAKER, *CONTENT, *CALLS, *WEIGHT, *REASONING}
ROLES = {
    **dict.fromkeys(("user", "human", "用户", "问", "q"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai", "moss", "助手", "答", "a",
                     "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "function response"), "tool")}


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


def says_nothing(value):
    """Whether a value is what programs write for nothing: nan, None, <noinput>, \\N."""
    return isinstance(value, str) and value.strip("<>()（）.。 ").lower() in NOTHING


def check_media(item, what):
    """Raise Skip where pictures, films or sounds belong to the words."""
    for name, value in item.items():
        if MEDIA.search(str(name)) and not is_blank(value) and not is_number(value) and value is not True:
            raise Skip("not text alone", f"the {what} has {name}, which a model of text cannot see. --fields=… learns "
                       "what it names, without that")


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
                more = [other for other in value if other not in (key, "type") and prose(value[other])]
                if more:
                    raise Skip("wrong type", f"{name} holds a part with {key} and {', '.join(more)}: which is the "
                               "text?")
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
        text = value
        value = from_json(text)
        if value is text:
            raise Skip("wrong type", f"{name} holds the text {brief(value)}, wanted a list")
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def note_rest(item, known, notes, prefix=""):
    """Note the fields of a record that are ignored, or of a part of it."""
    for key, value in item.items():
        if key not in known and not is_empty(value):
            name = clean(prefix + key)
            notes.ignored[name] = notes.ignored.get(name, 0) + prose(value)  # a conversation has many turns


# Numbers that count or tell apart, and flags that say nothing of the answer.
COUNTERS = re.compile("(^|[_.])(id|idx|index|no|num|number|turn|round|step|time|timestamp|date|tokens|length|len|count|"
                      "seed|temperature|offset|start|end|page|level|lang|language|country|distance|is_classification|"
                      r"human_verified|is_code_related|column \d+|unnamed: \d+|index_level_\d+__)s?$|"  # pandas
                      r"(^|[.])[a-z]id$|(?-i:[a-z]Id)$", re.IGNORECASE)
NO = {"0", "0.0", "false"}
YES = {"1", "1.0", "true"}
NO_WORDS = {"no", "off", "bad", "wrong", "incorrect", "rejected", "failed", "dislike", "thumbs_down", "thumbs down",
            "差", "错", "否", "错误", "不好", "不合格"}
NEGATIVE = re.compile("mask|ignore|skip|exclude|bad|delete|wrong|invalid|flip|swap|revers|toxic|redact|refus|spam",
                      re.IGNORECASE)


def check_marks(item, known, ours):
    """Raise Skip where an unknown field says 0, false or "bad" beside an answer, or true where its name is a "no", or a
    list of these for the turns: is the answer not to be learned?"""
    marks = {name: value for name, value in item.items() if name not in known and not COUNTERS.search(name)}
    for name, value in item.items():
        if isinstance(value, dict):
            marks.update((f"{name}.{inner}", value[inner]) for inner in filled(value, WEIGHT))  # {"metadata": {…}}
    for name, value in marks.items():
        words = {str(part).lower() for part in (value if isinstance(value, list) else [value])}
        is_negative = NEGATIVE.search(name)
        is_yes = is_negative and words & YES
        is_no = words & NO and (not is_negative or "mask" in name)  # a mask of 0 may hide, or not
        if words & {*NO_WORDS, "-1"} or (is_no or is_yes) and words <= NO | YES:
            hint = f"rename it {ours} (0: not learned), or take it out"
            if ours == "label":
                named = ",".join(f"{field}:{field}" for field in filled(item, item) if field in KNOWN - {*THUMB})
                hint = f"--fields={named},label:{name} leaves out those where it is {value!r}"
                hint = "take those out" if is_yes else hint
                hint = "write each into its turn, as weight" if isinstance(value, list) else hint
                hint += f"; --fields={named} learns them all"
            raise Skip("unclear mark", f"{name} is {value!r} beside an answer: is that not to be learned? {hint}")


def prose(value):
    """Characters of text in a field, however deep they lie."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sum(prose(part) for part in value)
    # addresses, dates, numbers and the like are no text: it has letters, and spaces or characters beyond ASCII
    is_text = isinstance(value, str) and (" " in value or not value.isascii()) and any(map(str.isalpha, value))
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
            if isinstance(value, list) and value and isinstance(value[0], dict):
                # wherever they lie, with what stands beside them
                place = f".[\"{name}\"]"
                names += (f" (are the records in {name}? Write them out: jq -c '..|objects|select({place}|arrays)|"
                          f"del({place})+{place}[]' FILE > FILE.jsonl)")
        return names
    return f"the record is a {'list' if isinstance(record, list) else 'text'}"
