"""
Records to texts for pretraining.
"""
from common.documents import clean
from readers.account import Skip
from readers.fields import QUESTION, as_list, as_text, brief, filled, note_rest, take, there


def to_text(record, notes):
    """text | content, after its title | title + summary + sections [{title, content}] (Baidu Baike) | completion"""
    if isinstance(record, str):
        return clean(record)
    if isinstance(record, list):
        raise Skip("no text field", there(record))
    parts = [take(record, notes, "text")]
    if parts[0] is None:
        # an article has a title or sections, and only there a summary is a part of the text
        is_article = filled(record, ("title", "sections"))
        names = ("content", "summary") if is_article else ("content",)
        parts = [take(record, notes, *names)]
        sections = take(record, notes, "sections")
        for section in as_list(sections, "sections"):
            if not isinstance(section, dict):
                raise Skip("wrong type", f"sections holds {brief(section)}, wanted objects with title and content")
            parts.append(take(section, notes, "title"))
            parts.append(take(section, notes, "content"))
            note_rest(section, ("title", "content"), notes, "sections.")
        if any(parts):
            title = take(record, notes, "title")
            parts.insert(0, title)
    if not any(parts) and not any(name in record for name in QUESTION):
        parts = [take(record, notes, "completion")]
    if not any(parts):
        if {"text", "content"} & set(record):
            raise Skip("empty", f"{brief(record)}")
        raise Skip("no text field", f"{there(record)}; wanted text or content")
    texts = []
    for part in parts:
        if not (part is None or isinstance(part, (str, list))):
            raise Skip("wrong type", f"wanted text, got {brief(part)}")
        if part:
            text = as_text(part, "text", glue="\n")
            texts.append(text)
    return clean("\n".join(texts))
