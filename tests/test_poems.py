"""recipes/poems.py and rewards.py by examples: lines, forms, rhymes, rewards by rule, what is tidied and spoiled."""

import pytest

from recipes import poems
from recipes.rewards import quatrain, rhyming

QUIET_NIGHT = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"


def test_lines_and_forms():
    assert poems.poem_lines("春眠不觉晓，处处闻啼鸟。\n夜来？") == ["春眠不觉晓", "处处闻啼鸟", "夜来"]
    assert poems.poem_lines("渐秋阑、雪清玉瘦。") == ["渐秋阑、雪清玉瘦"]  # 、 stays inside a line
    assert poems.poem_lines("") == []
    assert poems.poem_form(QUIET_NIGHT) == "五言绝句"
    assert poems.poem_form("去年今日此门中，人面桃花相映红。人面不知何处去，桃花依旧笑春风。") == "七言绝句"
    assert poems.poem_form("一二三四五，" * 8) == "五言律诗"
    assert poems.poem_form("一二三四五六七。" * 8) == "七言律诗"
    assert poems.poem_form("一二三四五，" * 6) is None
    assert poems.poem_form(QUIET_NIGHT.replace("思故乡", "思乡")) is None


def test_equal_lines():
    assert poems.equal_lines(QUIET_NIGHT)
    assert not poems.equal_lines("床前明月光，疑是霜。")
    assert not poems.equal_lines("床前明月光。")  # one line says nothing


def test_rhyme():
    pytest.importorskip("pypinyin")
    assert poems.rhyme(QUIET_NIGHT) is True                                                   # 霜 shuang, 乡 xiang
    assert poems.rhyme("白日依山尽，黄河入海流。欲穷千里目，更上一层楼。") is True            # 流 liu, 楼 lou
    assert poems.rhyme("床前明月光，疑是地上霜。举头望明月，低头思故里。") is False           # 霜, 里
    assert poems.rhyme("床前明月光，疑是地上霜。举头望明月，低头思秋霜。") is False           # not with itself
    assert poems.rhyme("床前明月光，疑是地上霜。") is None
    assert {"ai", "an"} <= poems.rhyme_classes("还")                                          # every reading counts


def test_quatrain():
    """Four lines of five: right lines, less the lines missing or too many, over four."""
    line, ask_for = "床前明月光", "写一首五言绝句，题目是《春》。"
    got = [quatrain(ask_for, "，".join([line] * n)) for n in (4, 3, 5, 8, 0, 20)]
    assert got == [1.0, 0.5, 0.75, 0.0, -1.0, -1.0]
    assert quatrain(ask_for, "床前明月光，疑是地上。举头望明月，低头思故乡。") == 0.75
    assert quatrain("写一首七言绝句", "，".join([line] * 4)) == 0 and quatrain("你好", "，".join([line] * 4)) == 0
    assert quatrain("写一首七言律诗", "\n".join(["朝辞白帝彩云间"] * 8)) == 1


def test_rhyming():
    """光 霜 望 乡 are of one class (ang), 月 (e) and 天 (an) are not."""
    five = "写一首五言绝句，题目是《春》。"
    whole = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"
    assert rhyming(five, whole) == 1.0
    assert rhyming(five, whole.replace("故乡", "故月")) == 0.5        # the right form alone
    assert rhyming(five, whole.replace("故乡", "落霜")) == 0.5        # 霜 and 霜 is no rhyme
    assert rhyming(five, "床前明月光，疑是地上霜。床前明月光，低头思故乡。") == 0.75   # one line of four said twice
    assert rhyming(five, "床前明月光，疑是地上霜。") == 0.0               # two lines right, two missing
    assert rhyming(five, "床前明月光，疑是地上霜。举头望明月，低头故乡。") == 0.5 * 0.75     # three lines of four are right
    assert rhyming(five, "") == 0.0 and rhyming("你好", whole) == 0.0 and rhyming("写一首七言绝句", whole) == 0.0
    eight = ["床前明月光", "疑是地上霜", "举头望明月", "低头思故乡", "春眠不觉晓", "处处闻啼章", "夜来风雨声", "花落知多天"]
    assert rhyming("写一首五言律诗", "，".join(eight)) == pytest.approx(0.5 + 0.5 * 2 / 3)   # 霜 乡 章 of four ends
