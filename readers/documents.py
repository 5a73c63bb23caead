"""
What prepare.py does not read itself: files to what is learned of each record, whatever their format and their fields.

    for content, split in read_odd("chat.parquet", cfg, counts, done=0):
        …                                          # a text, messages, or a prompt and its answers

A record is kept, or dropped by a rule, or skipped because it cannot be used, and `counts` tells of every file which
fields were used, and which were ignored.
"""
import itertools
import sys

from tqdm import tqdm

from configurator import check
from readers.account import Drop, Part, Skip, Tally
from readers.fields import CHAT, QUESTION, TEXT
from readers.files import read_names
from readers.records import read_file
from readers.schemas import convert, unfold, words


def read_odd(path, cfg, counts, done):
    """Yield (content, split it asks for) of the records of a file; the first `done` of them have been read."""
    fields = read_names("fields", cfg.fields, CHAT | TEXT | {"split"})
    tally = Tally()
    with open(path, "rb") as raw:
        for where, record in itertools.islice(read_file(path, raw, cfg.txt_document), done, None):
            for item in unfold(record, cfg.kind):
                counts["read"] += 1
                counts["parts"] += isinstance(item, Part)
                try:
                    content, notes = convert(item, cfg.kind, fields)
                except Skip as skip:
                    note_skip(skip, where, counts)
                    continue
                tally.add(notes, len(words(content)))
                for reason, n in notes.cut.items():
                    counts["cut", reason] += n
                yield content, notes.split
    for what, names in (("used", tally.used), ("ignored", tally.ignored)):
        for name, n in names.items():
            counts[what, path, name] += n
    check_ignored(path, tally, cfg)


def note_skip(skip, where, counts):
    """Count the reason, and show where to look for the first three of each."""
    if isinstance(skip, Drop):
        counts["dropped", skip.reason] += 1
        return
    counts["skipped", skip.reason] += 1
    counts["noticed", "bytes not read"] += skip.lost
    if counts["skipped", skip.reason] <= 3:
        tqdm.write(f"skipped {where}: {skip}"[:600], file=sys.stderr)


def check_ignored(path, tally, cfg):
    """Stop where a field that is ignored holds more text than all that is used."""
    known = () if cfg.kind == "text" else CHAT - {*QUESTION, "history"}
    if cfg.fields or cfg.kind == "prompts":
        return
    used = ", ".join(sorted(tally.used))
    for name, characters in tally.ignored_characters.items():
        hint = f"--fields=text:{name} learns it, --fields=text:{used.split(', ')[0]} leaves it out"
        if cfg.kind != "text":
            names = ",".join(f"{field}:{field}" for field in sorted(tally.used))
            hint = f"--fields=question:…,answer:… says which fields to learn, --fields={names} leaves it out"
        check(name in known or characters <= tally.characters, f"{path}: the field {name}, which would be ignored, "
              f"holds more text than all that is used ({used}). {hint}")
