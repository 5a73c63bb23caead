"""recipes/bpe.py against tiktoken: the same vocabulary is learned, and the same ids come out."""
import os

import pytest
import tiktoken
from hypothesis import given, settings, strategies

from conftest import ROOT
from recipes import bpe

TEXT = ("床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。\n" * 3
        + "the moon, the river and the mountain: 2024 hello hello  world\n" * 3)
RANKS = bpe.train(TEXT, 340)


def test_learns_what_tiktoken_learns():
    pytest.importorskip("regex")
    from tiktoken._educational import bpe_train
    want = bpe_train(TEXT, 340, bpe.WORD.pattern, visualise=None)
    assert RANKS == want
    assert "明月".encode() in RANKS and b" the" in RANKS


@pytest.mark.parametrize("text", [TEXT, "", " ", "the moon 明月光 12345", "龘😀\x00\t\r\n", "thethe  thethe", "__init__²"])
def test_encodes_as_tiktoken(text):
    oracle = tiktoken.Encoding("oracle", pat_str=bpe.WORD.pattern, mergeable_ranks=RANKS, special_tokens={})
    ids = bpe.encode(text, RANKS)
    assert ids == oracle.encode_ordinary(text)
    assert bpe.decode(ids, RANKS) == text


@settings(max_examples=200, deadline=None)
@given(strategies.text(strategies.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text):
    assert bpe.decode(bpe.encode(text, RANKS), RANKS) == text


def test_by_hand():
    # "ab" stands twice, then "abc" twice; nothing is joined across a space
    ranks = bpe.train("abc abc b", 259)
    assert list(ranks)[256:] == [b"ab", b"abc", b" abc"]
    assert bpe.encode("abcab", ranks) == [257, 256]
    assert bpe.join([b"a", b"a", b"a"], (b"a", b"a")) == [b"aa", b"a"]
    assert bpe.decode([0xE5, 0xBA], ranks) == "\ufffd"


def test_stays_readable():
    with open(os.path.join(ROOT, "recipes", "bpe.py"), encoding="utf-8") as f:
        assert len(f.readlines()) <= 90
