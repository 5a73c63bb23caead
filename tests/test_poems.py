"""recipes/poems.py and rewards.py by examples: lines, forms, rhymes, rewards by rule, what is tidied and spoiled."""
import json
import random

import pytest

from readers.account import Notes
from readers.calls import list_tools
from readers.chats import to_conversation
from recipes import poems, smalltalk
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


def test_make_poem():
    poem = poems.make_poem("唐诗", "折杨柳十首 一（一作柳枝）", "薛能2",
                           ["华清（一作「花（又）清」）高树出离宫，南陌柔条带暖风。", "（以上见《文苑英华》。", "）"])
    assert (poem["title"], poem["author"]) == ("折杨柳十首·其一", "薛能")
    assert poem["body"] == "华清高树出离宫，南陌柔条带暖风。"
    assert poems.make_poem("唐诗", "题", "某", ["月色清且[冷]，桂香落人衣。"])["body"] == "月色清且冷，桂香落人衣。"
    for bad in (["明时好□进，莫滞长卿才。"], ["村旗{牙丿=丶}夸酒，薄升斗窄。"], [], ["空。"], ["见《全唐诗》卷十，今补。"]):
        assert poems.make_poem("唐诗", "题", "某", bad) is None
    assert poems.tidy_title("寄生草・但得黄鸡嫩，白酒熟") == "寄生草"
    assert poems.tidy_title("相和歌辞 猛虎行") == "相和歌辞·猛虎行"


def test_tidy_idiom():
    row = {"word": "阿党比周", "explanation": "指勾结。", "derivation": "三国·魏·曹操《整齐风俗令》阿党比周，先圣所疾也。”",
           "example": "或众～，不可不察。★《论语》"}
    idiom = poems.tidy_idiom(row)
    assert idiom["derivation"] == "三国·魏·曹操《整齐风俗令》：“阿党比周，先圣所疾也。”"
    assert idiom["example"] == "或众阿党比周，不可不察。（《论语》）"
    assert poems.idiom_text(idiom).split("\n")[0] == "成语：阿党比周"
    nothing = poems.tidy_idiom({**row, "derivation": "无", "example": "无。"})
    assert poems.idiom_text(nothing) == "成语：阿党比周\n释义：指勾结。"
    novel = poems.tidy_quotes("《儿女英雄传》第三三回我家虽不宽余。”")
    assert novel == "《儿女英雄传》第三三回：“我家虽不宽余。”"
    assert poems.tidy_quotes("见阿家阿翁”。") == "见阿家阿翁。"


def test_spoiled_poems():
    rng = random.Random(0)
    poem = {"body": QUIET_NIGHT, "form": "五言绝句"}
    other = {"body": "去年今日此门中，人面桃花相映红。\n人面不知何处去，桃花依旧笑春风。", "form": "七言绝句"}
    shuffled = poems.spoil(rng, poem, [other], "shuffled")
    assert shuffled != QUIET_NIGHT and sorted(poems.poem_lines(shuffled)) == sorted(poems.poem_lines(QUIET_NIGHT))
    assert poems.poem_form(poems.spoil(rng, poem, [other], "uneven")) is None
    assert len(set(poems.poem_lines(poems.spoil(rng, poem, [other], "repeated")))) == 2
    assert poems.spoil(rng, poem, [poem, other], "another form") == other["body"]


def test_tool_talks():
    """The call is what the server reads as one; the answer says what the tool said; what was asked is what is called."""
    records = smalltalk.tool_talks(random.Random(0), 200)
    names = set()
    for record in records:
        system, question, call, result, answer = to_conversation(record, Notes())
        (offered,) = record["tools"]
        assert system["content"].strip() == list_tools([offered])
        made = json.loads(call["content"].removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
        assert made["name"] == offered["name"] and made["arguments"].keys() == offered["parameters"].keys()
        assert all(value in question["content"] for value in made["arguments"].values())
        assert result["role"] == "tool" and result["content"] in answer["content"]
        names.add(made["name"])
    assert names == {"get_weather", "get_time"}
