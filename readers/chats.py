"""
Records to conversations that end with an answer (SFT), or with a question (PPO).
"""
import itertools
import re

from readers.account import Drop, Skip
from readers.calls import DESCRIBED, are_objects, from_json, list_tools
from readers.fields import ANSWER, CHOICE, CHOICES, CHOSEN, CONTENT, KNOWN, LETTERS, NAN, NO, NO_WORDS, QUESTION
from readers.fields import REASONING, SPEAKER, SYSTEM, THUMB, TOOLS, TURNS, YES, as_list, as_text, brief, check_marks
from readers.fields import filled, first, is_number, is_parts, note_rest, says_nothing, take, there
from readers.turns import TRANSCRIPTS, message, read_turns, said, think, turns_of, without_names


# What stands before an answer in a text that holds it, too.
GIVEN = re.compile(r"((答|输出|回复|Response|Answer|Output|Assistant)[^\n:：]{0,8}[:：]|(答案|answer) ?(是|为|is)|故选|####)\s*"
                   "$", re.IGNORECASE)


def until_answer(messages):
    """Without the turns after the last answer: there is nothing to learn from them."""
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    return messages


def to_prompt(record, notes):
    """What comes before the answer: system, tools, history, and turns or a question."""
    if isinstance(record, str):
        is_dialogue = any(transcript.search(record) for transcript in TRANSCRIPTS)
        record = {"text" if is_dialogue else "prompt": record}
    if isinstance(record, list):
        if record and all(isinstance(name, str) and name.lower() in KNOWN for name in record):
            raise Drop("a row of names")  # the head of a table
        record = {"messages": record}
    messages = []
    systems = dict.fromkeys(as_text(take(record, notes, name), name) for name in filled(record, SYSTEM)
                            if not says_nothing(record[name]))
    if systems:
        messages.append(message("system", "\n".join(systems)))
    messages += read_turns(take(record, notes, "history"), "history", notes)
    turns = take(record, notes, *TURNS)
    if turns is None and not any(name in record for name in QUESTION):
        turns = take(record, notes, "data")
    if turns is not None:
        messages += [m for m in read_turns(turns, "messages", notes) if m["role"] != "system" or m not in messages]
    else:
        messages += read_question(record, notes)
    others = [name for name in record if name not in KNOWN and are_objects(record[name], DESCRIBED)]
    tools = take(record, notes, *TOOLS, *others)
    if tools is not None:
        if not messages or messages[0]["role"] != "system":
            messages.insert(0, message("system", ""))
        messages[0] = message("system", messages[0]["content"] + "\n\n" + list_tools(tools))
    return messages


def read_question(record, notes):
    """The question: all fields that are part of it, in the order of QUESTION, and its choices; or a whole transcript in
    `text`."""
    messages = []
    texts = {}
    for name in QUESTION:
        value = turns_of(take(record, notes, name))
        if is_texts(value):
            value = one_text(value, name, record)
        if says_nothing(value) and len(filled(record, QUESTION)) > 1:
            notes.cut[f"{name} that says {value}"] += 1
            continue
        if isinstance(value, list) or isinstance(value, dict) and filled(value, SPEAKER):
            messages += read_turns(value, name, notes)
        elif value is not None and as_text(value, name) not in texts.values():
            texts[name] = as_text(value, name)
    if texts:
        if not notes.named:
            check_template(record, texts)
        question = "\n".join([*texts.values(), *read_choices(record, notes)])
        messages += said(question, "user", notes, has_answer=bool(filled(record, ANSWER)))
    elif not messages and any(transcript.search(str(record.get("text"))) for transcript in TRANSCRIPTS):
        messages = said(as_text(take(record, notes, "text"), "text"), "user", notes, is_whole=True)
    return messages


def is_texts(value):
    """Whether a value is a list of texts, or of lists of texts."""
    return isinstance(value, list) and all(isinstance(part, str) or is_texts(part) for part in value)


