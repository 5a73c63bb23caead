"""PPO: its formulas against numbers worked by hand, plain loops and TRL, and the whole loop against a problem whose
answer is known. Tests of one step spy on what main() calls; the models, prompts and rewards are then given."""
import collections
import copy
import dataclasses
import itertools
import math
import types

import numpy as np
import pytest
import torch

import common.generate as generation
import ppo
from common.checkpoint import load_checkpoint, load_model, save_checkpoint
from common.distributed import Env
from common.lora import adapters_of, weights_hash
from common.data import Split, collate, shuffled
from common.generate import generate
from common.lora import add_lora
from common.loss import token_logps
from model import ModelConfig, ScalarModel, Transformer
from pairs import (assert_same, check_ten_and_ten, completions, flat_gradient, forget_run, gradient,  # noqa: F401
                   make_run, mean_nll, one_thread, read_log, run_in_two, run_with_a_break, write_folder)
from tokenizer import render_chat, train_tokenizer

ENV = Env(0, 1, torch.device("cpu"), torch.float32)


def test_gae_by_hand():
    rewards = torch.tensor([[9.0, 1.0, 0.0, 2.0, 9.0]])  # the nines lie outside the mask
    values = torch.tensor([[9.0, 0.5, 1.0, 0.25, 9.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]])
    advantages, returns = ppo.gae(rewards, values, mask, gamma=0.9, lam=0.5)
    d3 = 2.0 - 0.25
    d2 = 0.0 + 0.9 * 0.25 - 1.0
    d1 = 1.0 + 0.9 * 1.0 - 0.5
    a3, a2 = d3, d2 + 0.45 * d3
    a1 = d1 + 0.45 * a2
    assert torch.allclose(advantages, torch.tensor([[0.0, a1, a2, a3, 0.0]]), atol=1e-6)
    assert torch.allclose(returns, torch.tensor([[0.0, a1 + 0.5, a2 + 1.0, a3 + 0.25, 0.0]]), atol=1e-6)


def test_gae_equals_torchrl():
    functional = pytest.importorskip("torchrl.objectives.value.functional", reason="pip install torchrl")
    B, T = 4, 9
    rewards, values = torch.randn(B, T), torch.randn(B, T)
    next_values = torch.cat([values[:, 1:], torch.zeros(B, 1)], dim=1)
    done = torch.zeros(B, T, dtype=torch.bool)
    done[:, -1] = True
    theirs, _ = functional.generalized_advantage_estimate(
        0.97, 0.9, values[..., None], next_values[..., None], rewards[..., None], done[..., None], done[..., None])
    ours, _ = ppo.gae(rewards, values, torch.ones(B, T), 0.97, 0.9)
    assert torch.allclose(ours, theirs.squeeze(-1), atol=1e-6)


