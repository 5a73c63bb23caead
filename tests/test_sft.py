import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sft
from common.checkpoint import load_checkpoint, save_checkpoint
from common.distributed import Env
from configurator import changed
from conftest import ROOT
from common.data import Split, open_data
from common.loss import cross_entropy
from model import ModelConfig, Transformer
from pairs import check_ten_and_ten, forget_run, write_folder
from tokenizer import render_chat, train_tokenizer

CPU = Env(0, 1, torch.device("cpu"), torch.float32)
TALKS = [("春夜", "山中一夜雨，树杪百重泉。"), ("你是谁？", "我是明月。"), ("守株待兔是什么意思？", "比喻妄想不劳而得。"),
         ("背诵静夜思", "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"), ("你好", "你好！"), ("猪鼻子插葱", "装象。")]


def conversation(i):
    """One turn, or three where i is a multiple of 5; some with a system turn."""
    turns = [{"role": "system", "content": "你是诗人。"}] if i % 4 == 0 else []
    for j in range(3 if i % 5 == 0 else 1):
        question, answer = TALKS[(i + j) % len(TALKS)]
        turns += [{"role": "user", "content": f"{i}{question}"}, {"role": "assistant", "content": answer * (1 + i % 2)}]
    return turns


@pytest.fixture(autouse=True)
def quick(repeatable):
    torch.set_num_threads(1)