def one_text(value, name, record):
    """The text of a list in a field of the question. Several are passages where they stand beside a question; else they
    may be wordings of one question, or turns, and nobody knows."""
    while len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    is_beside = name in ("context", "input") and len(filled(record, QUESTION)) > 1
    is_beside = is_beside and all(isinstance(text, str) for text in value)
    if len(value) > 1 and not is_beside:
        raise Skip("several questions", f"{name} holds {len(value)} texts: wordings of one question, or turns? Write "
                   "one record for each, or messages: [{role: …, content: …}]")
    return "\n".join(value)


def read_choices(record, notes):
    """The choices of an exam, a line each: "A. …"; in fields A, B, … or in a list."""
    fields = choice_fields(record)
    if len(fields) > 1:
        return [f"{letter}. {as_text(take(record, notes, name), name)}" for letter, name in fields.items()]
    choices = take(record, notes, *CHOICES)
    if isinstance(choices, dict):
        labels = choices.get("label") or list(choices)
        texts = choices.get("text") or list(choices.values())
        return [f"{label}. {as_text(text, 'choices')}" for label, text in zip(labels, texts)]
    choices = from_json(choices)
    if isinstance(choices, str):
        return [choices]
    choices = as_list(choices, "choices")
    if len(choices) > len(LETTERS):
        raise Skip("too many choices", f"{len(choices)} of them, and letters from A to {LETTERS[-1]}")
    lines = []
    for letter, choice in zip(LETTERS, choices):
        text = as_text(choice, "choices")
        if isinstance(choice, dict):
            letter = next((own for own in choice.values() if own in [*LETTERS]), letter)  # {"key": "A", "value": "…"}
        has_letter = re.match(rf"[(（\[]?{letter}\s*[.．、:：)）\]]", text.lstrip())
        lines.append(text if has_letter else f"{letter}. {text}")
    return lines


def choice_fields(record):
    """{"A": "option_a", "B": "option_b", …}: the fields that hold a choice each."""
    names = {}
    for name in filled(record, record):
        match = CHOICE.fullmatch(str(name))
        if match:
            names.setdefault(match[1].upper(), name)
    letters = itertools.takewhile(lambda letter: letter in names, LETTERS)
    return {letter: names[letter] for letter in letters}


def check_template(record, texts):
    """Raise Skip where a part of the question ends with the answer: a field that holds the whole, put together."""
    answer = first(record, (*ANSWER, *CHOSEN))
    if not isinstance(answer, str):
        return
    answer = answer.strip()
    ours = "answer" if filled(record, ANSWER) else "chosen"
    theirs = filled(record, (*ANSWER, *CHOSEN))[0]
    for name, text in texts.items():
        others = [other for other in texts if other != name]
        is_whole = others and all(texts[other].strip() in text for other in others)
        names = ",".join(f"question:{other}" for other in others)
        for gap in re.findall(r"\{ ?(\w{4,}) ?\}", text):
            if filled(record, [gap]):
                fill = f".{gap} as $x | .{name} |= gsub(\"[{{]+ ?{gap} ?[}}]+\"; $x) | del(.{gap})"
                raise Skip("a gap to fill in", f"{name} says {{{gap}}}, where {brief(record[gap])} belongs: "
                           f"jq -c '{fill}' FILE > FILE.jsonl")
        if ours == "answer" and len(text) >= 10 and answer.startswith(text + "\n"):
            raise Skip("the answer holds its question", f"{theirs} begins with {name}: jq -c '.{name} as $x | "
                       f".{theirs} |= ltrimstr($x)' FILE > FILE.jsonl cuts it off")
        if is_whole and text.rstrip().endswith((":", "：")):
            raise Skip("the question twice", f"{name} holds {', '.join(others)}, too: --fields={names},{ours}:{theirs} "
                       f"leaves {name} out, --fields=question:{name},{ours}:{theirs} takes it alone")
        place = text.rfind(answer)
        is_given = is_whole or len(answer) >= 20 or GIVEN.search(text[:max(place, 0)])
        if place >= 0 and len(text) - place - len(answer) <= 20 and is_given:
            hint = f"--fields={names},{ours}:{theirs} leaves {name} out" if others else "cut it off"
            raise Skip("the question holds its answer", f"{name} ends with {brief(answer)}: {hint}")