def test_token_rewards_by_hand():
    logps, ref = torch.tensor([[0.0, -1.0, -2.0, 0.0]]), torch.tensor([[0.0, -1.5, -1.0, 0.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    rewards = ppo.token_rewards(torch.tensor([3.0]), logps, ref, mask, kl_coef=0.1)
    assert torch.allclose(rewards, torch.tensor([[0.0, -0.05, 0.1 + 3.0, 0.0]]))


def test_policy_loss_by_hand():
    old, mask = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    logps = torch.log(torch.tensor([[1.5, 0.5, 1.1, 9.0]]))
    advantages = torch.tensor([[2.0, -1.0, 1.0, 5.0]])
    loss, ratio = ppo.policy_loss(logps, old, advantages, mask, ppo.Config(clip=0.2))
    # 1.5 clips to 1.2 (gain capped), 0.5 clips to 0.8 (loss cannot shrink below), 1.1 stays
    assert loss.item() == pytest.approx(-2.0 * 1.2 + 1.0 * 0.8 - 1.1, abs=1e-6)
    assert torch.allclose(ratio, torch.tensor([[1.5, 0.5, 1.1, 1.0]]))


VARIANTS = [dict(), dict(clip_high=0.35), dict(ratio="sequence", clip=0.02), dict(surrogate="cispo", clip_high=0.3),
            dict(ratio="sequence", clip_high=0.05, clip=0.01), dict(surrogate="cispo", ratio="sequence", clip=0.03)]


def answers_for_the_loss():
    """logps (with gradient), old logps, advantages, mask of five answers: ratios on both sides of every bound."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0],
                         [1, 1, 1, 1, 0, 0]]).double()
    old = -torch.rand(5, 6, dtype=torch.float64) * 3
    logps = old + 0.4 * torch.randn(5, 6, dtype=torch.float64)
    advantages = torch.tensor([1.3, -0.7, 0.4, -2.0, 0.9], dtype=torch.float64)
    return logps.requires_grad_(), old, advantages, mask


@pytest.mark.parametrize("changes", VARIANTS)
def test_policy_loss_equals_the_papers_formulas(changes):
    """A plain loop over answers and tokens: PPO eq. 7, DAPO's two bounds, GSPO eq. 5 to 7 (s_i, a ratio an answer),
    MiniMax-M1 eq. 4 and 5 (the clipped ratio, stopped, times the log-prob). And the gradient of the same sum."""
    cfg = ppo.Config(**changes)
    logps, old, advantages, mask = answers_for_the_loss()
    loss, ratio = ppo.policy_loss(logps, old, advantages[:, None] * mask, mask, cfg)
    low, high = 1 - cfg.clip, 1 + (cfg.clip_high or cfg.clip)
    total = 0.0
    outside = 0
    for i in range(5):
        places = [t for t in range(6) if mask[i, t] > 0]
        s = math.prod((logps[i, t] - old[i, t]).exp() for t in places) ** (1 / len(places))
        for t in places:
            r = s if cfg.ratio == "sequence" else (logps[i, t] - old[i, t]).exp()
            assert ratio[i, t].item() == pytest.approx(r.item(), rel=1e-9)
            outside += not low <= r <= high
            A = advantages[i]
            if cfg.surrogate == "cispo":
                total = total - r.clamp(max=high).detach() * A * logps[i, t]
            else:
                total = total - torch.min(r * A, r.clamp(low, high) * A)
    assert outside > 3
    assert loss.item() == pytest.approx(total.item(), rel=1e-9)
    grads = [torch.autograd.grad(x, logps)[0] for x in (loss, total)]
    assert torch.allclose(*grads, atol=1e-12)


# TRL has no cispo with a constant length
@pytest.mark.parametrize("changes, advantage", [(v, "rloo") for v in VARIANTS] + [
    (v, "dr_grpo") for v in VARIANTS if "surrogate" not in v])
def test_policy_loss_equals_trl(changes, advantage):
    """TRL's own GRPOTrainer._compute_loss: dapo's mean over tokens, or dr_grpo's constant length, and cispo; without a
    reference, and with k3 in the loss. TRL's cispo bound is the whole ratio, ours 1 + clip_high."""
    trl = pytest.importorskip("trl", reason="pip install trl==1.12.0")
    cfg = ppo.Config(**changes)
    logps, old, advantages, mask = answers_for_the_loss()
    ref = old - 0.3 * torch.rand(5, 6, dtype=torch.float64)
    weight = 1 / mask.sum() if advantage == "rloo" else 1 / (5 * 11)
    high = cfg.clip_high or cfg.clip
    loss_type = {"rloo": "dapo", "dr_grpo": "dr_grpo"}[advantage]
    same = lambda x, **_: x  # noqa: E731
    for kl_coef in (0.0, 0.3):
        trainer = types.SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros(5, 6), None),
            aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
            importance_sampling_level=cfg.ratio, beta=kl_coef, epsilon_low=cfg.clip,
            epsilon_high=1 + high if cfg.surrogate == "cispo" else high, use_vllm=False, _entropy_bonus_enabled=False,
            loss_type="cispo" if cfg.surrogate == "cispo" else loss_type, max_completion_length=11,
            current_gradient_accumulation_steps=1, model=types.SimpleNamespace(training=True),
            args=types.SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
            accelerator=types.SimpleNamespace(num_processes=1, gather=same, reduce=same),
            _metrics={"train": collections.defaultdict(list)})
        inputs = {"prompt_ids": torch.zeros(5, 1), "prompt_mask": torch.ones(5, 1), "completion_ids": torch.zeros(5, 6),
                  "completion_mask": mask, "advantages": advantages, "old_per_token_logps": old,
                  "ref_per_token_logps": ref, "num_items_in_batch": mask.sum()}
        theirs = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
        ours, _ = ppo.policy_loss(logps, old, advantages[:, None] * mask, mask, cfg)
        ours = (ours + kl_coef * (ppo.k3(logps, ref) * mask).sum()) * weight
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
        grads = [torch.autograd.grad(x, logps)[0] for x in (ours, theirs)]
        assert torch.allclose(*grads, atol=1e-7)


def test_value_loss_by_hand():
    values, old = torch.tensor([[1.0, 0.1, 7.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    returns, mask = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    # first: plain (1-2)^2 = 1, clipped (0.2-2)^2 = 3.24, the larger counts; second: 0.01
    assert ppo.value_loss(values, old, returns, mask, 0.2).item() == pytest.approx(0.5 * (3.24 + 0.01), abs=1e-6)


def test_group_advantages_by_hand():
    totals = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    rloo = ppo.group_advantages(totals, 3, "rloo")
    assert torch.allclose(rloo, torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3.0]))
    grpo = ppo.group_advantages(totals, 3, "grpo").view(2, 3)
    assert torch.allclose(grpo.mean(1), torch.zeros(2), atol=1e-6)
    assert torch.allclose(grpo.std(1), torch.ones(2), atol=1e-3)
    dr_grpo = ppo.group_advantages(totals, 3, "dr_grpo")  # minus the mean, nothing else
    assert torch.allclose(dr_grpo, torch.tensor([-2.0, -1.0, 3.0, -1.0, -1.0, 2.0]))


def test_whiten():
    x, mask = torch.randn(3, 7) * 5 + 2, (torch.rand(3, 7) < 0.7).float()
    inside = ppo.whiten(x, mask, ENV)[mask.bool()]
    assert abs(inside.mean()) < 1e-5 and abs(inside.std(unbiased=False) - 1) < 1e-5


def test_kl_estimators_meet_the_closed_form():
    p, q = torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.3, 0.3, 0.4])
    exact = (p * (p / q).log()).sum()
    assert torch.allclose((p * ppo.k3(p.log(), q.log())).sum(), exact, atol=1e-6)
    assert (ppo.k3(torch.randn(100), torch.randn(100)) >= 0).all()


# ---------------------------------------------------------------------------- the whole loop


def tiny(**settings):
    base = dict(batch_size=32, max_new_tokens=8, ppo_epochs=2, minibatches=2, kl_coef=0.5, lr=3e-3, min_lr=3e-4,
                critic_lr=3e-3, warmup_steps=1, max_steps=100, seed=1, no_eos_penalty=0.0, eval_prompts=0, device="cpu",
                reward="given")
    return ppo.Config(**base | settings)


