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
from readers.account import Notes, Skip
from readers.chats import to_conversation, to_question
from readers.fields import ANSWER, CHAT, CHOSEN, MEDIA, QUESTION, SPEAKER, TEXT, TURNS
from readers.fields import as_text, brief, filled, is_blank, is_empty, note_rest, prose, there
from readers.files import split_of
from readers.rankings import to_ranking
from readers.texts import to_text


CONVERTERS = {"text": to_text, "sft": to_conversation, "pairs": to_ranking, "prompts": to_question}


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
