"""common/rollout.py: what PPO and GRPO share: answers, their scores and log-probs, and how they are shared out."""
import types

import numpy as np
import pytest
import torch
from small_runs import CPU, settings, run, spy, toy_models

import common.generate as generation
import grpo
from common.data import Split, pad, shift
from common.generate import generate
from common.loss import token_logps
from common.rollout import function_scorer, k3, minibatch_rows, print_answers, rollout, step_prompts, summary
from tokenizer import render_chat

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [3, 3], [9, 8, 7, 6], [2]]


def test_k3_meets_the_closed_form():
    """k3: its mean over samples of p is KL(p || q), and it is never negative."""
    p, q = torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.3, 0.3, 0.4])
    exact = (p * (p / q).log()).sum()
    assert torch.allclose((p * k3(p.log(), q.log())).sum(), exact, atol=1e-6)
    assert (k3(torch.randn(100), torch.randn(100)) >= 0).all()


def test_summary_by_hand():
    """Means over answers; entropy is nats per token: 3 nats in the first answer, 1 in the second, 4 tokens."""
    mask = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
    batch = {"logps": -mask, "ref_logps": -1.5 * mask, "mask": mask, "score": torch.tensor([2.0, 4.0]),
             "ended": torch.tensor([1.0, 0.0])}
    assert summary(batch, CPU) == {"score": 3.0, "kl": 1.0, "length": 2.0, "eos_share": 0.5, "entropy": 1.0}


def test_answers_are_shown_with_their_scores(place, capsys):
    """A line each: score, prompt, answer; what stands on several lines is put on one."""
    _, tok = place
    prompt, _ = render_chat(tok, [{"role": "user", "content": "床前"}], add_generation_prompt=True)
    answer = [*tok.encode("明月光\n低头"), tok.im_end_id]
    print_answers([(prompt + answer, [0] * len(prompt) + [1] * len(answer))], torch.tensor([-0.25]), tok)
    assert capsys.readouterr().out == "score -0.250 | user 床前 assistant | 明月光 低头\n"


def test_every_epoch_visits_every_answer_once():
    """minibatch_rows: 3 minibatches of 2 micro-steps with 6 answers; in every epoch others are together, and which rows
    of a micro-step are in it does not depend on who holds them."""
    cfg = types.SimpleNamespace(seed=1, minibatches=3)
    epochs = [[minibatch_rows(cfg, 6, 0, epoch, i, [0, 1]).tolist() for i in range(3)] for epoch in range(4)]
    assert all(sorted(sum(epoch, [])) == list(range(12)) for epoch in epochs)
    assert len({frozenset(map(frozenset, epoch)) for epoch in epochs}) == 4
    for i in range(3):
        alone = minibatch_rows(cfg, 6, 0, 0, i, [1]).tolist()
        assert [6 + row for row in alone] == [row for row in epochs[0][i] if row >= 6]


def test_every_answer_has_random_numbers_of_its_own():
    """Row r of a call draws from seed + r: no two answers of a run may share a generator, and whose micro-step it
    is does not matter."""
    cfg = types.SimpleNamespace(seed=1, batch_size=3, grad_accum=4)
    idx = np.cumsum([0] + [len(p) for p in PROMPTS])
    split = Split(np.array(sum(PROMPTS, [])), None, idx, None, {})
    calls = [call for step in range(3) for call in step_prompts(split, 2, cfg, step, range(4))]
    seeds = [seed + row for prompts, seed in calls for row in range(len(prompts))]
    assert len(seeds) == 3 * 4 * 6 and len(set(seeds)) == len(seeds)
    assert list(step_prompts(split, 2, cfg, 1, [3])) == calls[7:8]


def sampled_logps(calls, answers):
    """Log-prob of each token of each answer as it was drawn, from the arguments of generate.pick(): rows that have
    ended are no longer in the batch."""
    logps = [[] for _ in answers]
    for step, ((logits, _, _), ids) in enumerate(calls):
        rows = [row for row, answer in enumerate(answers) if len(answer) > step]
        chosen = logits.log_softmax(-1)[torch.arange(len(ids)), ids]
        for row, logp in zip(rows, chosen.tolist(), strict=True):
            logps[row].append(logp)
    return logps


@pytest.mark.parametrize("group_size", [1, 3])
def test_log_probs_are_those_that_answers_were_drawn_with(monkeypatch, group_size):
    """Guards against stale caches, wrong positions of padded prompts, and another temperature while training."""
    actor = toy_models(head_std=0.3)[0]
    tokenizer = types.SimpleNamespace(im_end_id=15, eot_id=9, pad_id=0)
    cfg = grpo.Config(temperature=0.8, max_new_tokens=8)
    calls = spy(monkeypatch, generation, "pick")
    copies = [prompt for prompt in PROMPTS for _ in range(group_size)]
    documents = rollout(actor, copies, cfg, tokenizer, 0, CPU)
    drawn = list(calls)
    answers = [ids[len(prompt):] for prompt, (ids, _) in zip(copies, documents, strict=True)]
    assert len({len(answer) for answer in answers}) > 2
    assert answers == generate(actor, copies, 8, temperature=0.8, stop_ids=[15, 9], seed=0)
    ids, targets, mask = shift(*pad(documents, 0))
    trained = token_logps(actor(ids), actor.head_weight, targets, mask, 0.8)
    for row, generated in enumerate(sampled_logps(drawn, answers)):
        assert mask[row].sum() == len(answers[row])
        assert torch.allclose(trained[row][mask[row].bool()], torch.tensor(generated), atol=1e-4)


@pytest.mark.parametrize("stage, changes", [
    ("ppo", {}), ("ppo", dict(minibatches=1, ppo_epochs=1)), ("grpo", {}), ("grpo", dict(minibatches=2, group_size=4))])
def test_the_first_ratio_is_exactly_1(place, tmp_path, stage, changes):
    """Before anything is learned, log-probs of the update are those of the answers to the last bit."""
    _, log = run(settings(place[0], stage, str(tmp_path), max_steps=4, **changes))
    assert [record["first_ratio_error"] for record in log[1:]] == [0.0] * 4


# ---------------------------------------------------------------------------- rewards by rule


@pytest.mark.parametrize("value", ["numpy.float32(1.5)", "numpy.sum([1, 2])", "torch.tensor(1.5)", "True"])
def test_a_reward_may_be_any_number(tmp_path, value):
    rule = tmp_path / "rule.py"
    rule.write_text(f"import numpy\nimport torch\n\n\ndef good(prompt, answer):\n    return {value}\n")
    tokenizer = types.SimpleNamespace(decode=lambda ids, skip_special=False: "春", im_end_id=0, eot_id=0)
    scores = function_scorer(f"{rule}:good", tokenizer, CPU)([([1, 2], [0, 1])])
    assert scores.dtype == torch.float32 and scores.tolist() == [float(eval(value, {"numpy": np, "torch": torch}))]