def models(vocab=16, seed=0):
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=vocab, dim=32, n_layers=1, n_heads=2, max_seq_len=16, tie_embeddings=False)
    actor, reference = Transformer(config).eval(), Transformer(config).eval()
    torch.nn.init.zeros_(actor.lm_head.weight)  # uniform whatever came before: the optimum then has a closed form
    reference.load_state_dict(actor.state_dict())
    return actor, reference.requires_grad_(False), ScalarModel(config).eval()


@pytest.fixture
def play(monkeypatch, tmp_path, root):
    """Return a function that runs main() on given models, prompts (one after the other, from the first) and rewards.
    It returns the checkpoint and the log. stop: the id that ends an answer; -1: none does."""
    number = itertools.count()
    tok = load_model(f"{root}/base")[1]

    def play(actor, reference, critic, cfg, prompts=((5,),), stop=-1, scorer=count_small):
        actors = iter([actor, reference])
        idx = np.cumsum([0] + [len(p) for p in prompts])
        train = Split(np.array([t for p in prompts for t in p]), None, idx, None, {})
        val = Split(np.zeros(0), None, np.zeros(1, dtype=np.int64), None, {})
        words = copy.copy(tok)
        words.im_end_id = words.eot_id = stop
        words.pad_id = 0
        monkeypatch.setattr(ppo, "load_model", lambda *_: (next(actors), words, {}))
        monkeypatch.setattr(ppo, "load_reward_model", lambda *_: critic)
        monkeypatch.setattr(ppo, "function_scorer", lambda *_: scorer)
        monkeypatch.setattr(ppo, "open_data", lambda *_, **__: (train, val, {}))
        monkeypatch.setattr(ppo, "shuffled", lambda n, first, count, seed: np.arange(first, first + count) % n)
        cfg = dataclasses.replace(cfg, out_dir=str(tmp_path / str(next(number))))
        ppo.main(cfg)
        return load_checkpoint(cfg.out_dir), read_log(cfg.out_dir)

    return play


def spy(monkeypatch, name, module=ppo):
    """Return a list that gets (arguments, result) of every call of a function of a module."""
    calls, real = [], getattr(module, name)

    def call(*args, **kwargs):
        result = real(*args, **kwargs)
        calls.append((args, result))
        return result

    monkeypatch.setattr(module, name, call)
    return calls


def count_small(documents):
    return torch.tensor([float(sum(t < 4 for t, m in zip(ids, mask) if m)) for ids, mask in documents])


@torch.no_grad()
def share_of_small(model, temperature, n=2000):
    """Mean over sampled prefixes of the policy's exact probability of a token < 4, at each of the 8 places."""
    rows = torch.tensor(generate(model, [[5]] * n, 8, temperature=temperature, seed=7))
    ids = torch.cat([torch.full((n, 1), 5), rows], dim=1)[:, :-1]
    return (model.logits(model(ids)) / temperature).softmax(-1)[:, :, :4].sum(-1), ids


@pytest.mark.parametrize("advantage,temperature", [("gae", 1.0), ("rloo", 1.0), ("gae", 0.7)])
def test_gibbs(play, advantage, temperature):
    """The optimum of E[reward] - kl_coef KL is the Gibbs distribution pi = q exp(reward/kl_coef)/Z (Korbak 2022).

    The reward counts tokens < 4, so every place is alike: p* = q e^2 / (q e^2 + 1 - q), whatever came before.
    Guards against a flipped KL sign (p runs to 1), a lost KL term, a score on the wrong token, sampling at another
    temperature than log-probs are taken at (the run at 0.7), and advantages that mix rows.
    """
    torch.set_num_threads(1)
    group = 1 if advantage == "gae" else 4
    cfg = tiny(advantage=advantage, group_size=group, batch_size=128 // group, temperature=temperature, max_steps=150)
    actor, reference, critic = models()
    play(actor, reference, critic if advantage == "gae" else None, cfg)
    p, ids = share_of_small(actor, temperature)
    with torch.no_grad():
        q = (reference.logits(reference(ids)) / temperature).softmax(-1)[:, :, :4].sum(-1)
    best = q * math.e ** 2 / (q * math.e ** 2 + 1 - q)
    assert (p - best).mean(0).abs().max() <= 0.03

    def objective(p):  # of one place: reward - kl_coef * KL of the two-sided coin (within each side pi is q's shape)
        return (p - 0.5 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())).mean()
    assert objective(p) >= 0.98 * objective(best)


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [3, 3], [9, 8, 7, 6], [2]]


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


def test_first_ratio_is_one_and_generation_agrees(play, monkeypatch):
    """Guards against stale caches, wrong positions of padded prompts, and another temperature while training."""
    actor, reference, critic = models()
    torch.nn.init.normal_(actor.lm_head.weight, std=0.3)
    cfg = tiny(temperature=0.8, ppo_epochs=1, minibatches=1, batch_size=6, max_steps=1)
    calls = spy(monkeypatch, "pick", generation)
    answers = generate(actor, PROMPTS, 8, temperature=0.8, stop_ids=[15, 9, 2], seed=0)
    logps = sampled_logps(calls, answers)
    documents = ppo.rollout(actor, PROMPTS, 1, [15, 9, 2], 0, cfg, 0, ENV)
    ids, targets, mask = collate(documents, 0)
    trained = token_logps(actor, ids, targets, mask, 0.8)
    assert len({len(answer) for answer in answers}) > 2
    for row, generated in enumerate(logps):
        assert documents[row][0] == PROMPTS[row] + answers[row]
        assert torch.allclose(trained[row][mask[row].bool()], torch.tensor(generated), atol=1e-4)
    _, (record,) = play(actor, reference, critic, cfg, PROMPTS, stop=15)
    assert record["first_ratio_error"] == 0.0


