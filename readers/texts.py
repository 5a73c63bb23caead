"""
Records to texts for pretraining.
"""
from common.documents import clean
from readers.account import Skip
from readers.fields import QUESTION, as_list, as_text, brief, is_empty, note_rest, take, there


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
        raise Skip("no text field", f"{there(record)}; wanted text or content")
    for part in parts:
        if not (part is None or isinstance(part, (str, list))):
            raise Skip("wrong type", f"wanted text, got {brief(part)}")
    return clean("\n".join(as_text(part, "text", glue="\n") for part in parts if part))