def write_base(folder, tok, config):
    """A folder as pretrain.py would leave it, with a random model."""
    torch.manual_seed(1)
    save_checkpoint(f"{folder}/ckpt.pt", {
        "stage": "pretrain", "step": 1, "model": Transformer(config).state_dict(), "lora": None,
        "model_config": dataclasses.asdict(config), "config": {}, "fingerprint": tok.fingerprint, "best_val": 9.0})
    tok.save(f"{folder}/tokenizer.model")


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with data/ and the tiny run base/, as prepare.py and pretrain.py would leave them; and the tokenizer."""
    root = str(tmp_path_factory.mktemp("sft"))
    tok = train_tokenizer(["".join(q + a for q, a in TALKS) + "你是诗人。0123456789 user assistant system"],
                          f"{root}/tok", 420, character_coverage=1.0)
    talks = [render_chat(tok, conversation(i)) for i in range(48)]
    write_folder(f"{root}/data", tok, "sft", {"train": talks[:40], "val": talks[40:]})
    write_base(f"{root}/base", tok, ModelConfig(vocab_size=448, dim=32, n_layers=2, n_heads=4, n_kv_heads=2,
                                                max_seq_len=256))
    return root, tok


def settings(root, **changes):
    defaults = dict(data_dir=f"{root}/data", init_from=f"{root}/base", out_dir=f"{root}/run", batch_size=2,
                    grad_accum=2, max_steps=4, decay_steps=1, warmup_steps=0, lr=1e-3, questions="", device="cpu",
                    dtype="float32", compile=False)
    return sft.Config(**{**defaults, **changes})


def setup(place, **changes):
    root, tok = place
    cfg = settings(root, seq_len=256, **changes)
    train, val, _ = open_data(cfg.data_dir, "sft")
    checkpoint = load_checkpoint(cfg.init_from)
    model = Transformer(ModelConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    return cfg, train, model, tok


def loss_of(model, batch):
    """Sum of nats over the learned targets of get_batch()."""
    ids, targets, mask, docs = batch
    return cross_entropy(model(ids, docs), model.head_weight, targets, mask)


def gradients(model):
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_close(a, b, atol):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= atol, name


# ---------------------------------------------------------------------------- packing


@pytest.mark.parametrize("seq_len", [256, 512])
def test_packing_covers_every_conversation_once_and_wastes_little(seq_len):
    rng = np.random.default_rng(3)
    lengths = np.clip(rng.lognormal(4.0, 0.6, 20_000), 12, 900).astype(np.int64)  # mean 65, as the poems recipe
    fits = np.flatnonzero(lengths <= seq_len)
    rows = sft.pack(lengths, seq_len, 1, 0)
    assert sorted(i for row in rows for i in row) == fits.tolist()
    assert max(lengths[row].sum() for row in rows) <= seq_len
    assert 1 - lengths[fits].sum() / len(rows) / seq_len < 0.05
    assert rows == sft.pack(lengths, seq_len, 1, 0)
    assert rows != sft.pack(lengths, seq_len, 1, 1)


def test_packing_fills_gaps_exactly():
    lengths = np.array([6, 6, 4, 4, 11, 10, 0])  # 11 does not fit, 0 teaches nothing
    rows = sft.pack(lengths, 10, 0)
    assert sorted(lengths[row].tolist() for row in rows) == [[6, 4], [6, 4], [10]]
    assert sorted(sum(rows, [])) == [0, 1, 2, 3, 5]


def test_targets_follow_inputs_and_learn_the_answers_alone(place):
    cfg, train, model, tok = setup(place)
    ids, targets, mask, docs = sft.get_batch(train, [[0, 1], [5]], cfg.seq_len, tok.pad_id, CPU)
    assert ids.shape == targets.shape == mask.shape == docs.shape == (2, 256)
    for row, numbers in enumerate([[0, 1], [5]]):
        for number, i in enumerate(numbers, 1):
            here = docs[row] == number
            whole, _ = render_chat(tok, conversation(i))
            assert ids[row][here].tolist() == whole[:-1] and targets[row][here].tolist() == whole[1:]
            answers = "".join(m["content"] + "<|im_end|>" for m in conversation(i) if m["role"] == "assistant")
            assert tok.decode(targets[row][here & (mask[row] > 0)].tolist()) == answers
    padding = docs == 0
    assert padding.any() and mask[padding].sum() == 0 and (ids[padding] == tok.pad_id).all()
    # what a learned target follows is the end of the header or the answer so far, never another conversation
    first = mask[0].nonzero()[0].item()
    assert tok.decode(ids[0, :first + 1].tolist()).endswith("<|im_start|>assistant\n")


def test_packed_rows_equal_each_conversation_alone(place):
    cfg, train, model, tok = setup(place)
    rows = [[3, 0, 7], [5, 12], []]  # and a row of nothing but padding
    ids, targets, mask, docs = batch = sft.get_batch(train, rows, cfg.seq_len, tok.pad_id, CPU)
    packed = loss_of(model, batch)
    packed.backward()
    packed_grads = gradients(model)
    alone = 0.0
    for i in sum(rows, []):
        whole, learned = (torch.tensor(x) for x in render_chat(tok, conversation(i)))
        logits = model.logits(model(whole[None, :-1]))[0]
        alone = alone + (F.cross_entropy(logits, whole[1:], reduction="none") * learned[1:]).sum()
    alone.backward()
    assert abs(packed - alone) / mask.sum() <= 2e-5
    assert_close(packed_grads, gradients(model), 2e-5 * mask.sum())


def test_no_loss_and_no_sight_across_borders(place):
    cfg, train, model, tok = setup(place)
    ids, targets, mask, docs = sft.get_batch(train, [[1, 2]], cfg.seq_len, tok.pad_id, CPU)
    second = docs == 2
    with torch.no_grad():
        before = model.logits(model(ids, docs=docs))[second]
        others = torch.where(docs == 1, (ids + 17) % 400, ids)
        assert torch.equal(before, model.logits(model(others, docs=docs))[second])
    border = (docs == 1).nonzero()[-1]  # the last input of the first conversation predicts its own last token
    assert targets[tuple(border)] == train.document(1)[0][-1]


def test_micro_steps_do_not_change_the_mean(place):
    """Two rows at once = one after the other, though they learn different numbers of tokens."""
    cfg, train, model, tok = setup(place)
    rows = [[0, 5], [4]]
    ids, targets, mask, docs = sft.get_batch(train, rows, cfg.seq_len, tok.pad_id, CPU)
    assert mask[0].sum() != mask[1].sum()
    loss_of(model, (ids, targets, mask / mask.sum(), docs)).backward()
    together = gradients(model)
    learned = np.add.reduceat(train.mask, train.idx[:-1], dtype=np.int64)
    assert learned[sum(rows, [])].sum() == mask.sum()
    for row in rows:
        x, y, m, d = sft.get_batch(train, [row], cfg.seq_len, tok.pad_id, CPU)
        loss_of(model, (x, y, m / learned[sum(rows, [])].sum(), d)).backward()
    assert_close(together, gradients(model), 1e-6)


# ---------------------------------------------------------------------------- evaluation


def test_loss_by_hand():
    class Counter(torch.nn.Module):  # hidden state = one-hot of the input; the head says: the next token is id + 1
        config = ModelConfig(vocab_size=8, dim=8, n_heads=1)
        head_weight = torch.eye(8).roll(1, 0) * 2

        def forward(self, ids, docs):
            return F.one_hot(ids, 8).float()

    # documents 1 2 3 | 4 5 5 | 6 0; learned: 3, 5, 5, 0; foreseen: 3 and the first 5, 2 of 4
    split = Split(np.array([1, 2, 3, 4, 5, 5, 6, 0]), np.array([0, 0, 1, 0, 1, 1, 0, 1], np.uint8),
                  np.array([0, 3, 6, 8]), None, {})
    cfg = sft.Config(seq_len=4, batch_size=1)
    loss = sft.evaluate(Counter(), split, [[0, 1], [2]], cfg, 7, CPU)
    right, wrong = np.log(np.exp(2) + 7) - 2, np.log(np.exp(2) + 7)
    assert loss == pytest.approx((2 * right + 2 * wrong) / 4, abs=1e-6)


# ---------------------------------------------------------------------------- whole runs


def run(cfg):
    sft.main(cfg)
    forget_run()
    return load_checkpoint(cfg.out_dir)


def read_log(cfg):
    with open(f"{cfg.out_dir}/log.jsonl") as f:
        return [json.loads(line) for line in f]


def assert_same_run(a, b):
    assert a["step"] == b["step"] and a["best_val"] == b["best_val"]
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    for x, y in zip(a["optimizers"], b["optimizers"]):
        for i in x["state"]:
            assert all(torch.equal(x["state"][i][k], y["state"][i][k]) for k in x["state"][i])


def check_resume(root, name, **changes):
    whole = run(settings(root, out_dir=f"{root}/{name}-whole", eval_every=2, **changes))
    run(settings(root, out_dir=f"{root}/{name}-parts", eval_every=2, **{**changes, "max_steps": 2}))
    parts = run(settings(root, out_dir=f"{root}/{name}-parts", eval_every=2, **changes))
    assert_same_run(whole, parts)
    return whole


def check_two_ranks(root, name, **changes):
    """The gradients of the first step (AdamW's first moment is a tenth of them) and the losses agree to 1e-6."""
    one = settings(root, out_dir=f"{root}/{name}-one", max_steps=1, grad_clip=0.0, **changes)
    two = dataclasses.replace(one, out_dir=f"{root}/{name}-two")
    a = run(one)
    words = [f"--{key}={value}" for key, value in changed(two).items()]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           os.path.join(ROOT, "sft.py"), *words], capture_output=True, text=True, timeout=180,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    b = load_checkpoint(two.out_dir)
    first, second = a["optimizers"][0]["state"], b["optimizers"][0]["state"]
    assert first.keys() == second.keys() and len(first) > 0
    for i in first:
        assert (first[i]["exp_avg"] - second[i]["exp_avg"]).abs().max() * 10 <= 1e-6
    for x, y in zip(read_log(one), read_log(two), strict=True):
        for key in ("loss", "val_loss"):
            assert x[key] == pytest.approx(y[key], abs=1e-6), key
        assert x["norm"] == pytest.approx(y["norm"], abs=1e-5)