def test_a_group_answers_as_separate_prompts_do(monkeypatch):
    """The prompt goes through the model once and its answers part from there: the same tokens, drawn from the same
    distributions, as from three copies of the prompt. With every filter, and with rows that end early."""
    actor, _, _ = models()
    torch.nn.init.normal_(actor.lm_head.weight, std=0.4)
    copies = [prompt for prompt in PROMPTS for _ in range(3)]
    forwards = []
    actor.register_forward_pre_hook(lambda module, args: forwards.append(tuple(args[0].shape)))
    for options in (dict(), dict(temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.3)):
        calls = spy(monkeypatch, "pick", generation)
        together = generate(actor, PROMPTS, 9, stop_ids=[15, 14], seed=11, group_size=3, **options)
        assert forwards[0] == (6, 5) and forwards[1][1] == 1  # the prompts, once; then a token a row
        logps = sampled_logps(calls, together)
        calls.clear()
        alone = generate(actor, copies, 9, stop_ids=[15, 14], seed=11, **options)
        assert together == alone and len({len(answer) for answer in together}) > 3
        assert len({tuple(answer) for answer in together}) > 12
        for a, b in zip(logps, sampled_logps(calls, alone), strict=True):
            assert a == pytest.approx(b, abs=1e-5)
        forwards.clear()
        monkeypatch.undo()


@pytest.mark.parametrize("group", [1, 2])
def test_early_stop_really_stops(play, group):
    actor, reference, critic = models()
    cfg = tiny(target_kl=1e-6, lr=0.05, ppo_epochs=4, max_steps=1, group_size=group,
               advantage="gae" if group == 1 else "rloo")
    before = {k: v.clone() for k, v in actor.state_dict().items()}
    checkpoint, (record,) = play(actor, reference, critic, cfg)
    assert record["updates"] == 1  # the first moves the policy, the second sees that it went too far and does nothing
    assert int(checkpoint["optimizers"][0]["state"][0]["step"]) == 1
    assert any(not torch.equal(v, before[k]) for k, v in actor.state_dict().items())
    assert all(p.grad is None for p in actor.parameters())
    assert group == 2 or all(p.grad is None for p in critic.parameters())


def test_the_critic_learns_alone_first(play):
    actor, reference, critic = models()
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in (actor, critic)]
    _, (record,) = play(actor, reference, critic, tiny(critic_warmup=1, max_steps=1))
    assert record["updates"] == 4 and "norm" not in record
    assert all(torch.equal(v, before[0][k]) for k, v in actor.state_dict().items())
    assert any(not torch.equal(v, before[1][k]) for k, v in critic.state_dict().items())
    play(actor, reference, critic, tiny(critic_warmup=1, max_steps=2))
    assert any(not torch.equal(v, before[0][k]) for k, v in actor.state_dict().items())


def test_unended_answers_are_penalised(play, monkeypatch):
    results = []
    for penalty in (100.0, 0.0):
        actor, reference, critic = models()
        rollouts, estimates = spy(monkeypatch, "rollout"), spy(monkeypatch, "gae")
        cfg = tiny(no_eos_penalty=penalty, kl_coef=0.0, batch_size=16, lam=1.0, max_steps=1)  # returns: sums of rewards
        play(actor, reference, critic, cfg, stop=15)
        (_, documents), ((_, _, mask, _, _), (_, returns)) = rollouts[0], estimates[0]
        ended = torch.tensor([float(ids[-1] == 15) for ids, _ in documents])
        results.append((returns, ended, mask))
        monkeypatch.undo()
    (with_penalty, ended, mask), (without, _, _) = results
    assert 0 < ended.sum() < 16
    assert torch.allclose(without - with_penalty, 100.0 * (1 - ended)[:, None] * mask, atol=1e-3)


