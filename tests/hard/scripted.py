"""A model that says what it is told to, for the tests of sample.py. Not a test file."""
import os
import types

import pytest

import sample
from common.checkpoint import load_model
from common.generate import generate
from sample import Config, chat
from small_runs import CPU, make_run
from tokenizer import render_chat, train_tokenizer


def make_stage(folder, tok, stage, age=0):
    """A run of a stage, `age` seconds older than the newest."""
    make_run(folder, tok, stage=stage)
    os.utime(f"{folder}/ckpt.pt", (1e9 - age, 1e9 - age))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the runs out/old and out/new; the model and the tokenizer of both. 霜 is three tokens."""
    root = tmp_path_factory.mktemp("sample")
    tok = train_tokenizer(["春夜月好坏。0123456789 user assistant system\n"], str(root / "tok"), 300, character_coverage=1.0)
    assert len(tok.encode("霜")) == 3 and len(tok.encode("月")) == 1
    for age, name in enumerate(("new", "old")):
        make_stage(str(root / "out" / name), tok, "pretrain", age)
    return root, load_model(str(root / "out/new"))[0], tok


class Script:
    """Stands for a model and for generate(): answers what it is told to, and remembers what it was asked."""
    def __init__(self, tok, *answers, max_seq_len=1000):
        self.tok, self.answers, self.prompts, self.settings = tok, list(answers), [], []
        self.config = types.SimpleNamespace(max_seq_len=max_seq_len)
        self.trained_len = max_seq_len

    def generate(self, prompts, max_new_tokens, on_token=None, **settings):
        self.prompts += prompts
        self.settings.append(settings)
        rows = [self.answers.pop(0) for _ in prompts]
        rows = [row if isinstance(row, list) else self.tok.encode(row) + [self.tok.im_end_id] for row in rows]
        for i in rows[0] if on_token else ():
            if i == "Ctrl-C":
                raise KeyboardInterrupt
            on_token([i])
        return rows


@pytest.fixture(autouse=True)
def scripted(monkeypatch):
    """A Script speaks for itself, a model through generate()."""
    def speak(model, *args, **settings):
        return model.generate(*args, **settings) if isinstance(model, Script) else generate(model, *args, **settings)
    monkeypatch.setattr(sample, "generate", speak)


def talk(model, tok, lines, monkeypatch, **settings):
    lines = list(lines)

    def read():  # without a prompt: input() would write it to stdout
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("builtins.input", read)
    chat(model, tok, Config(chat=True, **settings), CPU)


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def rendered(tok, messages):
    return render_chat(tok, messages, add_generation_prompt=True)[0]
