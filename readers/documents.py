"""
What prepare.py does not read itself: files to what is learned of each record, whatever their format and their fields.

    for content, split in read_odd("chat.parquet", cfg, counts, done=0):
        …                                          # a text, messages, or a prompt and its answers

A record is kept, or dropped by a rule, or skipped because it cannot be used, and `counts` tells of every file which
fields were used, and which were ignored.
"""
import collections
import itertools
import re
import sys

from tqdm import tqdm

from configurator import check
from readers.account import THOUGHT, Drop, Part, Skip, Tally
from readers.chats import choice_fields, is_texts
from readers.fields import KNOWN, QUESTION, SYSTEM, TURNS, prose
from readers.files import read_names
from readers.markers import cut_at_markers, find_markers
from readers.records import read_file
from readers.schemas import convert, name_in, unfold

UNCLEAR = ("no text field", "no question and answer", "no answer", "no question", "no ranked answers")


def read_odd(path, cfg, counts, done):
    """Yield (content, split it asks for) of the records of a file; the first `done` of them have been read."""
    fields = read_names("fields", cfg.fields, KNOWN)
    tally = Tally()
    unknown = collections.Counter()  # characters of text in the fields of records that no name explains
    with open(path, "rb") as raw:
        for where, record in itertools.islice(read_file(path, raw, cfg.txt_document), done, None):
            for item in unfold(record, cfg.kind):
                counts["read"] += 1
                counts["parts"] += isinstance(item, Part)
                try:
                    content, notes = convert(item, cfg.kind, fields)
                except Skip as skip:
                    note_skip(skip, where, counts)
                    if skip.reason in UNCLEAR and isinstance(item, dict):
                        unknown["(records)"] += 1
                        for name, value in item.items():
                            is_text = isinstance(value, str) or is_texts(value)
                            unknown[name if is_text else "(other)"] += prose(value)
                    continue
                tally.add(notes)
                counts.update({("cut", reason): n for reason, n in notes.cut.items()})
                counts.update({("noticed", reason): n for reason, n in notes.noticed.items()})
                contents = [content]
                markers = find_markers(content)
                if markers and cfg.markers == "cut":
                    contents = list(cut_at_markers(content, counts))
                    counts["skipped", "only markers"] += not contents
                    counts["read"] += max(0, len(contents) - 1)
                for marker, n in markers.items():
                    counts["noticed", f"{marker} in a text"] += n
                for content in contents:
                    yield content, notes.split
    for what, names in (("used", tally.used), ("ignored", tally.ignored)):
        for name, n in names.items():
            counts[what, path, name] += n
    missing = [name for _, name in fields if not {name, name_in(tally.used, name).split(".")[0]} & {*tally.used}]
    if missing and tally.records:
        tqdm.write(f"note: no record of {path} has {', '.join(missing)}, which --fields names", file=sys.stderr)
    advise(path, unknown, cfg)
    check_ignored(path, tally, cfg)
    strangers = tally.strangers(cfg.max_skipped)
    check(not strangers, f"{path}: who is {' and '.join(strangers)}? Lines of its transcripts begin so, and would be "
          "learned as another's words. Write messages: [{role: …, content: …}]. (--max_skipped=1 goes on, too)")


def note_skip(skip, where, counts):
    """Count the reason, and show where to look for the first three of each."""
    if isinstance(skip, Drop):
        counts["dropped", skip.reason] += 1
        return
    counts["skipped", skip.reason] += 1
    counts["noticed", "bytes not read"] += skip.lost
    if counts["skipped", skip.reason] <= 3:
        tqdm.write(f"skipped {where}: {skip}"[:600], file=sys.stderr)


def advise(path, unknown, cfg):
    """Say which fields hold the text, judged from all records that could not be understood."""
    n = unknown.pop("(records)", 0)
    names = [name for name, characters in unknown.most_common(3) if characters > n]
    if not names or names[0] == "(other)" or cfg.fields:
        return
    hint = f"--fields=text:{names[0]} learns {names[0]}"
    if cfg.kind == "pairs":
        hint = "--fields=question:…,chosen:…,rejected:… says which is which"
    elif cfg.kind != "text":
        hint = "--fields=question:…,answer:… says which is which"
    lengths = ", ".join(f"{name} ({unknown[name] / n:.0f} characters on average)" for name in names)
    if path.lower().endswith((".csv", ".tsv")) and any(re.search(r"[\s\d，。？！]", name) for name in unknown):
        hint += f". Are these no names? Write some above: sed -i '1i {'NAME,' * (len(unknown) - 1)}NAME' {path}"
    tqdm.write(f"note: most of the text of {path} is in {lengths}. {hint}", file=sys.stderr)


def check_ignored(path, tally, cfg):
    """Stop where fields that are ignored hold more text than what is learned."""
    if cfg.fields or cfg.kind == "prompts":
        return
    exempt = () if cfg.kind == "text" else KNOWN - {*QUESTION, "history"}
    never = () if cfg.kind == "text" else QUESTION
    lost = [name for name in tally.lost(cfg.max_skipped, never) if name not in exempt]
    used = [name for name in ["title", *SYSTEM, *QUESTION] if name in tally.used]
    used += sorted(KNOWN.intersection(tally.used) - {"split", *used})
    ours = "text" if cfg.kind == "text" else "system" if {*used} & {*TURNS} else "question"
    as_is = ",".join([*(f"{'text' if cfg.kind == 'text' else name}:{name}" for name in used),
                      *(f"{letter}:{name}" for letter, name in choice_fields(tally.used).items() if name not in used)])
    # fields inside of turns have no name that --fields could give
    whole = [name for name in lost if name.split(".")[0] not in (*TURNS, *tally.used)]
    more = "".join(f",{ours}:{name}" for name in whole)
    hints = {f"--fields={as_is}{more}": "learns them, too" if ours == "text" else "has the model read them"}
    if cfg.kind == "sft" and ours == "question":
        hints = {} if any(map(THOUGHT.search, whole)) else hints
        hints[f"--fields={as_is}{more.replace(',question:', ',reasoning:')}"] = "has it think so before it answers"
    hint = "".join(f"{fields} {what}, " for fields, what in hints.items() if whole)
    is_part = all(name in never or THOUGHT.search(name) for name in lost)
    what = "and looks like a part of what is asked or thought" if is_part else "with more text than what is learned"
    check(not lost, f"{path}: {', '.join(lost)} would be ignored, {what} ({', '.join(used)}). {hint}"
          f"--fields={as_is} leaves them out. (--max_skipped=1 goes on, too)")
