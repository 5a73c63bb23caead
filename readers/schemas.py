"""
Records to what a stage learns from: every schema there is, told by the names of a record's fields.

    convert({"question": "月亮是什么？", "answer": "地球的卫星。"}, "sft")
        → [{"role": "user", "content": "月亮是什么？"}, {"role": "assistant", "content": "地球的卫星。"}], notes

text      "…"
sft       messages that end with an answer; "weight": 0 in an answer that is not to be learned
prompts   messages that end with a question
pairs     {"prompt": messages, "answers": [best, …, worst]}

Nothing is left out silently: the notes say which fields were used, which ignored, and what was cut off. A record that
cannot be used raises Skip with the reason; where it is unclear which field holds what, the reason asks for --fields.
"""
import re

from common.documents import clean
from readers.account import Notes, Skip
from readers.chats import choice_fields, to_conversation, to_question
from readers.fields import ANSWER, CHAT, CHOSEN, COUNTERS, KNOWN, LETTERS, QUESTION, SPEAKER, TEXT, TURNS
from readers.fields import as_text, brief, check_media, filled, first, is_empty, is_number, note_rest, there
from readers.files import VAL_WORDS, split_of
from readers.rankings import to_ranking
from readers.texts import to_text

RATING = re.compile("score|rating|reward|quality|stars?$|grade|评分|得分|质量", re.IGNORECASE)
CONVERTERS = {"text": to_text, "sft": to_conversation, "pairs": to_ranking, "prompts": to_question}


def convert(record, kind, fields=()):
    """Return (content, Notes) of a record, or raise Skip.

    fields: [(our name, the name in the record), …] of --fields; all other fields are ignored then.
    """
    if isinstance(record, Skip):
        raise record
    if not isinstance(record, (dict, list, str)):
        raise Skip("wrong type", f"wanted an object with named fields, got {brief(record)}")
    notes = Notes(named=frozenset(ours for ours, _ in fields))
    try:
        record = known_names(record)
        named = rename(record, fields) if fields else record
        if fields and kind != "text" and isinstance(record, dict):
            check_choices(record, named, fields)
        content = CONVERTERS[kind](named, notes)
        if isinstance(record, dict):
            note_split(record, named, fields, notes)
            note_rest(record, notes.used, notes)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as e:
        raise Skip("wrong type", f"{e} in {brief(record)}") from e  # a field holds something unheard of
    if not content:
        raise Skip("empty", brief(record))
    if isinstance(record, dict):
        if kind != "text" and not fields:
            check_media(record, "record")
            check_letter(record, content, notes)
        note_values(record, content, notes)
        note_doubts(record, kind, notes)
    return content, notes


def known_names(record):
    """The record with names as they are written here: Question, " question" and QUESTION are question."""
    if not isinstance(record, dict) or all(name in KNOWN for name in record):
        return record
    renamed = {}
    for name, value in record.items():
        ours = str(name).strip().lower().replace(" ", "_")
        renamed[ours if ours in KNOWN and name not in KNOWN and ours not in record else name] = value
    return renamed


def check_choices(record, named, fields):
    """Raise Skip where the answer is the letter of a choice, and --fields names no choices."""
    choices = choice_fields(record)
    letter = str(first(named, ANSWER)).strip()
    if letter in choices and len(choices) > 1 and not {*choices.values()} & {theirs for _, theirs in fields}:
        names = ",".join(f"{ours}:{theirs}" for ours, theirs in [*fields, *choices.items()])
        raise Skip("choices left out", f"{letter} is one of {', '.join(choices.values())}: --fields={names}")


def check_letter(record, content, notes):
    """Raise Skip where the answer is the letter of a choice, and what may be the choices is ignored."""
    turns = content["prompt"] if isinstance(content, dict) else content
    answers = content["answers"] if isinstance(content, dict) else [str(first(record, ANSWER))]
    if turns[-1]["role"] == "assistant":
        *turns, answer = turns
        answers = [answer["content"]]
    letters = re.fullmatch(rf"(?:故?选|答案[是为:：]?)?\s*[(（]?([{LETTERS}]{{1,4}})[)）.。]?", answers[0].strip())
    if not letters or re.search(rf"(?<![A-Za-z]){letters[1][0]}(?![A-Za-z])", turns[-1]["content"]):
        return
    answer = answers[0]
    texts = [name for name in notes.ignored if isinstance(record.get(name), str) and not COUNTERS.search(name)]
    lists = [name for name in notes.ignored if isinstance(record.get(name), (list, dict))
             or name in texts and re.search(r"A\s*[.．、:：)）].*B\s*[.．、:：)）]", record[name], re.DOTALL)]
    if lists or len(texts) > 1:
        names = f"choices:{lists[0]}" if lists else ",".join(f"{letter}:{name}" for letter, name in zip(LETTERS, texts))
        asked = ",".join(f"{name}:{name}" for name in sorted(notes.used - {"split"}))
        raise Skip("choices left out", f"the answer is {answer}, and nothing in the question says what it is: are its "
                   f"choices in {', '.join(lists or texts)}? --fields={asked},{names}; --fields={asked} goes without")