def test_learns_and_answers(place, capsys):
    root, tok = place
    cfg = settings(root, out_dir=f"{root}/learn", max_steps=0, epochs=12, lr=1e-2, batch_size=4, grad_accum=1,
                   questions="你是谁？|你好", eval_every=20)
    checkpoint = run(cfg)
    printed = capsys.readouterr().out
    records = read_log(cfg)
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    assert "val_loss" in records[-1]
    assert checkpoint["step"] == checkpoint["config"]["max_steps"] == len(records)
    assert "question: 你好\n  answer: " in printed and "40 conversations (0 longer than a row left out)" in printed
    assert os.path.exists(f"{root}/learn/best.pt") and os.path.exists(f"{root}/learn/tokenizer.model")


def spy_on_batches(monkeypatch):
    """Return a list that gets the training conversations in the order they are read."""
    seen, real = [], sft.get_batch

    def spy(split, rows, T, pad_id, env):
        if len(split) == 40:
            seen.extend(i for row in rows for i in row)
        return real(split, rows, T, pad_id, env)

    monkeypatch.setattr(sft, "get_batch", spy)
    return seen


def test_every_epoch_visits_every_conversation_once_in_new_rows(place, monkeypatch):
    seen = spy_on_batches(monkeypatch)
    run(settings(place[0], out_dir=f"{place[0]}/epochs", max_steps=0, epochs=2.0, batch_size=1, grad_accum=1))
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40))
    assert seen[:40] != seen[40:]


