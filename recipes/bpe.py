"""
Byte pair encoding, written to be read: learn a vocabulary from text, and cut text into its tokens.

    python -m recipes.bpe README_zh.md "床前明月光，疑是地上霜。"     # learn 400 tokens, print them and the text cut up

A vocabulary begins as the 256 bytes, so any text can be spelled. Then, again and again, the pair of neighbours that is
most frequent in the text becomes a new token (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909). A Chinese
character is three bytes in UTF-8, so first frequent characters become tokens, then frequent words. To encode a text,
join its pairs in the order in which they were learned. tokenizer.py leaves all of this to sentencepiece, which is much
faster and begins with characters instead of bytes: only a character that gets no token is spelled in bytes.
"""
import collections
import re
import sys

# A token never contains parts of two words. A word: letters, a digit or punctuation, perhaps after a space; or spaces.
WORD = re.compile(r" ?[^\W\d]+| ?\d| ?[^\w\s]+|\s+")


def train(text, vocab_size):
    """Learn a vocabulary; return {token (bytes): its id}. An id is also a rank: smaller ones were learned earlier."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    # every different word once: how often it is in the text, and the tokens that it consists of so far
    counts = collections.Counter(WORD.findall(text))
    words = {word: spell(word) for word in counts}
    while len(ranks) < vocab_size:
        # count all pairs of neighbours
        pairs = collections.Counter()
        for word, tokens in words.items():
            for pair in zip(tokens, tokens[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            break  # every word is one token
        # the most frequent pair becomes a token; of equally frequent ones the first in the text
        best = max(pairs, key=pairs.get)
        ranks.setdefault(best[0] + best[1], len(ranks))  # nothing new if known: abc may be a + bc or ab + c
        words = {word: join(tokens, best) for word, tokens in words.items()}
    return ranks


def spell(word):
    """The bytes of a word, each a token of its own."""
    return [bytes([byte]) for byte in word.encode()]


def join(tokens, pair):
    """Replace every occurrence of the pair by one token, from left to right."""
    joined = []
    for token in tokens:
        if joined and (joined[-1], token) == pair:
            joined[-1] += token
        else:
            joined.append(token)
    return joined


def encode(text, ranks):
    """Return the ids of a text."""
    ids = []
    for word in WORD.findall(text):
        tokens = spell(word)
        while len(tokens) > 1:
            # of all neighbours that together are a token, join those that were learned first
            pairs = list(zip(tokens, tokens[1:]))
            best = min(pairs, key=lambda pair: ranks.get(pair[0] + pair[1], len(ranks)))
            if best[0] + best[1] not in ranks:
                break
            tokens = join(tokens, best)
        ids += [ranks[token] for token in tokens]
    return ids


def decode(ids, ranks):
    """Return the text of ids. Bytes that are no whole character become U+FFFD, �."""
    tokens = list(ranks)  # in the order of their ids
    return b"".join(tokens[i] for i in ids).decode(errors="replace")


if __name__ == "__main__":
    path, text = sys.argv[1:]
    with open(path, encoding="utf-8") as f:
        learned = train(f.read(), vocab_size=400)
    tokens = [token.decode(errors="backslashreplace") for token in learned]
    print("learned:", " ".join(tokens[256:]))
    print("cut up: ", " ".join(tokens[i] for i in encode(text, learned)))
