"""
What the tests of the stages share: a tiny run to start from, data folders as prepare.py lays them out, a stage run in
two processes, killed half-way or in two parts, and plain loops over rows of text. Not a test file.
"""
import dataclasses
import gc
import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.checkpoint import load_checkpoint, save_checkpoint
from conftest import ROOT
from model import ModelConfig, Transformer
from tokenizer import render_chat, train_tokenizer


def write_folder(folder, tok, kind, splits):
    """splits: {"train": documents, "val": documents} of (ids, mask); of kind text one row of ids. Return meta.json."""
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
    """splits: {"train": prompts, "val": prompts}, a prompt being its completions [(ids, mask), …], best first."""
    flat = {split: [document for prompt in prompts for document in prompt] for split, prompts in splits.items()}
    write_folder(folder, tok, "pairs", flat)
    for split, prompts in splits.items():
        np.array([g for g, prompt in enumerate(prompts) for _ in prompt], np.int32).tofile(f"{folder}/{split}.group")


def make_run(folder, tok, seed=1, **changes):
    """A folder as sft.py would leave it, with a random model."""
    torch.manual_seed(seed)
    small = dict(vocab_size=448, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=96)
    config = ModelConfig(**{**small, **changes})
    save_checkpoint(f"{folder}/ckpt.pt", {
        "stage": "sft", "step": 1, "model": Transformer(config).state_dict(),
        "model_config": dataclasses.asdict(config), "config": {}, "lora": None, "fingerprint": tok.fingerprint,
        "best_val": 1.0})
    tok.save(f"{folder}/tokenizer.model")


def completions(tok, i, K):
    """K answers to prompt i: the more 好 and the fewer 坏, the better. Their lengths differ."""
    turns = [{"role": "user", "content": f"{i}春夜"}]
    return [render_chat(tok, turns + [{"role": "assistant", "content": "好" * (K - k) + "坏" * 2 * k + "月" * (i % 3)}])
            for k in range(K)]


def write_uneven(folder, tok):
    """160 prompts, of which the 80 of the first micro-step of batch_size 80 have long answers, the others short ones:
    the first need several forward passes of 4,096 tokens, the others one."""
    from common.data import shuffled
    long = set(shuffled(160, 0, 80, 1234).tolist())
    prompts = []
    for i in range(160):
        turns = [{"role": "user", "content": f"{i % 10}春"}]
        fill = "月" * (45 if i in long else 1)
        prompts.append([render_chat(tok, turns + [{"role": "assistant", "content": word + fill}]) for word in "好坏"])
    write_pairs(folder, tok, {"train": prompts, "val": prompts[:3]})


@pytest.fixture(autouse=True)
def one_thread(repeatable):
    """Products this small only wait for a second thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with data/ (prompts with 2, 3 and 4 answers) and the run base/; and the tokenizer."""
    root = str(tmp_path_factory.mktemp("pairs"))
    tok = train_tokenizer(["春夜月好坏。0123456789 user assistant system\n"], f"{root}/tok", 300, character_coverage=1.0)
    prompts = [completions(tok, i, (2, 4, 3, 2)[i % 4]) for i in range(40)]
    write_pairs(f"{root}/data", tok, {"train": prompts[:28], "val": prompts[28:]})
    make_run(f"{root}/base", tok)
    return root, tok


def run_in_two(script, out_dir, settings, seconds=180):
    """Run a stage in two processes that talk over gloo, as torchrun would start them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [f"--{k}={v}" for k, v in {**settings, "out_dir": out_dir}.items()]
    ranks = [subprocess.Popen([sys.executable, os.path.join(ROOT, script), *words], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "RANK": str(rank),
                                   "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
             for rank in range(2)]
    try:
        for rank in ranks:
            output = rank.communicate(timeout=seconds)[0]
            assert rank.returncode == 0, output
    finally:
        for rank in ranks:
            rank.kill()


def forget_run():
    """Let go of what a run holds as long as its process lives: signal handlers, and with them the lock on out_dir."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.collect()


def run_with_a_break(stage, cfg, after, monkeypatch):
    """Run a stage, ended in the middle of a step some time after its checkpoint of step `after`; then run it again."""
    real = stage.log

    def log(cfg, env, step, record):
        if step == after + 1:
            raise KeyboardInterrupt
        real(cfg, env, step, record)

    monkeypatch.setattr(stage, "log", log)
    with pytest.raises(KeyboardInterrupt):
        stage.main(cfg)
    forget_run()
    assert load_checkpoint(cfg.out_dir)["step"] == after
    monkeypatch.setattr(stage, "log", real)
    stage.main(cfg)


def check_ten_and_ten(stage, cfg):
    """Run a stage for 20 steps, and for 10 and then 10 more: the same checkpoint, bit for bit, and the same log."""
    parts = dataclasses.replace(cfg, out_dir=f"{cfg.out_dir}-parts")
    stage.main(dataclasses.replace(cfg, max_steps=20))
    stage.main(dataclasses.replace(parts, max_steps=10))
    forget_run()
    assert load_checkpoint(parts.out_dir)["step"] == 10
    stage.main(dataclasses.replace(parts, max_steps=20))
    assert_same(load_checkpoint(cfg.out_dir), load_checkpoint(parts.out_dir))
    assert read_log(cfg.out_dir) == read_log(parts.out_dir)
    assert read_log(cfg.out_dir)[-1]["step"] == 20


def gradient(checkpoint, optimizer=0):
    """The gradient of a run's first step as one vector: AdamW's first moment is then a tenth of it."""
    moments = [state["exp_avg"].flatten() for state in checkpoint["optimizers"][optimizer]["state"].values()]
    return 10 * torch.cat(moments)


def flat_gradient(loss, model):
    """d loss / d parameters as one vector in the order of make_optimizers: matrices, then gains and biases."""
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


TIMES = ("tok/s", "seconds", "generate_share", "score_share")


def read_log(out_dir):
    """The records of log.jsonl without the times."""
    with open(os.path.join(out_dir, "log.jsonl")) as f:
        return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in f]