def test_the_loss_of_a_step_is_the_mean_over_its_conversations_alone(place, monkeypatch):
    cfg, _, model, tok = setup(place, out_dir=f"{place[0]}/mean", max_steps=1, grad_accum=2)
    seen = spy_on_batches(monkeypatch)
    run(cfg)
    nats = learned_tokens = 0.0
    for i in seen:
        whole, learned = (torch.tensor(x) for x in render_chat(tok, conversation(i)))
        nll = F.cross_entropy(model.logits(model(whole[None, :-1]))[0], whole[1:], reduction="none")
        nats, learned_tokens = nats + (nll * learned[1:]).sum().item(), learned_tokens + learned[1:].sum().item()
    assert len(seen) > 8
    assert read_log(cfg)[0]["loss"] == pytest.approx(nats / learned_tokens, abs=2e-5)


def test_resume_bit_for_bit(place):
    check_resume(place[0], "resume")


def test_ten_and_ten_steps_are_twenty(place):
    check_ten_and_ten(sft, settings(place[0], out_dir=f"{place[0]}/ten", eval_every=10))


def test_muon_resumes_bit_for_bit(place):
    """Its momentum is kept, and that of AdamW, which has the embeddings and the gains, at a rate of its own."""
    whole = check_resume(place[0], "muon", optimizer="muon", adam_lr=5e-4, weight_decay=0.1)
    adam, muon = whole["optimizers"]
    assert len(muon["state"]) == 2 * 4 and all(set(state) == {"momentum"} for state in muon["state"].values())
    assert all(state["momentum"].abs().max() > 0 for state in muon["state"].values())
    assert {group["lr"] for group in adam["param_groups"]} == {5e-4} and muon["param_groups"][0]["lr"] == 1e-3
    check_ten_and_ten(sft, settings(place[0], out_dir=f"{place[0]}/ten-muon", eval_every=10, optimizer="muon"))


def test_two_ranks_equal_one(place):
    check_two_ranks(place[0], "ranks")


def test_a_step_is_saved_before_its_answers_are_printed(place, monkeypatch):
    """Whatever happens while answers are looked at, the step is on the disk."""
    cfg = settings(place[0], out_dir=f"{place[0]}/printed", eval_every=2)
    saved = []

    def print_answers(*_):
        saved.append((load_checkpoint(cfg.out_dir)["step"], load_checkpoint(f"{cfg.out_dir}/best.pt")["step"]))
        raise RuntimeError("no console")

    monkeypatch.setattr(sft, "print_answers", print_answers)
    with pytest.raises(RuntimeError, match="no console"):
        sft.main(cfg)
    assert saved == [(2, 2)]


def test_a_question_longer_than_the_model_can_see_costs_nothing(place, capsys):
    root, _ = place
    cfg = settings(root, out_dir=f"{root}/long", max_steps=2, questions="春夜" * 300 + "|你好")
    assert run(cfg)["step"] == 2
    printed = capsys.readouterr().out
    assert "question: " + "春夜" * 10 in printed and "the model sees 256" in printed
    assert "question: 你好\n  answer: " in printed


