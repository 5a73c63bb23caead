"""
What a vocabulary changes in the text: encoding and decoding does not always give back the same text.

    changes(tok, documents)      {("noticed", "texts that the vocabulary changes, ， ： to , :"): 120}, or {}

A sentencepiece model trained with the defaults writes ， as , and joins spaces and lines. A model with such a
vocabulary cannot learn to write these characters, however often they are in the data.
"""
import collections

DOCUMENTS = 1000
CHARACTERS = 2000  # of a document


def changes(tok, documents):
    """Say which characters are lost, and which come instead, in a sample of the documents. Return it for the account:
    in how many of them."""
    lost = collections.Counter()
    gained = collections.Counter()
    changed = 0
    numbers = range(0, len(documents), max(1, len(documents) // DOCUMENTS))
    for number in numbers:
        text = documents[number][:CHARACTERS]
        ids = tok.encode(text)
        if tok.unk_id in ids:
            continue  # is counted as such
        again = tok.decode(ids)
        if again != text:
            changed += 1
            before = collections.Counter(text)
            after = collections.Counter(again)
            lost.update(before - after)
            gained.update(after - before)
    if not changed:
        return {}
    what = f"{listed(lost) or 'order'} to {listed(gained) or 'nothing'}"
    print(f"note: the vocabulary changes {changed:,} of {len(numbers):,} texts: {what}")
    return {("noticed", f"sampled texts that the vocabulary changes, {what}"): changed}


def listed(counts):
    """The most frequent characters; those that cannot be seen as Python writes them."""
    most = [character for character, _ in counts.most_common(20)]
    return " ".join(repr(c) if c.isspace() or not c.isprintable() else c for c in most)
