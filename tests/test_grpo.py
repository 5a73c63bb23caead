"""grpo.py: its formulas by hand, as plain loops and against TRL, and the whole loop against a problem whose answer is known."""
import collections
import math
import types

import numpy as np
import pytest
import torch
from small_runs import flat_gradient, gibbs_error, gradient, mean_nll, refused, settings, spy, toy_models

import grpo
from common.rollout import k3
from model import Transformer

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [3, 3], [9, 8, 7, 6], [2]]


def test_group_advantages_by_hand():
    """group_advantages: minus the mean of the others (rloo), minus the mean (dr_grpo), and over the deviation (grpo)."""
    totals = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    rloo = grpo.group_advantages(totals, 3, "rloo")
    assert torch.allclose(rloo, torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3.0]))
    dr_grpo = grpo.group_advantages(totals, 3, "dr_grpo")
    assert torch.allclose(dr_grpo, torch.tensor([-2.0, -1.0, 3.0, -1.0, -1.0, 2.0]))
    scaled = grpo.group_advantages(totals, 3, "grpo").view(2, 3)
    assert torch.allclose(scaled.mean(1), torch.zeros(2), atol=1e-6)
    assert torch.allclose(scaled.std(1), torch.ones(2), atol=1e-3)


def test_policy_loss_by_hand():
    """policy_loss: ratio 1.5 clips to 1.2 (its gain is capped), 0.5 to 0.8 (its loss cannot shrink below), 1.1 stays."""
    old, mask = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    logps = torch.log(torch.tensor([[1.5, 0.5, 1.1, 9.0]]))
    advantages = torch.tensor([[2.0, -1.0, 1.0, 5.0]])
    loss, ratio = grpo.policy_loss(logps, old, advantages, mask, grpo.Config(clip=0.2))
    assert loss.item() == pytest.approx(-2.0 * 1.2 + 1.0 * 0.8 - 1.1, abs=1e-6)
    assert torch.allclose(ratio, torch.tensor([[1.5, 0.5, 1.1, 1.0]]))


