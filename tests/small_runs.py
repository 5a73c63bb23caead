"""
What the tests of the stages share: one folder with data of every kind and tiny runs to start from, the settings of
a run that takes a second, and comparisons of runs. Not a test file.
"""
import copy
import dataclasses
import gc
import importlib
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common.rollout
from common.checkpoint import load_checkpoint, save_checkpoint
from common.data import Split
from common.distributed import Env
from common.generate import generate
from model import ModelConfig, ScalarModel, Transformer
from tokenizer import render_chat, train_tokenizer

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CPU = Env(0, 1, torch.device("cpu"), torch.float32)
STAGES = ["pretrain", "sft", "reward", "ppo", "grpo", "dpo"]
TALKS = [("春夜", "山中一夜雨，树杪百重泉。"), ("你是谁？", "我是明月。"), ("守株待兔是什么意思？", "比喻妄想不劳而得。"),
         ("背诵静夜思", "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"), ("你好", "你好！"), ("猪鼻子插葱", "装象。")]
MOE = dict(n_kv_heads=0, qk_norm=True, tie_embeddings=False, n_experts=4, n_active_experts=2, expert_hidden_dim=16)


# ---------------------------------------------------------------------------- data folders, runs


def write_folder(folder, tok, kind, splits):
    """splits: {"train": documents, "val": documents} of (ids, mask); of kind text one row of ids."""
    os.makedirs(folder)
    meta = {"kind": kind, "dtype": "uint16", "fingerprint": tok.fingerprint, "vocab_size": tok.vocab_size,
            "tokenizer": "tokenizer.model"}
    for split, documents in splits.items():
        if kind == "text":
            np.array(documents, "<u2").tofile(f"{folder}/{split}.bin")
            meta[split] = {"tokens": len(documents), "documents": 1, "bytes": 3 * len(documents)}
            continue
        np.array([i for ids, _ in documents for i in ids], "<u2").tofile(f"{folder}/{split}.bin")
        idx = np.cumsum([0] + [len(ids) for ids, _ in documents]).astype(np.int64)
        idx.tofile(f"{folder}/{split}.idx")
        if kind != "prompts":
            np.array([m for _, mask in documents for m in mask], np.uint8).tofile(f"{folder}/{split}.mask")
        meta[split] = {"tokens": int(idx[-1]), "documents": len(documents)}
    with open(f"{folder}/meta.json", "w") as f:
        json.dump(meta, f)
    tok.save(f"{folder}/tokenizer.model")


def write_pairs(folder, tok, splits):
    """splits: {"train": prompts, "val": prompts}, a prompt being its answers [(ids, mask), …], best first."""
    flat = {split: [document for prompt in prompts for document in prompt] for split, prompts in splits.items()}
    write_folder(folder, tok, "pairs", flat)
    for split, prompts in splits.items():
        np.array([g for g, prompt in enumerate(prompts) for _ in prompt], np.int32).tofile(f"{folder}/{split}.group")


def make_run(folder, tok, seed=1, stage="sft", **changes):
    """A folder as a stage would leave it, with a random model."""
    torch.manual_seed(seed)
    small = dict(vocab_size=448, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=256)
    config = ModelConfig(**{**small, **changes})
    model = ScalarModel(config) if stage == "reward" else Transformer(config)
    save_checkpoint(f"{folder}/ckpt.pt", {
        "stage": stage, "step": 1, "model": model.state_dict(), "model_config": dataclasses.asdict(config),
        "config": {}, "lora": None, "fingerprint": tok.fingerprint, "best_val": 1.0})
    tok.save(f"{folder}/tokenizer.model")


def conversation(i):
    """One turn, or three where i is a multiple of 5; some with a system turn."""
    turns = [{"role": "system", "content": "你是诗人。"}] if i % 4 == 0 else []
    for j in range(3 if i % 5 == 0 else 1):
        question, answer = TALKS[(i + j) % len(TALKS)]
        turns += [{"role": "user", "content": f"{i}{question}"}, {"role": "assistant", "content": answer * (1 + i % 2)}]
    return turns


