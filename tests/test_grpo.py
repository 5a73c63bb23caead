"""grpo.py: its formulas by hand, as plain loops and against TRL, and the whole loop against a problem whose answer
is known."""

import numpy as np
import pytest
import torch
from small_runs import flat_gradient, gibbs_error, gradient, refused, settings, spy, toy_models

import grpo
from model import Transformer

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [3, 3], [9, 8, 7, 6], [2]]


# ---------------------------------------------------------------------------- the whole loop


def test_gibbs(play):
    """rloo ends at the optimum of reward and KL. (The gradient of k3, in the loss of the others, is not that of the
    KL.)"""
    models = toy_models()
    play(grpo, models, advantage="rloo", group_size=4, batch_size=32, max_steps=150)
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
            ids = torch.tensor(ids)
            logps = actor.logits(actor(ids[None, :-1]))[0].div(cfg.temperature).log_softmax(-1)
            counts = 1 / sum(mask) if cfg.ratio == "sequence" else 1  # GSPO counts answers
            for place in range(len(ids) - 1):
                if mask[place + 1]:
                    total = total - A * logps[place, ids[place + 1]] * counts
                    n_tokens += counts
    length = len(documents) * cfg.max_new_tokens if cfg.advantage == "dr_grpo" else n_tokens
    return total / length


@pytest.mark.parametrize("changes", [
    dict(advantage="rloo"), dict(advantage="grpo"), dict(advantage="dr_grpo"),
    dict(advantage="dr_grpo", temperature=0.6), dict(advantage="grpo", skip_flat_groups=True),
    dict(advantage="rloo", skip_flat_groups=True, clip_high=0.3),
    dict(advantage="grpo", ratio="sequence"), dict(advantage="rloo", surrogate="cispo"),
    dict(advantage="dr_grpo", surrogate="cispo", ratio="sequence")])
def test_the_gradient_of_a_step_is_the_plain_loops(play, monkeypatch, changes):
    """Advantages from the answers of a group, the mean over tokens or over a constant length, flat groups out of it."""
    actor, *_ = models = toy_models(head_std=0.5)
    cfg = dict(batch_size=5, group_size=3, grad_accum=2, ppo_epochs=1, minibatches=1, kl_coef=0.0, grad_clip=0.0,
               **changes)
    rollouts = spy(monkeypatch, grpo, "rollout")
    before = Transformer(actor.config)
    before.load_state_dict(actor.state_dict())

    def scorer(documents):  # some groups are flat: those of prompts that begin with a small word
        return torch.tensor([1.0 if ids[0] < 4 else sum(ids[1:]) % 7 / 10 for ids, _ in documents])

    checkpoint, (_, record) = play(grpo, models, PROMPTS, stop=15, scorer=scorer, **cfg)
    documents = [document for _, answers in rollouts for document in answers]
    assert len(documents) == 30 and len({sum(mask) for _, mask in documents}) > 1
    loss = plain_objective(before, documents, scorer(documents).tolist(), grpo.Config(max_new_tokens=8, **cfg))
    plain = flat_gradient(loss, before)
    assert plain.abs().max() > 0.01
    assert (gradient(checkpoint) - plain).abs().max() <= 1e-6
    # the log speaks of all answers, also of groups that nothing is learned from
    assert record["score"] == pytest.approx(scorer(documents).mean().item(), abs=1e-5)
    assert record["length"] == pytest.approx(np.mean([sum(mask) for _, mask in documents]))


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
        assert "give one of --reward=FILE.py:FUNCTION, --reward_from=RUN and --teacher=RUN" in words
