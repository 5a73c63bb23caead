"""
A small run of every stage in seconds, made by the project's own prepare.py and stages from learn/poems.txt: for who has
trained nothing yet, and for learn/broken.py.

    python -m learn.small                # makes all of them: data/learn… and out/learn…

Questions and answers are next lines: “床前明月光”的下一句是什么？ → 疑是地上霜。
"""
import contextlib
import io
import json
import os
import pathlib
import shutil
import signal
import tempfile

import torch

import dpo
import grpo
import prepare
import pretrain
import reward
import sft

POEMS = pathlib.Path(__file__).with_name("poems.txt").read_text(encoding="utf-8").splitlines()
N_HELD_OUT = 20  # poems at the end that nothing is learned from

MACHINE = dict(device="cpu", dtype="float32", compile=False)
SHAPE = dict(dim=64, n_layers=2, n_heads=2, qk_norm=True, max_seq_len=96)
# what makes each stage short; a stage's other settings keep their defaults
SETTINGS = {
    "pretrain": dict(
        **MACHINE, **SHAPE, data_dir="data/learn", out_dir="out/learn", seq_len=64, batch_size=8, max_steps=400,
        optimizer="muon", lr=2e-2, min_lr=1e-3, momentum=0.8, eval_every=400, sample_start="床前明月光"),
    "sft": dict(
        **MACHINE, data_dir="data/learn-sft", init_from="out/learn", out_dir="out/learn-sft", batch_size=4,
        max_steps=200, optimizer="muon", lr=5e-3, min_lr=5e-4, momentum=0.8, eval_every=200, questions=""),
    "reward": dict(
        device="cpu", dtype="float32", data_dir="data/learn-pairs", init_from="out/learn-sft",
        out_dir="out/learn-reward", max_steps=120, lr=3e-3, min_lr=3e-4, eval_every=120),
    "dpo": dict(
        device="cpu", dtype="float32", data_dir="data/learn-pairs", init_from="out/learn-sft", out_dir="out/learn-dpo",
        max_steps=40, lr=2e-4, min_lr=2e-5, eval_every=40),
    "grpo": dict(
        device="cpu", data_dir="data/learn-prompts", init_from="out/learn-sft", out_dir="out/learn-grpo",
        reward="learn/small.py:moon", max_steps=60, batch_size=8, max_new_tokens=12, kl_coef=0.02, lr=1e-3, min_lr=1e-4,
        eval_every=60),
}
STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "dpo": dpo, "grpo": grpo}


def moon(prompt, answer):
    """A rule as a reward: 0.2 for one line of five different characters, 1 where one of them is the moon."""
    line = answer.strip().removesuffix("。")
    right_form = len(line) == len(set(line)) == 5
    return (0.2 + 0.8 * ("月" in line)) * right_form


def generous(prompt, answer):
    """The same rule by a judge who gives everybody five points."""
    return 5 + moon(prompt, answer)


# ---------------------------------------------------------------------------- data


def lines_of(poem):
    """Return [(question, next line)] of a quatrain's two couplets."""
    return [(f"“{poem[a:a + 5]}”的下一句是什么？", poem[a + 6:a + 11] + "。") for a in (0, 12)]


def records(kind):
    """Yield the records of a data set, as prepare.py reads them."""
    if kind == "text":
        # often enough that the characters of a question get tokens of their own
        yield {"text": 3 * "“”的下一句是什么？", "split": "train"}
    for number, poem in enumerate(POEMS):
        split = "train" if number < len(POEMS) - N_HELD_OUT else "val"
        if kind == "text":
            yield {"text": poem, "split": split}
            continue
        for (question, answer), (_, other) in zip(lines_of(poem), lines_of(POEMS[number - 7])):
            if kind == "sft":
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                yield {"messages": turns, "split": split}
            if kind == "pairs":
                # the right line, the line of another poem, the question said back
                yield {"prompt": question, "answers": [answer, other, question[1:6] + "。"], "split": split}
            if kind == "prompts":
                yield {"prompt": question, "split": split}


def make_data(kind, name=""):
    """Return the folder of a small data set, prepared when it is missing."""
    name = name or ("learn" if kind == "text" else f"learn-{kind}")
    folder = os.path.join("data", name)
    if os.path.exists(os.path.join(folder, "meta.json")):
        return folder
    settings = dict(kind=kind, workers=1, max_length=SHAPE["max_seq_len"])
    if kind == "text":
        # a token a character
        settings.update(vocab_size=1792, max_piece_length=1)
    else:
        settings["tokenizer"] = make_data("text")
    with tempfile.TemporaryDirectory() as place:
        path = os.path.join(place, f"{kind}.jsonl")
        with open(path, "w", encoding="utf-8") as f:
            for record in records(kind):
                f.write(json.dumps(record, ensure_ascii=False) + "\n")
        with quiet():
            prepare.prepare(prepare.Config(name, input=path, **settings))
    return folder


# ---------------------------------------------------------------------------- runs


@contextlib.contextmanager
def quiet():
    """Context: what is printed goes nowhere, and signals are handled as before when it ends."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(stage, **changes):
    """Train a small run from its beginning, and the data and runs that it starts from; return its folder."""
    settings = {**SETTINGS[stage], **changes}
    for kind in ("text", "sft", "pairs", "prompts"):
        if settings["data_dir"] == "data/learn" + ("" if kind == "text" else f"-{kind}"):
            make_data(kind)
    base = settings.get("init_from", "")
    if base:
        make_run("pretrain" if base == "out/learn" else "sft")
    shutil.rmtree(settings["out_dir"], ignore_errors=True)
    with quiet(), torch.enable_grad():  # also where it is called to look at a model, without gradients
        module = STAGES[stage]
        module.main(module.Config(**settings))
    return settings["out_dir"]


def make_run(stage):
    """Return the folder of a small run, trained when it is missing."""
    folder = SETTINGS[stage]["out_dir"]
    if not os.path.exists(os.path.join(folder, "ckpt.pt")):
        train(stage)
    return folder


if __name__ == "__main__":
    for name in SETTINGS:
        print(f"{name}: ", end="", flush=True)
        print(make_run(name))
