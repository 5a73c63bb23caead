"""sft.py: how conversations share rows, that packing changes nothing, the loss, and a run that learns to answer."""
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import CPU, conversation, run, settings, spy

import sft
from common.checkpoint import load_model
from common.data import Split, open_data
from common.loss import cross_entropy
from model import ModelConfig
from tokenizer import render_chat


def loss_of(model, batch):
    """Sum of nats over the learned targets of get_batch()."""
    ids, targets, mask, docs = batch
    return cross_entropy(model(ids, docs), model.head_weight, targets, mask)


def batch_of(place, rows):
    """The model base/ and the batch of these rows of conversations."""
    root, tok = place
    train = open_data(f"{root}/talks")[0]
    return load_model(f"{root}/base")[0], sft.get_batch(train, rows, 256, tok.pad_id, CPU.device)


# ---------------------------------------------------------------------------- packing


def test_packing_wastes_less_than_a_twentieth():
    """pack, of 20,000 lengths as the poems' conversations have them."""
    rng = np.random.default_rng(3)
    lengths = np.clip(rng.lognormal(4.0, 0.6, 20_000), 12, 900).astype(np.int64)  # mean 65, as the poems recipe
    fits = np.flatnonzero(lengths <= 256)
    rows = sft.pack(lengths, 256, 1, 0)
    assert sorted(i for row in rows for i in row) == fits.tolist()
    assert 1 - lengths[fits].sum() / len(rows) / 256 < 0.05


def test_a_batch_by_hand():
    """get_batch: documents 5 6 7 and 8 9 in a row of 5, each shifted inside itself; the mask stands where the
    target is."""
    split = Split(np.array([5, 6, 7, 8, 9]), np.array([0, 1, 1, 0, 1], np.uint8), np.array([0, 3, 5]), None, {})
    ids, targets, mask, docs = sft.get_batch(split, [[0, 1]], 5, 1, CPU.device)
    assert ids.tolist() == [[5, 6, 8, 1, 1]] and targets.tolist() == [[6, 7, 9, 1, 1]]
    assert mask.tolist() == [[1, 1, 1, 0, 0]] and docs.tolist() == [[1, 1, 2, 0, 0]]


def test_targets_follow_inputs_and_learn_the_answers_alone(place):
    """render_chat's mask, after packing: decoded, the learned targets are the answers, each with its <|im_end|>."""
    tok = place[1]
    rows = [[0, 1], [5]]
    _, (ids, targets, mask, docs) = batch_of(place, rows)
    for row, numbers in enumerate(rows):
        for number, i in enumerate(numbers, 1):
            here = docs[row] == number
            whole, _ = render_chat(tok, conversation(i))
            assert ids[row][here].tolist() == whole[:-1] and targets[row][here].tolist() == whole[1:]
            answers = "".join(m["content"] + "<|im_end|>" for m in conversation(i) if m["role"] == "assistant")
            assert tok.decode(targets[row][here & (mask[row] > 0)].tolist()) == answers
    padding = docs == 0
    assert padding.any() and mask[padding].sum() == 0 and (ids[padding] == tok.pad_id).all()
    # the first learned target follows the end of the header, never another conversation
    first = mask[0].nonzero()[0].item()
    assert tok.decode(ids[0, :first + 1].tolist()).endswith("<|im_start|>assistant\n")


def test_packed_rows_equal_each_conversation_alone(place):
    """The loss and all gradients; with a row of nothing but padding."""
    rows = [[3, 0, 7], [5, 12], []]
    model, batch = batch_of(place, rows)
    alone = 0.0
    for i in sum(rows, []):
        whole, learned = (torch.tensor(x) for x in render_chat(place[1], conversation(i)))
        logits = model.logits(model(whole[None, :-1]))[0]
        alone = alone + (F.cross_entropy(logits, whole[1:], reduction="none") * learned[1:]).sum()
    packed = loss_of(model, batch)
    n = batch[2].sum()
    assert abs(packed - alone) / n <= 2e-5
    for a, b in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in (packed, alone))):
        assert (a - b).abs().max() <= 2e-5 * n


@torch.no_grad()
def test_no_sight_across_borders(place):
    model, (ids, targets, mask, docs) = batch_of(place, [[1, 2]])
    before = model.logits(model(ids, docs))[docs == 2]
    others = torch.where(docs == 1, (ids + 17) % 400, ids)
    assert torch.equal(before, model.logits(model(others, docs))[docs == 2])


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


def test_learns_and_answers(place, tmp_path, capsys):
    cfg = settings(place[0], "sft", str(tmp_path), max_steps=0, epochs=12, lr=1e-2, seq_len=256, batch_size=4,
                   grad_accum=1, questions="你是谁？|" + "春夜" * 300 + "|你好", eval_every=20)
    checkpoint, records = run(cfg)
    printed = capsys.readouterr().out
    assert records[-1]["loss"] < 0.5 * records[0]["loss"] and "val_loss" in records[-1]
    assert checkpoint["step"] == checkpoint["config"]["max_steps"] == len(records)
    assert "question: 你好\n  answer: " in printed and "40 conversations (0 longer than a row left out" in printed
    assert "question: " + "春夜" * 300 + "\n  answer: \n" in printed  # longer than a row: costs nothing
    assert {"best.pt", "tokenizer.model"} <= set(os.listdir(tmp_path))


def test_every_epoch_visits_every_conversation_once_in_new_rows(place, tmp_path, monkeypatch):
    calls = spy(monkeypatch, sft, "get_batch")
    run(settings(place[0], "sft", str(tmp_path), max_steps=0, epochs=2.0, seq_len=256, grad_accum=1))
    seen = [i for (split, rows, *_), _ in calls if len(split) == 40 for row in rows for i in row]
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40))
    assert seen[:40] != seen[40:]


def test_the_loss_of_a_step_is_the_mean_over_its_learned_tokens(place, tmp_path, monkeypatch):
    """Of all micro-steps together, though they learn different numbers of tokens."""
    root, tok = place
    calls = spy(monkeypatch, sft, "get_batch")
    _, log = run(settings(root, "sft", str(tmp_path), max_steps=1, seq_len=256, batch_size=2, grad_accum=2))
    model, nats, n_learned = load_model(f"{root}/base")[0], 0.0, []
    for (split, rows, *_), (_, _, mask, _) in calls:
        if len(split) == 40:
            n_learned.append(mask.sum().item())
            for i in sum(rows, []):
                whole, learned = (torch.tensor(x) for x in render_chat(tok, conversation(i)))
                nll = F.cross_entropy(model.logits(model(whole[None, :-1]))[0], whole[1:], reduction="none")
                nats += (nll * learned[1:]).sum().item()
    assert len(set(n_learned)) == 2
    assert log[0]["loss"] == pytest.approx(nats / sum(n_learned), abs=2e-5)


def test_distilled_from_itself_there_is_nothing_to_learn(place, tmp_path):
    """At weight 1 the loss is the divergence from the teacher: 0 at the first step, where both are the same model."""
    _, log = run(settings(place[0], "sft", str(tmp_path), teacher="base", teacher_weight=1.0, max_steps=1))
    assert abs(log[0]["loss"]) < 1e-5
