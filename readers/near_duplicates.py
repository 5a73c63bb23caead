"""
Near duplicates: the same text with another date, a notice at its end, a few words changed. Off, unless prepare.py is
given --near_duplicates=0.8: then a document is dropped where 80 % of its pieces are those of an earlier one.

    seen = Seen(0.8)
    seen.before("床前明月光，疑是地上霜。举头望明月，低头思故乡。")        False: the first of its kind

MinHash (Broder 1997): under a random hash function, the smallest hash of the pieces of two texts is the same with just
the probability that a piece of one is in the other, too (|A ∩ B| / |A ∪ B|). 128 such functions make a sketch. LSH
looks only at sketches that agree in a whole band of numbers, so a text is not compared with all before it. Both come
from the package datasketch. They estimate: within 0.1 of the threshold a text may be judged either way.

It keeps about 4 kB of a document in memory (4 GB of a million), and reads about 0.5 million characters a second.
"""
from configurator import fail
from readers.schemas import words

PIECE = 5  # characters: long enough that two texts share few by chance
FUNCTIONS = 128


class Seen:
    """The documents so far, as sketches."""

    def __init__(self, threshold):
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            fail("--near_duplicates needs a package: pip install datasketch")
        self.empty = MinHash(num_perm=FUNCTIONS)
        self.sketches = MinHashLSH(threshold, num_perm=FUNCTIONS)

    def before(self, content):
        """Whether a text (or conversation) like this one has been here before; if not, it is from now on."""
        text = words(content)
        last = max(1, len(text) - PIECE + 1)
        pieces = {text[i:i + PIECE].encode() for i in range(last)}
        sketch = self.empty.copy()
        sketch.update_batch(pieces)
        if self.sketches.query(sketch):
            return True
        self.sketches.insert(len(self.sketches.keys), sketch)
        return False
