"""
What the tour reads: the reader's own runs and data, or small ones where there are none yet; and how it shows tokens.
"""
import os

from learn import links, small
from tokenizer import render_chat

# the quickstart's runs; where one is missing, the small one takes its place
QUICKSTART = {"pretrain": "out/poems", "sft": "out/poems-sft", "reward": "out/poems-reward"}
DATA = {"text": "data/poems", "sft": "data/poems-sft"}
QUESTION = "“{line}”的下一句是什么？"


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


def prompt_ids(tokenizer, line):
    """The chat's question about a line, up to where the assistant begins."""
    turns = [{"role": "user", "content": QUESTION.format(line=line)}]
    return render_chat(tokenizer, turns, add_generation_prompt=True)[0]


def next_line(line):
    """The line that follows in poems.txt, or the best known one."""
    for poem in small.POEMS:
        for a in (0, 12):
            if poem[a:a + 5] == line:
                return poem[a + 6:a + 11] + "。"
    return "疑是地上霜。"