VARIANTS = [dict(clip=0.2), dict(clip=0.2, clip_high=0.35), dict(ratio="sequence", clip=0.02), dict(surrogate="cispo", clip=0.2, clip_high=0.3),
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
    cfg = grpo.Config(**changes)
    logps, old, advantages, mask = answers_for_the_loss()
    loss, ratio = grpo.policy_loss(logps, old, advantages[:, None] * mask, mask, cfg)
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
            if cfg.ratio == "sequence":
                A = A / len(places)  # each answer counts once
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
    cfg = grpo.Config(**changes)
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
        ours, _ = grpo.policy_loss(logps, old, advantages[:, None] * mask, mask, cfg)
        ours = (ours + kl_coef * (k3(logps, ref) * mask).sum()) * weight
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
        grads = [torch.autograd.grad(x, logps)[0] for x in (ours, theirs)]
        assert torch.allclose(*grads, atol=1e-7)


# ---------------------------------------------------------------------------- the whole loop


@pytest.mark.parametrize("advantage", ["rloo", "dr_grpo"])
def test_gibbs(play, advantage):
    """The policy ends at the optimum of reward and KL, whether the KL is in the reward (k1) or in the loss (k3)."""
    models = toy_models()
    play(grpo, models, advantage=advantage, group_size=4, batch_size=32, max_steps=150)
    assert gibbs_error(models) <= 0.03


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
            share = 1 / sum(mask) if cfg.ratio == "sequence" else 1.0  # GSPO: an answer counts once, else each token
            ids = torch.tensor(ids)
            logps = actor.logits(actor(ids[None, :-1]))[0].div(cfg.temperature).log_softmax(-1)
            for place in range(len(ids) - 1):
                if mask[place + 1]:
                    total = total - A * share * logps[place, ids[place + 1]]
                    n_tokens += share
    is_constant = cfg.advantage == "dr_grpo" and cfg.ratio == "token"
    length = len(documents) * cfg.max_new_tokens if is_constant else n_tokens
    return total / length


@pytest.mark.parametrize("changes", [
    dict(advantage="rloo"), dict(advantage="grpo"), dict(advantage="dr_grpo"),
    dict(advantage="dr_grpo", temperature=0.6), dict(advantage="grpo", skip_flat_groups=True),
    dict(advantage="rloo", skip_flat_groups=True, clip_high=0.3), dict(advantage="rloo", skip_flat_groups=True, kl_coef=0.5),
    dict(advantage="grpo", ratio="sequence"), dict(advantage="rloo", surrogate="cispo"),
    dict(advantage="dr_grpo", surrogate="cispo", ratio="sequence")])
def test_the_gradient_of_a_step_is_the_plain_loops(play, monkeypatch, changes):
    """Advantages from the answers of a group, the mean over tokens or over a constant length, flat groups out of it."""
    actor, *_ = models = toy_models(head_std=0.5)
    cfg = dict(batch_size=5, group_size=3, grad_accum=2, ppo_epochs=1, minibatches=1, kl_coef=0.0, grad_clip=0.0) | changes
    rollouts = spy(monkeypatch, grpo, "rollout")
    before = Transformer(actor.config)
    before.load_state_dict(actor.state_dict())

    def scorer(documents):  # some groups are flat: those of prompts that begin with a small word
        return torch.tensor([1.0 if ids[0] < 4 else sum(ids[1:]) % 7 / 10 for ids, _ in documents])

    checkpoint, (_, record) = play(grpo, models, PROMPTS, stop=15, scorer=scorer, **cfg)
    documents = [document for _, answers in rollouts for document in answers]
    assert len(documents) == 30 and len({sum(mask) for _, mask in documents}) > 3
    loss = plain_objective(before, documents, scorer(documents).tolist(), grpo.Config(max_new_tokens=8, **cfg))
    plain = flat_gradient(loss, before)
    assert plain.abs().max() > 0.01
    assert (gradient(checkpoint) - plain).abs().max() <= 1e-6
    assert record["score"] == pytest.approx(scorer(documents).mean().item(), abs=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_what_the_log_says_of_the_answers(play, monkeypatch, skip):
    """Length, entropy and KL are those of the answers, all of them, also of groups that nothing is learned from."""
    actor, reference, _ = models = toy_models(head_std=0.5)
    reference.lm_head.weight.data.zero_()
    rollouts = spy(monkeypatch, grpo, "rollout")

    def scorer(documents):
        return torch.tensor([1.0 if ids[0] < 4 else float(sum(ids)) for ids, _ in documents])

    _, (_, record) = play(grpo, models, PROMPTS, stop=15, scorer=scorer, batch_size=6, group_size=4,
                          skip_flat_groups=skip, lr=1e-30, min_lr=1e-30)
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
    """clip_share: answer tokens whose ratio left the bounds, the mean over updates."""
    calls = spy(monkeypatch, grpo, "policy_loss")
    _, (_, record) = play(grpo, toy_models(), PROMPTS, stop=15, group_size=2, batch_size=8, lr=0.02, clip=0.1,
                          clip_high=0.3, surrogate=surrogate)
    shares = []
    for (logps, old, _, mask, _), _ in calls:  # 8 of the 16 answers in each of 2 x 2 updates
        ratio = ((logps - old) * mask).exp().flatten().tolist()
        shares.append(sum(not 0.9 <= r <= 1.3 for r in ratio) / mask.sum().item())
    assert len(calls) == 4
    assert record["clip_share"] == pytest.approx(np.mean(shares), abs=1e-6) and record["clip_share"] > 0.02


def test_settings_that_do_not_fit_together(place, tmp_path):
    """A group of one has nobody to be compared with, and there is one reward, of a rule or of a model."""
    root = place[0]
    assert "give --group_size=4, not 1" in refused(settings(root, "grpo", str(tmp_path), group_size=1))
    for changes in (dict(reward=""), dict(reward_from="reward")):
        words = refused(settings(root, "grpo", str(tmp_path), **changes))
        assert "give either --reward=FILE.py:FUNCTION or --reward_from=RUN" in words
