"""ppo.py: its formulas by hand and against torchrl, and the whole loop against a problem whose answer is known."""
import math

import numpy as np
import pytest
import torch
from small_runs import CPU, gibbs_error, run, settings, spy, toy_models

import grpo
import ppo

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [3, 3], [9, 8, 7, 6], [2]]


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
    """token_rewards: -0.1 * log(pi/ref) at each answer token, and the score at the last."""
    logps, ref = torch.tensor([[0.0, -1.0, -2.0, 0.0]]), torch.tensor([[0.0, -1.5, -1.0, 0.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    rewards = ppo.token_rewards(torch.tensor([3.0]), logps, ref, mask, kl_coef=0.1)
    assert torch.allclose(rewards, torch.tensor([[0.0, -0.05, 0.1 + 3.0, 0.0]]))


def test_policy_loss_and_its_gradient_are_those_of_grpo():
    """Two copies of one formula; grpo.py's is compared with the papers and with TRL."""
    logps, old, advantages = (0.3 * torch.randn(3, 5, 7)).unbind()
    mask = (torch.rand(5, 7) < 0.7).float()
    logps.requires_grad_()
    ours, _ = ppo.policy_loss(logps, old, advantages, mask, 0.1)
    theirs, _ = grpo.policy_loss(logps, old, advantages, mask, grpo.Config(clip=0.1))
    assert torch.allclose(ours, theirs)
    assert torch.allclose(*(torch.autograd.grad(loss, logps)[0] for loss in (ours, theirs)))


def test_whiten():
    x, mask = torch.randn(3, 7) * 5 + 2, (torch.rand(3, 7) < 0.7).float()
    inside = ppo.whiten(x, mask, CPU)[mask.bool()]
    assert abs(inside.mean()) < 1e-5 and abs(inside.std(unbiased=False) - 1) < 1e-5


# ---------------------------------------------------------------------------- the whole loop


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gibbs(play, temperature):
    """The policy ends at the optimum of reward and KL. Guards against a flipped sign of the KL (p runs to 1), a lost KL
    term, a score on the wrong token, sampling at another temperature than log-probs are taken at."""
    models = toy_models()
    play(ppo, models, batch_size=128, temperature=temperature, max_steps=150)
    assert gibbs_error(models, temperature) <= 0.03


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_critic_learns_alone_first(play):
    """critic_warmup=2: the policy stands where it started until the third step's update."""
    _, log = play(ppo, toy_models(), critic_warmup=2, max_steps=4, lr=0.02)
    kl = [record["kl"] for record in log if "kl" in record]
    assert kl[:3] == [0, 0, 0] and kl[3] != 0


def test_unended_answers_are_penalised(play, monkeypatch):
    """Of lam 1 and no KL the returns of an answer's tokens are its score, less the penalty where it was cut."""
    results = []
    for penalty in (100.0, 0.0):
        rollouts, estimates = spy(monkeypatch, ppo, "rollout"), spy(monkeypatch, ppo, "gae")
        play(ppo, toy_models(), stop=15, no_eos_penalty=penalty, kl_coef=0.0, batch_size=16, lam=1.0)
        (_, documents), ((_, _, mask, _, _), (_, returns)) = rollouts[0], estimates[0]
        ended = torch.tensor([float(ids[-1] in (14, 15)) for ids, _ in documents])
        results.append((returns, ended, mask))
        monkeypatch.undo()
    (with_penalty, ended, mask), (without, _, _) = results
    assert 0 < ended.sum() < 16
    assert torch.allclose(without - with_penalty, 100.0 * (1 - ended)[:, None] * mask, atol=1e-3)


def test_what_the_log_says_of_the_updates(play, monkeypatch):
    """clip_share: tokens whose ratio left the bounds; step_kl: k3 from the policy that answered; means over updates."""
    calls = spy(monkeypatch, ppo, "policy_loss")
    _, (_, record) = play(ppo, toy_models(), PROMPTS, stop=15, batch_size=16, lr=0.02, clip=0.1)
    shares, kls = [], []
    for (logps, old, _, mask, _), _ in calls:  # 8 of the 16 answers in each of 2 x 2 updates
        ratio = ((logps - old) * mask).exp().detach().flatten()
        n = mask.sum().item()
        shares.append(sum(not 0.9 <= r <= 1.1 for r in ratio.tolist()) / n)
        kls.append(sum(1 / r - 1 - math.log(1 / r) for r in (1 / ratio).tolist()) / n)
    assert len(calls) == 4
    assert record["clip_share"] == pytest.approx(np.mean(shares), abs=1e-6) and record["clip_share"] > 0.02
    assert record["step_kl"] == pytest.approx(np.mean(kls), abs=1e-5)


def test_a_new_kl_coef_is_obeyed(place, tmp_path, monkeypatch):
    calls = spy(monkeypatch, ppo, "token_rewards")
    run(settings(place[0], "ppo", str(tmp_path), max_steps=1))
    run(settings(place[0], "ppo", str(tmp_path), max_steps=2, kl_coef=0.3))
    assert [args[4] for args, _ in calls] == [ppo.Config().kl_coef, 0.3]
    _, log = run(settings(place[0], "ppo", str(tmp_path), max_steps=1, resume=False))
    assert [record["step"] for record in log] == [0, 1]  # a new run has a new log