def read_answer(record, notes):
    """The answer to the question: the one field of ANSWER that is there."""
    names = [name for name in filled(record, ANSWER) if record[name] not in NAN]
    if not names:
        return []
    value = take(record, notes, *names)
    for name in names:
        notes.used.add(name)
        if record[name] != value:
            questions = ",".join(f"question:{question}" for question in filled(record, QUESTION))
            raise Skip("two answers", f"{' and '.join(names)} differ: --fields={questions},answer:{name} learns {name}")
    value = turns_of(value)
    if isinstance(value, dict) and isinstance(first(value, CONTENT), list):
        note_rest(value, CONTENT, notes, f"{names[0]}.")
        value = first(value, CONTENT)  # SQuAD: {"text": [several], "answer_start": […]}
    choices = first(record, CHOICES)
    is_place = is_number(value) or str(value).isdecimal() and not re.search(rf"\b{value}\b", str(choices))
    if is_place and isinstance(choices, (list, dict)):
        raise Skip("which choice?", f"{names[0]} is {value}: does it count the choices from 0 or from 1? Write its "
                   "letter")
    if is_parts(value):
        value = as_text(value, names[0])
    if isinstance(value, list) and all(is_answer(answer) for answer in value):
        if len(value) > 1:
            ranked = ", best first? Then --kind=pairs ranks them" if not is_texts(first(record, QUESTION)) else ""
            raise Skip("several answers", f"{names[0]} holds {len(value)}{ranked}; or parts of one? Join them")
        value = value[0]
    if isinstance(value, (list, dict)):
        return read_turns(value, names[0], notes, "assistant")
    text = as_text(value, names[0])
    parts = [think(take(record, notes, *REASONING), text), text]
    asked = first(record, QUESTION)
    if isinstance(asked, str) and asked.rstrip().endswith((":", "：")):
        # "Human: … Assistant:" asks for the answer, which may go on in this way
        before = said(asked, "user", notes, has_answer=True)
        whole = said(asked + parts[1], "user", notes, is_whole=True)
        if whole[:len(before)] == before and len(whole) > len(before) + 1:
            return whole[len(before):]
    return [message("assistant", "\n".join(part for part in parts if part))]


def is_answer(value):
    """Whether an entry of a list is an answer by itself, and not a turn of one."""
    return isinstance(value, str) or isinstance(value, dict) and not filled(value, SPEAKER)


def is_thumbs_down(record, notes):
    """Whether a record says of its one answer that it is bad: label false. 0 means this beside a completion alone;
    other records have classes of that name."""
    is_verdict = "completion" in record or "label" in notes.named
    bad = {*NO, *NO_WORDS, "-1"} if is_verdict else {"false"}
    good = YES if is_verdict else {"true"}
    for name in filled(record, THUMB):
        word = str(record[name]).lower()
        if word in good | bad:
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
        if not notes.named and any(m["role"] == "assistant" for m in messages):
            check_marks(record, notes.used | KNOWN - {*THUMB}, "label")
    messages = without_names([m for m in messages if m["content"] or m["role"] != "system"])
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
               f"({', '.join(ANSWER)}): --fields=question:…,answer:… says which is which")


def to_question(record, notes):
    """For PPO: a conversation up to its last question."""
    messages = [m for m in to_prompt(record, notes) if m["content"]]
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise Skip("no question", f"{there(record)}; wanted messages, or one of {', '.join(QUESTION)}: "
                   "--fields=question:… says which is the question")
    return messages