def ranked_answers(tok, i, K):
    """K answers to prompt i: the more 好 and the fewer 坏, the better. Their lengths differ."""
    turns = [{"role": "user", "content": f"{i}春夜"}]
    return [render_chat(tok, turns + [{"role": "assistant", "content": "好" * (K - k) + "坏" * 2 * k + "月" * (i % 3)}])
            for k in range(K)]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with text/, talks/, pairs/ (prompts with 2, 3 and 4 answers), prompts/, the runs base/ and reward/,
    a rule in rule.py; and the tokenizer."""
    root = str(tmp_path_factory.mktemp("place"))
    letters = "".join(q + a for q, a in TALKS) + "春夜月好坏你是诗人。0123456789 user assistant system\n"
    tok = train_tokenizer([letters], f"{root}/tok", 420, character_coverage=1.0)
    text = tok.encode("".join(q + a for q, a in TALKS))
    write_folder(f"{root}/text", tok, "text", {"train": text * 30, "val": text * 3})
    talks = [render_chat(tok, conversation(i)) for i in range(48)]
    write_folder(f"{root}/talks", tok, "sft", {"train": talks[:40], "val": talks[40:]})
    answers = [ranked_answers(tok, i, (2, 4, 3, 2)[i % 4]) for i in range(40)]
    write_pairs(f"{root}/pairs", tok, {"train": answers[:28], "val": answers[28:]})
    rows = [render_chat(tok, [{"role": "user", "content": "春夜" * (1 + i % 3)}], add_generation_prompt=True)
            for i in range(24)]
    write_folder(f"{root}/prompts", tok, "prompts", {"train": rows, "val": rows[:8]})
    make_run(f"{root}/base", tok)
    make_run(f"{root}/reward", tok, stage="reward")
    with open(f"{root}/rule.py", "w", encoding="utf-8") as f:
        f.write("def length(prompt, answer):\n    assert '春夜' in prompt\n    return -len(answer)\n")
    return root, tok


ALL = dict(max_steps=8, warmup_steps=2, lr=1e-3, grad_accum=2, eval_every=4, device="cpu")
ANSWERS = dict(data_dir="prompts", init_from="base", batch_size=4, max_new_tokens=8, eval_prompts=4)
SETTINGS = {
    "pretrain": dict(data_dir="text", dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, max_seq_len=32,
                     batch_size=4, eval_tokens=300, dtype="float32", compile=False),
    "sft": dict(data_dir="talks", init_from="base", batch_size=1, seq_len=128, questions="", dtype="float32",
                compile=False),
    "reward": dict(data_dir="pairs", init_from="base", batch_size=4, dtype="float32"),
    "dpo": dict(data_dir="pairs", init_from="base", batch_size=4, dtype="float32"),
    "ppo": dict(ANSWERS, reward_from="reward"),
    "grpo": dict(ANSWERS, reward="rule.py:length", group_size=2)}
PATHS = ("data_dir", "init_from", "reward_from", "reward", "watch", "teacher", "ptx_dir", "out_dir")


def settings(root, stage, out, **changes):
    """Return the Config of a short run of a stage. Paths are relative to root."""
    values = {**ALL, **SETTINGS[stage], "out_dir": out, **changes}
    for name in PATHS:
        if values.get(name):
            values[name] = ",".join(os.path.join(root, part) for part in values[name].split(","))
    return importlib.import_module(stage).Config(**values)


def run(cfg):
    """Run the stage that a Config belongs to; return its checkpoint and its log."""
    importlib.import_module(type(cfg).__module__).main(cfg)
    forget_run()
    return load_checkpoint(cfg.out_dir), read_log(cfg.out_dir)


def forget_run():
    """Let go of what a run holds as long as its process lives: signal handlers, and with them the lock on out_dir."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    gc.collect()


def refused(cfg):
    """Run a stage that must end with an error in one line; return it."""
    try:
        run(cfg)
        message = ""
    except SystemExit as left:
        message = str(left)  # not the exception itself: its traceback would keep the run's env, and with it the lock
    forget_run()
    assert message.startswith("error: ") and "\n" not in message
    return message


# ---------------------------------------------------------------------------- plain loops and comparisons


def gradient(checkpoint, optimizer=0):
    """The gradient of a run's first step as one vector: AdamW's first moment is then a tenth of it."""
    moments = [state["exp_avg"].flatten() for state in checkpoint["optimizers"][optimizer]["state"].values()]
    return 10 * torch.cat(moments)


def flat_gradient(loss, model):
    """d loss / d parameters as one vector in the order of make_adamw: matrices, then norm weights and biases."""
    params = [p for p in model.parameters() if p.requires_grad]
    params = [p for p in params if p.ndim >= 2] + [p for p in params if p.ndim < 2]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])


def mean_nll(model, documents):
    """Mean nats of the learned tokens of documents (ids, mask), one document at a time, from whole logits."""
    nats = 0.0
    n_learned = 0
    for ids, mask in documents:
        ids = torch.tensor(np.asarray(ids))
        logits = model.logits(model(ids[None, :-1]))[0]
        nll = F.cross_entropy(logits, ids[1:], reduction="none")
        for place, learned in enumerate(np.asarray(mask)[1:]):
            if learned:
                nats = nats + nll[place]
                n_learned += 1
    return nats / n_learned