def test_micro_steps_do_not_matter(play, monkeypatch):
    """Four micro-steps of 8 prompts are the update that their rows make in any order: rows are numbered globally."""
    results = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        actor, reference, critic = models()
        cfg = tiny(batch_size=8, grad_accum=4, lr=1e-4, min_lr=1e-4, critic_lr=1e-4, max_steps=1)
        monkeypatch.setattr(ppo, "micro_steps", lambda grad_accum, env, order=order: order)
        play(actor, reference, critic, cfg, [[5 + i // 8] for i in range(32)])
        results.append(torch.cat([p.flatten() for p in actor.parameters()]))
    assert torch.allclose(*results, atol=1e-6)


def test_every_answer_has_random_numbers_of_its_own(play, monkeypatch):
    """Row r of a call draws from seed + r: no two answers of a run may share a generator."""
    actor, reference, _ = models()
    rollouts = spy(monkeypatch, "rollout")
    cfg = tiny(advantage="rloo", batch_size=3, group_size=2, grad_accum=4, max_steps=3)
    play(actor, reference, None, cfg)
    seeds = [args[6] + row for args, documents in rollouts for row in range(len(documents))]
    assert len(seeds) == 3 * 4 * 6 and len(set(seeds)) == len(seeds)


def test_every_epoch_visits_every_answer_once_in_other_minibatches(play, monkeypatch):
    actor, reference, _ = models()
    torch.nn.init.normal_(actor.lm_head.weight, std=0.2)
    calls = spy(monkeypatch, "policy_loss")
    cfg = tiny(advantage="rloo", batch_size=4, group_size=2, grad_accum=2, max_steps=1, ppo_epochs=3, minibatches=2)
    play(actor, reference, None, cfg, PROMPTS)
    # an answer is known by its log-probs; a minibatch of 8 answers comes in two parts
    updates = [[tuple(row.tolist()) for call in calls[i:i + 2] for row in call[0][1]] for i in range(0, 12, 2)]
    epochs = [updates[i:i + 2] for i in range(0, 6, 2)]
    assert all(sorted(a + b) == sorted(sum(updates[:2], [])) for a, b in epochs)
    assert len(set(sum(updates[:2], []))) == 16
    assert len({tuple(sorted(map(frozenset, epoch), key=sorted)) for epoch in epochs}) == 3


# ---------------------------------------------------------------------------- one step against a plain loop


def plain_objective(actor, documents, rewards, cfg):
    """The loss of a step's first update, answer by answer and token by token from whole logits. Where the ratio is 1
    every surrogate has the gradient of REINFORCE, -A log p; what differs is A and what the sum is divided by."""
    group = cfg.group_size
    total = 0.0
    n_tokens = 0
    for first in range(0, len(documents), group):
        r = np.array(rewards[first:first + group], dtype=np.float64)
        if cfg.skip_flat_groups and np.ptp(r) < 1e-6:
            continue
        for k in range(group):
            A = r[k] - r.mean()
            if cfg.advantage == "rloo":
                A = r[k] - np.delete(r, k).mean()
            elif cfg.advantage == "grpo":
                A = A / (r.std(ddof=1) + 1e-4)
            ids, mask = documents[first + k]
            ids = torch.tensor(ids)
            logps = actor.logits(actor(ids[None, :-1]))[0].div(cfg.temperature).log_softmax(-1)
            for place in range(len(ids) - 1):
                if mask[place + 1]:
                    total = total - A * logps[place, ids[place + 1]]
                    n_tokens += 1
    length = len(documents) * cfg.max_new_tokens if cfg.advantage == "dr_grpo" else n_tokens
    return total / length


@pytest.mark.parametrize("changes", [
    dict(advantage="rloo"), dict(advantage="grpo"), dict(advantage="dr_grpo"),
    dict(advantage="dr_grpo", temperature=0.6), dict(advantage="grpo", skip_flat_groups=True), dict(advantage="rloo", skip_flat_groups=True, clip_high=0.3),
    dict(advantage="grpo", ratio="sequence"), dict(advantage="rloo", surrogate="cispo"),
    dict(advantage="dr_grpo", surrogate="cispo", ratio="sequence")])
def test_the_gradient_of_a_step_is_the_plain_loops(play, monkeypatch, changes):
    """Advantages from the answers of a group, the mean over tokens or over a constant length, flat groups out of it."""
    actor, reference, _ = models()
    torch.nn.init.normal_(actor.lm_head.weight, std=0.5)
    reference.load_state_dict(actor.state_dict())
    cfg = tiny(batch_size=5, group_size=3, grad_accum=2, ppo_epochs=1, minibatches=1, kl_coef=0.0, grad_clip=0.0,
               max_steps=1, **changes)
    rollouts = spy(monkeypatch, "rollout")
    before = Transformer(actor.config)
    before.load_state_dict(actor.state_dict())

    def scorer(documents):  # some groups are flat: those of prompts that begin with a small word
        return torch.tensor([1.0 if ids[0] < 4 else sum(ids[1:]) % 7 / 10 for ids, _ in documents])

    checkpoint, (record,) = play(actor, reference, None, cfg, PROMPTS, stop=15, scorer=scorer)
    documents = [document for _, answers in rollouts for document in answers]
    assert len(documents) == 30 and len({sum(mask) for _, mask in documents}) > 3
    loss = plain_objective(before, documents, scorer(documents).tolist(), cfg)
    plain = flat_gradient(loss, before)
    assert plain.abs().max() > 0.01
    assert (gradient(checkpoint) - plain).abs().max() <= 1e-6
    assert record["score"] == pytest.approx(scorer(documents).mean().item(), abs=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_what_the_log_says_of_the_answers(play, monkeypatch, skip):
    """Length, entropy and KL are those of the answers, all of them, also of groups that nothing is learned from."""
    actor, reference, _ = models()
    torch.nn.init.normal_(actor.lm_head.weight, std=0.5)
    cfg = tiny(advantage="grpo", batch_size=6, group_size=4, skip_flat_groups=skip, lr=1e-30, min_lr=1e-30,
               max_steps=1)
    rollouts = spy(monkeypatch, "rollout")

    def scorer(documents):
        return torch.tensor([1.0 if ids[0] < 4 else float(sum(ids)) for ids, _ in documents])

    _, (record,) = play(actor, reference, None, cfg, PROMPTS, stop=15, scorer=scorer)
    documents = rollouts[0][1]
    lengths = [sum(mask) for _, mask in documents]
    with torch.no_grad():
        nats, ref_nats = ([n * mean_nll(model, [document]).item() for n, document in zip(lengths, documents)]
                          for model in (actor, reference))  # -log p of each answer
    assert len(set(lengths)) > 2
    assert record["length"] == pytest.approx(np.mean(lengths), abs=1e-5)
    assert record["entropy"] == pytest.approx(sum(nats) / sum(lengths), abs=1e-4)
    assert record["kl"] == pytest.approx(np.mean(ref_nats) - np.mean(nats), abs=1e-4)


@pytest.mark.parametrize("surrogate", ["ppo", "cispo"])
def test_what_the_log_says_of_the_updates(play, monkeypatch, surrogate):
    """clip_share: tokens whose ratio left the bounds; step_kl: k3 from the policy that answered; means over updates."""
    actor, reference, _ = models()
    calls = spy(monkeypatch, "policy_loss")
    cfg = tiny(advantage="rloo", group_size=2, batch_size=8, max_steps=1, lr=0.02, clip=0.1, clip_high=0.3,
               surrogate=surrogate)
    _, (record,) = play(actor, reference, None, cfg, PROMPTS, stop=15)
    shares, kls = [], []
    for update in range(4):  # 8 of the 16 answers in one part, in each of 2 x 2 updates
        (logps, old, _, mask, _), _ = calls[update]
        n = mask.sum().item()
        ratio = ((logps - old) * mask).exp().detach()
        shares.append(sum(0 if 0.9 <= r <= 1.3 else 1 for r in ratio.flatten().tolist()) / n)
        kls.append(sum(1 / r - 1 - math.log(1 / r) for r in (1 / ratio).flatten().tolist()) / n)
    assert len(calls) == 4 and record["updates"] == 4
    assert record["clip_share"] == pytest.approx(np.mean(shares), abs=1e-6) and record["clip_share"] > 0.02
    assert record["step_kl"] == pytest.approx(np.mean(kls), abs=1e-5)


# ---------------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with prompts/, the SFT run base/, the reward run reward/ and a rule in rule.py."""
    root = str(tmp_path_factory.mktemp("ppo"))
    tok = train_tokenizer(["春夜月好坏。0123456789 user assistant system\n"], f"{root}/tok", 300, character_coverage=1.0)
    make_run(f"{root}/base", tok)
    config = ModelConfig(**load_checkpoint(f"{root}/base")["model_config"])
    save_checkpoint(f"{root}/reward/ckpt.pt", {
        "stage": "reward", "model": ScalarModel(config).state_dict(), "model_config": dataclasses.asdict(config),
        "lora": None, "fingerprint": tok.fingerprint, "step": 1})
    rows = [render_chat(tok, [{"role": "user", "content": "春夜" * (1 + i % 3)}], add_generation_prompt=True)
            for i in range(24)]
    write_folder(f"{root}/prompts", tok, "prompts", {"train": rows, "val": rows})
    with open(f"{root}/rule.py", "w", encoding="utf-8") as f:
        f.write("def length(prompt, answer):\n    assert '春夜' in prompt\n    return -len(answer)\n")
    return root


def settings(root, **changes):
    base = dict(data_dir=f"{root}/prompts", init_from=f"{root}/base", reward_from=f"{root}/reward", batch_size=4,
                grad_accum=2, max_new_tokens=10, max_steps=4, lr=1e-3, eval_every=2, eval_prompts=32, warmup_steps=1,
                 watch=f"{root}/rule.py:length", device="cpu")
    return {**base, **changes}


@pytest.mark.parametrize("changes", [dict(), dict(advantage="rloo", group_size=2, reward="rule.py:length"),
                                     dict(advantage="grpo", group_size=2)])
def test_resume_is_bit_for_bit(root, tmp_path, monkeypatch, changes):
    monkeypatch.chdir(root)
    whole = ppo.Config(**settings(root, out_dir=str(tmp_path / "whole"), **changes))
    ppo.main(whole)
    broken = dataclasses.replace(whole, out_dir=str(tmp_path / "broken"))
    run_with_a_break(ppo, broken, 2, monkeypatch)
    a, b = load_checkpoint(whole.out_dir), load_checkpoint(broken.out_dir)
    assert ("critic" in a) == (whole.advantage == "gae")
    assert_same(a, b)


@pytest.mark.parametrize("changes", [dict(), dict(advantage="rloo", group_size=2, reward="rule.py:length"),
                                     dict(advantage="grpo", group_size=2)])
def test_ten_and_ten_steps_are_twenty(root, tmp_path, monkeypatch, changes):
    monkeypatch.chdir(root)
    flat = dict(eval_every=10, min_lr=1e-3)  # a learning rate that does not depend on max_steps
    check_ten_and_ten(ppo, ppo.Config(**settings(root, out_dir=str(tmp_path / "run"), **flat, **changes)))


def assert_two_are_one(config, tmp_path):
    ppo.main(ppo.Config(**config, out_dir=str(tmp_path / "one")))
    run_in_two("ppo.py", str(tmp_path / "two"), config)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=2e-5), key
    a, b = (load_checkpoint(str(tmp_path / name)) for name in ("one", "two"))
    assert_same(a["model"], b["model"], atol=1e-6)
    return a, b


@pytest.mark.parametrize("changes", [dict(), dict(advantage="grpo", group_size=2),
                                     dict(advantage="rloo", group_size=2, skip_flat_groups=True, ratio="sequence")])
def test_two_processes_compute_what_one_does(root, tmp_path, changes):
    """Rollouts included: what a micro-step generates depends on (seed, step, micro-step), not on who generates it."""
    config = settings(root, max_steps=2, max_new_tokens=8, lr=1e-4, critic_lr=1e-4, **changes)
    assert_two_are_one(config, tmp_path)


@pytest.mark.parametrize("changes", [dict(batch_size=2), dict(batch_size=1, group_size=2, advantage="rloo")])
def test_two_processes_with_two_answers_each(root, tmp_path, changes):
    """A minibatch gets one answer of each micro-step, so that no process is without one."""
    config = settings(root, max_steps=2, max_new_tokens=8, lr=1e-4, critic_lr=1e-4, minibatches=2, **changes)
    assert_two_are_one(config, tmp_path)


def test_two_processes_of_which_one_has_nothing_to_learn(root, tmp_path):
    """All groups of one process are flat, and left out; the model's head is a matrix of its own. Guards against a
    process that waits for gradients that never come."""
    make_run(f"{root}/untied", load_model(f"{root}/base")[1], tie_embeddings=False)
    with open(f"{root}/flat.py", "w", encoding="utf-8") as f:
        f.write("def three(prompt, answer):\n    return sum(map(ord, answer)) % 7 * (prompt.count('春夜') == 3)\n")
    config = settings(root, init_from=f"{root}/untied", max_steps=4, max_new_tokens=6, lr=1e-4, batch_size=1,
                      group_size=4, advantage="rloo", skip_flat_groups=True, minibatches=1, kl_coef=0.0,
                      no_eos_penalty=0.0, reward=f"{root}/flat.py:three")
    three = [bool(i % 3 == 2) for i in shuffled(24, 0, 8, 1234)]
    assert {(True, False), (False, True)} <= set(zip(three[::2], three[1::2]))
    ppo.main(ppo.Config(**config, out_dir=str(tmp_path / "one")))
    assert sum(record["norm"] > 0 for record in read_log(tmp_path / "one")[1:]) > 1
    run_in_two("ppo.py", str(tmp_path / "two"), config, seconds=90)
    one, two = (load_checkpoint(str(tmp_path / name))["model"] for name in ("one", "two"))
    assert_same(one, two, atol=1e-6)


def test_more_minibatches_than_answers_are_refused(root, tmp_path):
    for changes, answers in ((dict(batch_size=4), 4), (dict(batch_size=2, group_size=2, advantage="rloo"), 4)):
        with pytest.raises(SystemExit, match=f"error: minibatches=5 of only {answers} answers.*--minibatches"):
            ppo.main(ppo.Config(**settings(root, out_dir=str(tmp_path), minibatches=5, **changes)))


@pytest.mark.parametrize("changes", [dict(), dict(minibatches=1, ppo_epochs=1), dict(advantage="grpo", group_size=2)])
def test_the_first_ratio_is_exactly_1(root, tmp_path, changes):
    ppo.main(ppo.Config(**settings(root, out_dir=str(tmp_path), **changes)))
    assert [r["first_ratio_error"] for r in read_log(tmp_path)[1:]] == [0.0] * 4


def test_starts_from_a_file(root, tmp_path):
    """out/sft/best.pt in place of out/sft: the same run, and its folder is not written to."""
    base = load_checkpoint(f"{root}/base")
    save_checkpoint(f"{root}/filed/best.pt", base)
    load_model(f"{root}/base")[1].save(f"{root}/filed/tokenizer.model")
    for name, init_from in (("folder", f"{root}/base"), ("file", f"{root}/filed/best.pt")):
        ppo.main(ppo.Config(**settings(root, init_from=init_from, out_dir=str(tmp_path / name), max_steps=2)))
    assert_same(*(load_checkpoint(str(tmp_path / name))["model"] for name in ("folder", "file")))
    load_model(str(tmp_path / "file"))
    with pytest.raises(SystemExit, match="is the run that this one starts from"):
        ppo.main(ppo.Config(**settings(root, init_from=f"{root}/filed/best.pt", out_dir=f"{root}/filed")))


def test_starts_from_adapters(root, tmp_path):
    """A run of sft.py --lora_rank is merged with its base; with adapters of zero it is the base."""
    base = load_checkpoint(f"{root}/base")
    model, tok, _ = load_model(f"{root}/base")
    add_lora(model, 2, 4.0, "qkv|down", base="../base", base_hash=weights_hash(base["model"]))
    save_checkpoint(f"{root}/adapters/ckpt.pt", {**base, "model": adapters_of(model), "lora": model.lora})
    tok.save(f"{root}/adapters/tokenizer.model")
    for name in ("base", "adapters"):
        ppo.main(ppo.Config(**settings(root, init_from=f"{root}/{name}", out_dir=str(tmp_path / name), max_steps=1)))
    assert_same(*(load_checkpoint(str(tmp_path / name))["model"] for name in ("base", "adapters")))


def test_a_new_kl_coef_is_obeyed_and_a_new_run_has_a_new_log(root, tmp_path, monkeypatch):
    cfg = ppo.Config(**settings(root, out_dir=str(tmp_path), max_steps=1))
    calls = spy(monkeypatch, "token_rewards")
    ppo.main(cfg)
    forget_run()
    ppo.main(dataclasses.replace(cfg, max_steps=2, kl_coef=0.3))
    forget_run()
    assert [args[4] for args, _ in calls] == [cfg.kl_coef, 0.3]
    ppo.main(dataclasses.replace(cfg, resume=False))
    assert [r["step"] for r in read_log(tmp_path)] == [0, 1]


def test_prompts_too_long_and_none_held_out(root, tmp_path):
    with pytest.raises(SystemExit, match="prompt of .* tokens; with max_new_tokens=90 .* the 96 tokens"):
        ppo.main(ppo.Config(**settings(root, out_dir=str(tmp_path), max_new_tokens=90)))
    ppo.main(ppo.Config(**settings(root, out_dir=str(tmp_path), max_steps=1, eval_prompts=0)))
    assert not any("val_score" in r for r in read_log(tmp_path))


# ---------------------------------------------------------------------------- rows mixed in


@pytest.fixture(scope="module")
def mixed(root):
    """A base that sees 160 tokens, conversations of different lengths and a text to mix in."""
    tok = load_model(f"{root}/base")[1]
    make_run(f"{root}/base160", tok, max_seq_len=160)
    talks = [completions(tok, i, 1 + i % 3)[0] for i in range(21)]
    write_folder(f"{root}/talks", tok, "sft", {"train": talks, "val": talks[:1]})
    text = np.random.default_rng(2).integers(5, 60, 7 * 128 + 50).tolist()
    write_folder(f"{root}/text", tok, "text", {"train": text, "val": text[:200]})
    pieces = [(text[128 * i:128 * i + 129], [1] * 129) for i in range(7)]
    return {"talks": talks, "text": pieces}


@pytest.mark.parametrize("kind", ["talks", "text"])
def test_rows_mixed_in_add_their_loss(root, mixed, tmp_path, kind):
    """PPO-ptx: the gradient of an update = that without the rows + ptx_coef * that of the mean over their learned
    tokens, from a plain loop over whole logits, document by document. Two processes make the same updates."""
    config = settings(root, init_from=f"{root}/base160", grad_clip=0.0, max_new_tokens=8, max_steps=1, eval_prompts=0)
    ptx = dict(ptx_dir=f"{root}/{kind}", ptx_coef=0.7, ptx_rows=6)
    one_update = dict(ppo_epochs=1, minibatches=1)
    found = {}
    for name, changes in (("none", {}), ("one", ptx)):
        cfg = ppo.Config(**{**config, **one_update, **changes, "out_dir": str(tmp_path / name)})
        ppo.main(cfg)
        found[name] = load_checkpoint(cfg.out_dir)
    model, _, _ = load_model(f"{root}/base160")
    documents = [mixed[kind][i] for i in shuffled(len(mixed[kind]), 0, 6, 1234)]
    loss = mean_nll(model, documents)
    plain = flat_gradient(loss, model)
    assert plain.abs().max() > 0.01
    assert (gradient(found["one"]) - gradient(found["none"]) - 0.7 * plain).abs().max() <= 1e-6
    assert read_log(tmp_path / "one")[-1]["ptx_loss"] == pytest.approx(loss.item(), abs=1e-5)
    (tmp_path / "both").mkdir()
    assert_two_are_one({**config, **ptx, "lr": 1e-4, "critic_lr": 1e-4, "max_steps": 2}, tmp_path / "both")


def test_every_update_mixes_in_the_next_rows(root, mixed, tmp_path):
    """Update u of step s takes batch s * updates + u; the log has the mean over the updates. Weights stand still."""
    ppo.main(ppo.Config(**settings(root, init_from=f"{root}/base160", out_dir=str(tmp_path), lr=1e-30, min_lr=1e-30,
                                   max_steps=2, ptx_dir=f"{root}/talks", ptx_coef=0.5, ptx_rows=4, ppo_epochs=3,
                                   critic_warmup=0, eval_prompts=0)))
    model, _, _ = load_model(f"{root}/base160")
    order = shuffled(21, 0, 2 * 3 * 2 * 4, 1234).reshape(2, 6, 4)
    for record, step in zip(read_log(tmp_path), order, strict=True):
        losses = [mean_nll(model, [mixed["talks"][i] for i in update]).item() for update in step]
        assert record["ptx_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_rows_longer_than_the_model_sees_are_no_traceback(root, mixed, tmp_path):
    """Text comes in pieces of 128 tokens, conversations as they are; base/ sees 96 tokens. Either they fit in some way,
    or one sentence says that they do not."""
    cfg = ppo.Config(**settings(root, out_dir=str(tmp_path), max_steps=1, ptx_dir=f"{root}/text", ptx_coef=0.5))
    try:
        ppo.main(cfg)
    except (SystemExit, ValueError) as error:  # what configurator.run shows as one line
        assert "\n" not in str(error)


@pytest.mark.parametrize("value", ["None", "float('nan')", "float('inf')", "'a'"])
def test_a_reward_that_is_no_number_is_named(root, tmp_path, value):
    rule = tmp_path / "rule.py"
    rule.write_text(f"def bad(prompt, answer):\n    return {value}\n")
    cfg = ppo.Config(**settings(root, out_dir=str(tmp_path / "run"), reward=f"{rule}:bad", watch=""))
    with pytest.raises(SystemExit, match="the function must return a finite number"):
        ppo.main(cfg)


@pytest.mark.parametrize("value", ["numpy.float32(1.5)", "numpy.sum([1, 2])", "torch.tensor(1.5)", "True"])
def test_a_reward_may_be_any_number(tmp_path, value):
    rule = tmp_path / "rule.py"
    rule.write_text(f"import numpy\nimport torch\n\n\ndef good(prompt, answer):\n    return {value}\n")
    tokenizer = types.SimpleNamespace(decode=lambda ids, skip_special: "春")
    scores = ppo.function_scorer(f"{rule}:good", tokenizer)([([1, 2], [0, 1])])
    assert scores.dtype == torch.float32 and scores.tolist() == [float(eval(value, {"numpy": np, "torch": torch}))]


def test_a_reward_model_with_a_smaller_window_is_refused(root, tmp_path):
    checkpoint = load_checkpoint(f"{root}/reward")
    narrow = ModelConfig(**{**checkpoint["model_config"], "max_seq_len": 12})
    save_checkpoint(str(tmp_path / "narrow" / "ckpt.pt"), {**checkpoint, "model_config": dataclasses.asdict(narrow)})
    cfg = ppo.Config(**settings(root, out_dir=str(tmp_path / "run"), reward_from=str(tmp_path / "narrow")))
    with pytest.raises(SystemExit, match="exceeds the 12 tokens the models can see"):
        ppo.main(cfg)
