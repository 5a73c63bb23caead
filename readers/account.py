"""
What became of a record: kept, with notes on its fields; or skipped, because it cannot be used; or dropped by a rule.
"""
import collections
import dataclasses


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
    cut: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # what was cut off → how often
    split: str = None  # "train" or "val", where the record asks for one


class Tally:
    """What became of the fields of all records of a file: name → in how many records it was used, or ignored."""

    def __init__(self):
        self.used = collections.Counter()
        self.ignored = collections.Counter()
        self.ignored_characters = collections.Counter()
        self.characters = 0  # of all that is made of the records

    def add(self, notes, characters):
        self.characters += characters
        self.used.update(notes.used)
        for name, n in notes.ignored.items():
            if len(self.ignored) >= 100 and name not in self.ignored:
                name = "(other fields)"  # of records whose names are numbers or words
            self.ignored[name] += 1
            self.ignored_characters[name] += n
