"""
What became of a record: kept, with notes on its fields; or skipped, because it cannot be used; or dropped by a rule.
"""
import collections
import dataclasses
import re


# what a model thinks before it answers, under any name
THOUGHT = re.compile(r"(^|[ _.])(cot|think|thinking|thoughts?|reason|reasoning|rationale)([ _]|$)", re.IGNORECASE)


class Skip(Exception):
    """Why something cannot be used: the reason to count, the detail to print, and how many bytes were not read."""

    def __init__(self, reason, detail="", lost=0):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.lost = lost


class Part(str):
    """A text that ends because of its length alone; the next record goes on with it."""


class Drop(Skip):
    """Why a record is left out although nothing is wrong with it."""


@dataclasses.dataclass
class Notes:
    """What became of the fields of one record."""
    used: set = dataclasses.field(default_factory=set)
    ignored: dict = dataclasses.field(default_factory=dict)  # name → characters of text in it
    values: dict = dataclasses.field(default_factory=dict)  # name of an ignored field → hash of what it holds
    cut: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # what was cut off → how often
    noticed: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # what is strange in it
    split: str = None  # "train" or "val", where the record asks for one
    named: frozenset = frozenset()  # what --fields has a name for
    names: set = None  # of a transcript: what begins its lines like a name, "Critic:", and is no known speaker
    learned: int = 0  # characters that are learned of it


class Tally:
    """What became of the fields of all records of a file: name → in how many records it was used, or ignored."""

    def __init__(self):
        self.records = 0
        self.used = collections.Counter()
        self.ignored = collections.Counter()
        self.values = collections.defaultdict(set)  # of an ignored field
        self.transcripts = 0
        self.names = collections.Counter()  # in how many transcripts a name begins lines
        self.groups = collections.defaultdict(collections.Counter)  # records that ignore text in the same fields

    def add(self, notes):
        self.records += 1
        self.used.update(notes.used)
        if notes.names is not None:
            self.transcripts += 1
            self.names.update(notes.names)
        texts = {}
        for name, n in notes.ignored.items():
            if len(self.ignored) >= 100 and name not in self.ignored:
                name = "(other fields)"  # of records whose names are numbers or words
            self.ignored[name] += 1
            if n:
                texts[name] = texts.get(name, 0) + n
            if len(self.values[name]) < 1000:
                self.values[name].add(notes.values.get(name, self.records))
        group = self.groups[frozenset(texts)]
        group.update(texts)
        group["(records)"] += 1
        group["(learned)"] += notes.learned

    def is_mark(self, name, characters):
        """Whether a field names a category, a source and the like: few short values, again and again."""
        n = self.ignored[name]
        return len(self.values[name]) <= n / 4 and characters <= 50 * n

    def strangers(self, share):
        """Who speaks in the transcripts without being known: what begins lines in half of them, and in more than this
        share, is a name. "Note:" is not."""
        many = max(share, 0.5) * self.transcripts
        return sorted(name for name, n in self.names.items() if n > max(many, 2))

    def lost(self, share, never=()):
        """Names of fields that hold more text than what is learned beside them, in more than this share of records; or
        whose names say that they are never to be ignored."""
        for names, group in self.groups.items():
            lost = [name for name in names if name in never or not self.is_mark(name, group[name])]
            if sum(group[name] for name in lost) <= group["(learned)"]:
                lost = [name for name in lost if name in never or THOUGHT.search(name)]
            if lost and group["(records)"] > share * self.records:
                return sorted(lost, key=lambda name: -group[name])
        return []