def note_values(record, content, notes):
    """Note how much is learned, and what is in the fields that are ignored. It is no loss where it only repeats what is
    used, or where the whole conversation stands in it again, put together."""
    answers = [content] if isinstance(content, str) else []
    if isinstance(content, dict):
        answers = content["answers"]
    elif isinstance(content, list):
        answers = [m["content"] for m in content if m["role"] == "assistant"]
    notes.learned = sum(map(len, answers))
    everything = words(content)
    turns = content["prompt"] if isinstance(content, dict) else content if isinstance(content, list) else []
    asked = next((m["content"] for m in turns if m["role"] == "user"), "")
    for name, n in notes.ignored.items():
        value = record.get(name)
        if n and isinstance(value, str):
            text = clean(value).strip()
            parts = [*answers, asked.split("\n")[0]]
            is_whole = content is not everything and answers and all(part in text for part in parts)
            if text in everything or is_whole:
                notes.ignored[name] = 0
        if name in record:
            notes.values[name] = hash(str(value)[:1000])


def note_doubts(record, kind, notes):
    """Note fields that are ignored, and may say that an answer is bad, or that a record is to be held out."""
    for name in {*map(str, record)} - notes.used:
        value = record.get(name)
        if kind == "sft" and RATING.search(name) and is_number(value):
            notes.noticed[f"{name} beside answers, which are learned alike"] += 1
        elif not notes.split and isinstance(value, str) and len(value) < 20 and value.lower() in VAL_WORDS:
            notes.noticed[f"{name} that says {value} (--fields=…,split:{name} holds it out)"] += 1


def note_split(record, named, fields, notes):
    """Note which split the record asks for; and with --fields, which of its fields were used under our names."""
    notes.split = split_of(named.get("split") or record.get("split"))
    if fields:
        used = {name_in(record, theirs) for ours, theirs in fields if ours in notes.used}
        notes.used = {name if name in record else name.split(".")[0] for name in used} & {*record}
    if notes.split:
        notes.used.add("split")


def name_in(record, theirs):
    """The name that a field of --fields has in what known_names() returned."""
    ours = theirs.strip().lower().replace(" ", "_")
    return ours if theirs not in record and ours in record else theirs


def rename(record, fields):
    """The record under our names. Fields that get one name are joined by a line break."""
    renamed = {}
    for ours, theirs in fields:
        value = record
        whole = name_in(record, theirs)
        for name in [whole] if whole in record else whole.split("."):  # "meta.text" lies inside of meta
            value = value.get(name) if isinstance(value, dict) else None
        if is_empty(value):
            continue
        if ours in renamed:
            value = as_text([renamed[ours], value], theirs, glue="\n")
        renamed[ours] = value
    if not renamed:
        raise Skip("no such field", f"--fields names {', '.join(theirs for _, theirs in fields)}, {there(record)}")
    return renamed


def words(content):
    """All text in what convert() returns."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return words(content["prompt"]) + "".join(content["answers"])
    return "".join(message["content"] for message in content)


def are_records(value):
    """Whether a list holds whole records, not the turns of one conversation."""
    names = {*QUESTION, *ANSWER, *TURNS, *CHOSEN, "text", "content"}
    if not value or not isinstance(value, list):
        return False
    return all(isinstance(item, dict) and names & set(item) and not filled(item, SPEAKER) for item in value)


def rows_of(record, kind):
    """The rows of a table as pandas writes it in one object: {columns, data: [[…], …]}; {name: {"0": …, "1": …}, …};
    {"0": {name: …}, "1": …}; of texts, {name: […], …}. None where it is another object."""
    if isinstance(record.get("columns"), list) and isinstance(record.get("data"), list):
        if all(isinstance(row, list) and len(row) == len(record["columns"]) for row in record["data"]):
            return [dict(zip(record["columns"], row)) for row in record["data"]]
    values = list(record.values())
    size = len(values[0]) if values and isinstance(values[0], list) else 0
    are_columns = all(isinstance(value, list) and len(value) == size for value in values)
    if kind == "text" and size > 1 < len(values) and are_columns:
        return [dict(zip(record, row)) for row in zip(*values)]
    if not values or not all(isinstance(value, dict) and value for value in values):
        return None
    if all(str(name).isdecimal() for name in record):
        return values
    numbers = list(values[0])
    if all(str(number).isdecimal() for number in numbers) and all(list(value) == numbers for value in values):
        return [{name: record[name][number] for name in record} for number in numbers]
    return None


def unfold(record, kind):
    """The records that are kept in one: a list of documents (WuDao) or of records, also under data; a table; or
    {instruction, instances: [{input, output}]}."""
    table = rows_of(record, kind) if isinstance(record, dict) else None
    if table is not None:
        yield from table
        return
    if isinstance(record, dict) and are_records(record.get("data")) and not set(record) & (CHAT | TEXT) - {"data"}:
        inside = {name for one in record["data"] for name in one}
        shared = {}
        for name, value in record.items():
            if name != "data":
                shared[f"outer {name}" if name in inside else name] = value
        record = [{**shared, **one} for one in record["data"]]  # what stands beside them is theirs
    if isinstance(record, list) and (kind == "text" or are_records(record)):
        yield from record
    elif isinstance(record, dict) and isinstance(record.get("instances"), list):
        shared = {name: value for name, value in record.items() if name != "instances"}
        for instance in record["instances"]:
            yield {**shared, **instance} if isinstance(instance, dict) else instance
    else:
        yield record