def test_a_console_without_chinese_costs_nothing(place):
    root, _ = place
    cfg = settings(root, out_dir=f"{root}/ascii", max_steps=1, questions="你好")
    words = [f"--{key}={value}" for key, value in changed(cfg).items()]
    done = subprocess.run([sys.executable, os.path.join(ROOT, "sft.py"), *words], capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert b"question: \\u4f60\\u597d" in done.stdout
    assert load_checkpoint(cfg.out_dir)["step"] == 1


def test_errors_name_the_fix(place):
    root, tok = place
    with pytest.raises(SystemExit, match="exceeds the 256 tokens"):
        sft.main(settings(root, seq_len=512))
    with pytest.raises(SystemExit, match="none of the 40 conversations"):
        sft.main(settings(root, seq_len=4))
    other = load_checkpoint(f"{root}/base")
    with open(f"{root}/data/meta.json") as f:
        meta = json.load(f)
    os.makedirs(f"{root}/foreign")
    for name in os.listdir(f"{root}/data"):
        os.symlink(f"{root}/data/{name}", f"{root}/foreign/{name}")
    os.remove(f"{root}/foreign/meta.json")
    with open(f"{root}/foreign/meta.json", "w") as f:
        json.dump({**meta, "fingerprint": "f" * 64}, f)
    with pytest.raises(SystemExit, match=f"ffffffffffff.*{other['fingerprint'][:12]}"):
        sft.main(settings(root, data_dir=f"{root}/foreign"))


def test_mixture_of_experts_balances_in_full_tuning_alone(place):
    root, tok = place
    write_base(f"{root}/moe", tok, ModelConfig(vocab_size=448, dim=32, n_layers=2, n_heads=4, max_seq_len=256,
                                               n_experts=4, hidden_dim=48))
    full = run(settings(root, init_from=f"{root}/moe", out_dir=f"{root}/moe-full", max_steps=1))
    assert full["model"]["blocks.1.ffn.bias"].abs().max() > 0
    lora = run(settings(root, init_from=f"{root}/moe", out_dir=f"{root}/moe-lora", max_steps=1, lora_rank=2))
    assert "blocks.1.ffn.shared.down.lora_a" in lora["model"]
    assert not any("router" in name or "bias" in name for name in lora["model"])


def test_two_ranks_count_the_load_of_all_experts_together(place):
    """The bias after a step says which experts got too few tokens of both ranks: a rate times a sign."""
    root, tok = place
    write_base(f"{root}/moe-two", tok, ModelConfig(vocab_size=448, dim=32, n_layers=2, n_heads=4, max_seq_len=256,
                                                   n_experts=4, hidden_dim=48))
    check_two_ranks(root, "moe-ranks", init_from=f"{root}/moe-two", grad_accum=4, batch_size=1)
    one, two = (load_checkpoint(f"{root}/moe-ranks-{name}")["model"]["blocks.1.ffn.bias"] for name in ("one", "two"))
    assert torch.equal(one, two) and one.abs().max() > 0


def test_distilled_from_itself_there_is_nothing_to_learn(place):
    """At weight 1 the loss is the divergence from the teacher: 0 at the first step, where both are the same model."""
    root = place[0]
    cfg = settings(root, out_dir=f"{root}/distilled", teacher=f"{root}/base", teacher_weight=1.0, max_steps=1)
    sft.main(cfg)
    with open(f"{root}/distilled/log.jsonl") as f:
        assert abs(json.loads(f.readline())["loss"]) < 1e-5


def test_a_teacher_with_a_smaller_window_is_refused(place):
    root, tok = place
    write_base(f"{root}/narrow", tok, ModelConfig(vocab_size=448, dim=32, n_layers=2, n_heads=4, max_seq_len=64))
    with pytest.raises(SystemExit, match="seq_len=256 exceeds the 64 tokens that the model or its teacher"):
        sft.main(settings(root, out_dir=f"{root}/narrow-run", teacher=f"{root}/narrow"))