def assert_same(a, b, atol=0.0, path=""):
    """Compare two checkpoints, or parts of them: equal, or tensors and floats closer than atol."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key != "out_dir":
                assert_same(a[key], b[key], atol, f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, atol, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        difference = (a.double() - b.double()).abs().max().item()
        assert difference <= atol, f"{path} differs by {difference}"
    elif isinstance(a, float):
        assert a == b or abs(a - b) <= atol, f"{path}: {a} and {b}"
    else:
        assert a == b, f"{path}: {a} and {b}"


TIMES = ("tok/s", "seconds", "generate_share")


def read_log(out_dir):
    """The records of log.jsonl without the times."""
    with open(os.path.join(out_dir, "log.jsonl"), encoding="utf-8") as f:
        return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in f]


def spy(monkeypatch, module, name):
    """Return a list that gets (arguments, result) of every call of a function of a module."""
    calls = []
    real = getattr(module, name)

    def call(*args, **kwargs):
        result = real(*args, **kwargs)
        calls.append((args, result))
        return result

    monkeypatch.setattr(module, name, call)
    return calls


# ---------------------------------------------------------------------------- reinforcement learning on toy models


def toy_models(vocab=16, head_std=0.0):
    """A policy whose tokens are all as likely (head_std 0: the optimum then has a closed form), its copy, and a
    critic."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=vocab, dim=32, n_layers=1, n_heads=2, max_seq_len=16, tie_embeddings=False)
    actor, reference = Transformer(config), Transformer(config)
    torch.nn.init.normal_(actor.lm_head.weight, std=head_std)
    reference.load_state_dict(actor.state_dict())
    return actor, reference.requires_grad_(False), ScalarModel(config)


def count_small(documents):
    """A reward: how many of the answer's tokens are below 4."""
    return torch.tensor([float(sum(t < 4 for t, m in zip(ids, mask) if m)) for ids, mask in documents])


@pytest.fixture
def play(monkeypatch, tmp_path, place):
    """A function that runs ppo or grpo on given models, prompts (one after the other, from the first) and rewards, and
    returns the checkpoint and the log. An answer ends with the id stop or stop - 1; at -1 none does."""
    def play(stage, models, prompts=((5,),), stop=-1, scorer=count_small, **changes):
        toy = dict(batch_size=32, max_new_tokens=8, ppo_epochs=2, minibatches=2, kl_coef=0.5, lr=3e-3, min_lr=3e-4,
                   warmup_steps=1, max_steps=1, seed=1, no_eos_penalty=0.0, eval_prompts=0, device="cpu",
                   reward="given", out_dir=str(tmp_path / str(len(os.listdir(tmp_path)))))
        toy |= dict(critic_lr=3e-3) if stage.STAGE == "ppo" else {}
        actor, reference, critic = models
        loaded = iter([actor, reference])
        idx = np.cumsum([0] + [len(p) for p in prompts])
        train = Split(np.array([t for p in prompts for t in p]), None, idx, None, {})
        val = Split(np.zeros(0), None, np.zeros(1, dtype=np.int64), None, {})
        words = copy.copy(place[1])
        words.im_end_id = stop
        words.eot_id = stop - 1
        words.pad_id = 0
        monkeypatch.setattr(stage, "load_model", lambda *_: (next(loaded), words, {}))
        monkeypatch.setattr(stage, "load_reward_model", lambda *_: critic, raising=False)
        monkeypatch.setattr(stage, "make_scorer", lambda *_: scorer)
        monkeypatch.setattr(stage, "open_data", lambda *_, **__: (train, val, {}))
        in_turn = lambda n, first, count, seed: np.arange(first, first + count) % n  # noqa: E731
        monkeypatch.setattr(common.rollout, "shuffled", in_turn)
        return run(stage.Config(**{**toy, **changes}))

    return play


def gibbs_error(models, temperature=1.0, kl_coef=0.5, n=2000):
    """How far the policy is from the optimum of E[count_small] - kl_coef * KL, the Gibbs distribution
    pi = q exp(reward / kl_coef) / Z (Korbak et al. 2022), at the place where it is farthest.

    The reward counts tokens below 4, so every place is alike: p* = q e^(1/c) / (q e^(1/c) + 1 - q), whatever came
    before. """
    actor, reference, _ = models
    rows = torch.tensor(generate(actor, [[5]] * n, 8, temperature=temperature, seed=7))
    ids = torch.cat([torch.full((n, 1), 5), rows], dim=1)[:, :-1]
    p, q = ((model.logits(model(ids)) / temperature).softmax(-1)[:, :, :4].sum(-1).detach()
            for model in (actor, reference))
    factor = math.exp(1 / kl_coef)
    best = q * factor / (q * factor + 1 - q)
    return (p - best).mean(0).abs().max().item()
