"""
Records to conversations that end with an answer (SFT), or with a question (PPO).
"""
import itertools

from readers.account import Drop, Skip
from readers.calls import list_tools
from readers.fields import ANSWER, CONTENT, QUESTION, REASONING, SPEAKER, SYSTEM, THUMB, TOOLS, TURNS
from readers.fields import as_text, brief, filled, first, is_parts, take, there
from readers.turns import TRANSCRIPTS, message, read_turns, said, think


def until_answer(messages):
    """Without the turns after the last answer: there is nothing to learn from them."""
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    return messages


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
