"""
What the tour reads: the reader's own runs and data, or small ones where there are none yet; and how it shows tokens.
"""
import os

from learn import links, small

# the quickstart's runs; where one is missing, the small one takes its place
QUICKSTART = {"pretrain": "out/poems", "sft": "out/poems-sft", "reward": "out/poems-reward"}
DATA = {"text": "data/poems", "sft": "data/poems-sft"}
QUESTION = "“{line}”的下一句是什么？"
WRITE = "写一首五言绝句，题目是《静夜思》。"


def run_of(stage):
    """Return the folder of the reader's own run of a stage, or of a small one."""
    folder = QUICKSTART[stage]
    if os.path.exists(os.path.join(folder, "ckpt.pt")):
        return folder
    small_folder = small.SETTINGS[stage]["out_dir"]
    if not os.path.exists(os.path.join(small_folder, "ckpt.pt")):
        print(f"没有 {folder}（bash runs/quickstart.sh 会训练它）：先训练一个小的，几秒钟……", flush=True)
    return small.make_run(stage)


def data_of(kind):
    if os.path.exists(os.path.join(DATA[kind], "meta.json")):
        return DATA[kind]
    return small.make_data(kind)


def show(tokenizer, i):
    """A token as a reader sees it."""
    text = tokenizer.pieces[int(i)].decode(errors="backslashreplace")
    return {"\n": "↵", " ": "␣"}.get(text, text)


def read_next(*places):
    """Say which lines of code to open now."""
    found = []
    for name, path in places:
        found.append(f"{path}:{links.line_of(name, os.path.join(links.ROOT, path))} {name}")
    print("接着读：" + "，".join(found))


def ranked(folder, line):
    """Return a question of the kind that this run learned preferences from, and answers to it, the best first: the
    quickstart's runs write poems, the small ones say next lines."""
    if not folder.startswith("out/poems"):
        return QUESTION.format(line=line), [next_line(line), "花落知多少。", line + "。"]
    poem = next((poem for poem in small.POEMS if line in poem), small.POEMS[1])
    a, b, c, d = (poem[i:i + 5] for i in (0, 6, 12, 18))
    return WRITE, [f"{a}，{b}。\n{c}，{d}。", f"{d}，{a}。\n{b}，{c}。", "指人的行为很不好。"]


def next_line(line):
    """The line that follows in poems.txt, or the best known one."""
    for poem in small.POEMS:
        for a in (0, 12):
            if poem[a:a + 5] == line:
                return poem[a + 6:a + 11] + "。"
    return "疑是地上霜。"
