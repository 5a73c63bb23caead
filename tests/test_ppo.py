"""PPO: its formulas against numbers worked by hand, and the whole loop against a problem whose answer is known."""
import dataclasses
import json
import math
import os

import numpy as np
import pytest
import torch

import ppo
from common import Env, load_checkpoint, make_optimizers, model_from, save_checkpoint
from lora import add_lora, lora_state_dict, weights_hash
from model import ModelConfig, ScalarModel, Transformer
from pairs import assert_same, make_run, one_thread, read_log, run_in_two, run_with_a_break  # noqa: F401
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
    loss, ratio, clipped = ppo.policy_loss(logps, old, advantages, mask, clip=0.2)
    # 1.5 clips to 1.2 (gain capped), 0.5 clips to 0.8 (loss cannot shrink below), 1.1 stays
    assert loss.item() == pytest.approx(-2.0 * 1.2 + 1.0 * 0.8 - 1.1, abs=1e-6)
    assert clipped.item() == 2


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


def test_whiten():
    x, mask = torch.randn(3, 7) * 5 + 2, (torch.rand(3, 7) < 0.7).float()
    inside = ppo.whiten(x, mask, ENV)[mask.bool()]
    assert abs(inside.mean()) < 1e-5 and abs(inside.std(unbiased=False) - 1) < 1e-5
    kept = ppo.whiten(x, mask, ENV, shift_mean=False)[mask.bool()]
    assert abs(kept.mean() - x[mask.bool()].mean()) < 1e-4 and abs(kept.std(unbiased=False) - 1) < 1e-5


def test_kl_estimators_meet_the_closed_form():
    p, q = torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.3, 0.3, 0.4])
    exact = (p * (p / q).log()).sum()
    assert torch.allclose((p * ppo.k3(p.log(), q.log())).sum(), exact, atol=1e-6)
    assert (ppo.k3(torch.randn(100), torch.randn(100)) >= 0).all()


def test_adaptive_kl_coefficient():
    assert ppo.adapt_kl_coef(0.1, kl=10.0, target=5.0, n=1000) == pytest.approx(0.1 * 1.02)
    assert ppo.adapt_kl_coef(0.1, kl=0.0, target=5.0, n=1000) == pytest.approx(0.1 * 0.98)
    assert ppo.adapt_kl_coef(0.1, kl=5.5, target=5.0, n=1000) == pytest.approx(0.1 * 1.01)


# ---------------------------------------------------------------------------- the whole loop


def tiny(**settings):
    base = dict(batch_size=32, max_new_tokens=8, ppo_epochs=2, minibatches=2, kl_coef=0.5, lr=3e-3, min_lr=3e-4,
                critic_lr=3e-3, warmup_steps=1, max_steps=100, seed=1)
    return ppo.Config(**base | settings)


def models(vocab=16, seed=0):
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=vocab, dim=32, n_layers=1, n_heads=2, max_seq_len=16, tie_embeddings=False)
    actor, reference = Transformer(config).eval(), Transformer(config).eval()
    torch.nn.init.zeros_(actor.lm_head.weight)  # uniform whatever came before: the optimum then has a closed form
    reference.load_state_dict(actor.state_dict())
    return actor, reference.requires_grad_(False), ScalarModel(config).eval()


def count_small(documents):
    return torch.tensor([float(sum(t < 4 for t, m in zip(ids, mask) if m)) for ids, mask in documents])


def step_of(actor, reference, critic, cfg, step, optimizers, critic_optimizers, stop_ids=()):
    ppo.set_lr(optimizers + critic_optimizers, ppo.lr_at(step, cfg))
    prompts = {0: [[5]] * cfg.batch_size}
    batch, _, _ = ppo.collect(actor, reference, critic, count_small, prompts, stop_ids, 0, cfg, step, cfg.kl_coef, ENV)
    return batch, ppo.update(actor, critic, batch, cfg, step, cfg.kl_coef, ENV, optimizers, critic_optimizers)


@torch.no_grad()
def share_of_small(model, temperature, n=2000):
    """Mean over sampled prefixes of the policy's exact probability of a token < 4, at each of the 8 places."""
    rows = torch.tensor(model.generate([[5]] * n, 8, temperature=temperature, seed=7))
    ids = torch.cat([torch.full((n, 1), 5), rows], dim=1)[:, :-1]
    return (model(ids) / temperature).softmax(-1)[:, :, :4].sum(-1), ids


@pytest.mark.parametrize("advantage,temperature", [("gae", 1.0), ("rloo", 1.0), ("gae", 0.7)])
def test_gibbs(advantage, temperature):
    """The optimum of E[reward] - kl_coef KL is the Gibbs distribution pi = q exp(reward/kl_coef)/Z (Korbak 2022).

    The reward counts tokens < 4, so every place is alike: p* = q e^2 / (q e^2 + 1 - q), whatever came before.
    Guards against a flipped KL sign (p runs to 1), a lost KL term, a score on the wrong token, sampling at another
    temperature than log-probs are taken at (the run at 0.7), and advantages that mix rows.
    """
    torch.set_num_threads(1)
    group = 1 if advantage == "gae" else 4
    cfg = tiny(advantage=advantage, group_size=group, batch_size=128 // group, temperature=temperature, max_steps=150)
    actor, reference, critic = models()
    critic = critic if advantage == "gae" else None
    optimizers = make_optimizers(actor, cfg)
    critic_optimizers = make_optimizers(critic, cfg) if critic else []
    for step in range(cfg.max_steps):
        step_of(actor, reference, critic, cfg, step, optimizers, critic_optimizers)
    p, ids = share_of_small(actor, temperature)
    with torch.no_grad():
        q = (reference(ids) / temperature).softmax(-1)[:, :, :4].sum(-1)
    best = q * math.e ** 2 / (q * math.e ** 2 + 1 - q)
    assert (p - best).mean(0).abs().max() <= 0.03

    def objective(p):  # of one place: reward - kl_coef * KL of the two-sided coin (within each side pi is q's shape)
        return (p - 0.5 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())).mean()
    assert objective(p) >= 0.98 * objective(best)


def test_first_ratio_is_one_and_generation_agrees():
    """Guards against stale caches, wrong positions of padded prompts, and another temperature while training."""
    actor, reference, critic = models()
    cfg = tiny(temperature=0.8, ppo_epochs=1, minibatches=1, batch_size=6)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [3, 3], [9, 8, 7, 6], [2]]
    answers, logps = actor.generate(prompts, 8, temperature=0.8, stop_ids=[15], seed=0, return_logps=True)
    batch, _, _ = ppo.collect(actor, reference, critic, count_small, {0: prompts}, [15], 0, cfg, 0, 0.5, ENV)
    documents = ppo.rollout(actor, prompts, [15], 0, cfg, 0, ENV)
    ids, targets, mask = ppo.collate(documents, 0)
    trained = actor.logps(ids, targets, mask, 0.8)
    for row, generated in enumerate(logps):
        assert documents[row][0] == prompts[row] + answers[row]
        assert torch.allclose(trained[row][mask[row].bool()], torch.tensor(generated), atol=1e-4)
    optimizers, critic_optimizers = make_optimizers(actor, cfg), make_optimizers(critic, cfg)
    stats = ppo.update(actor, critic, batch, cfg, 0, 0.5, ENV, optimizers, critic_optimizers)
    assert stats["first_ratio_error"] == 0.0


def test_early_stop_really_stops():
    actor, reference, critic = models()
    cfg = tiny(target_kl=1e-6, lr=0.05, ppo_epochs=4)
    before = {k: v.clone() for k, v in actor.state_dict().items()}
    optimizers, critic_optimizers = make_optimizers(actor, cfg), make_optimizers(critic, cfg)
    _, stats = step_of(actor, reference, critic, cfg, 0, optimizers, critic_optimizers)
    assert stats["updates"] == 1  # the first moves the policy, the second sees that it went too far and does nothing
    assert int(optimizers[0].state_dict()["state"][0]["step"]) == 1
    assert any(not torch.equal(v, before[k]) for k, v in actor.state_dict().items())
    assert all(p.grad is None for p in actor.parameters())


def test_unended_answers_are_penalised():
    actor, reference, critic = models()
    cfg = tiny(no_eos_penalty=100.0, kl_coef=0.0, batch_size=16, lam=1.0)  # returns are then plain sums of rewards
    batch, _, _ = ppo.collect(actor, reference, critic, count_small, {0: [[5]] * 16}, [15], 0, cfg, 0, 0.0, ENV)
    free = dataclasses.replace(cfg, no_eos_penalty=0.0)
    same, _, _ = ppo.collect(actor, reference, critic, count_small, {0: [[5]] * 16}, [15], 0, free, 0, 0.0, ENV)
    assert 0 < batch["ended"].sum() < 16
    difference = same["returns"] - batch["returns"]
    penalty = 100.0 * (1 - batch["ended"])[:, None] * batch["mask"]
    assert torch.allclose(difference, penalty, atol=1e-3)


def test_micro_steps_do_not_matter():
    """Four micro-steps of 8 prompts are the update that their rows make in any order: rows are numbered globally."""
    results = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        actor, reference, critic = models()
        cfg = tiny(batch_size=8, grad_accum=4, lr=1e-4, critic_lr=1e-4)
        prompts = {8 * i: [[5 + i]] * 8 for i in order}
        batch, _, _ = ppo.collect(actor, reference, critic, count_small, prompts, (), 0, cfg, 0, 0.5, ENV)
        ppo.update(actor, critic, batch, cfg, 0, 0.5, ENV, make_optimizers(actor, cfg), make_optimizers(critic, cfg))
        results.append(torch.cat([p.flatten() for p in actor.parameters()]))
    assert torch.allclose(*results, atol=1e-6)


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
        "fingerprint": tok.fingerprint, "step": 1})
    rows = [render_chat(tok, [{"role": "user", "content": "春夜" * (1 + i % 3)}], add_generation_prompt=True)[0]
            for i in range(24)]
    os.makedirs(f"{root}/prompts")
    meta = {"kind": "prompts", "dtype": "uint16", "fingerprint": tok.fingerprint, "vocab_size": tok.vocab_size,
            "tokenizer": "tokenizer.model"}
    for split in ("train", "val"):
        np.array(sum(rows, []), "<u2").tofile(f"{root}/prompts/{split}.bin")
        np.cumsum([0] + [len(r) for r in rows]).astype(np.int64).tofile(f"{root}/prompts/{split}.idx")
        meta[split] = {"tokens": sum(map(len, rows)), "documents": len(rows)}
    with open(f"{root}/prompts/meta.json", "w") as f:
        json.dump(meta, f)
    with open(f"{root}/rule.py", "w", encoding="utf-8") as f:
        f.write("def length(prompt, answer):\n    assert '春夜' in prompt\n    return -len(answer)\n")
    return root


def settings(root, **changes):
    base = dict(data_dir=f"{root}/prompts", init_from=f"{root}/base", reward_from=f"{root}/reward", batch_size=4,
                grad_accum=2, max_new_tokens=10, max_steps=4, lr=1e-3, eval_every=2, eval_prompts=32, save_every=2,
                warmup_steps=1, watch=f"{root}/rule.py:length", device="cpu")
    return {**base, **changes}


TIMES = ("generate_share", "score_share", "train_share")


@pytest.mark.parametrize("changes", [dict(), dict(advantage="rloo", group_size=2, reward="rule.py:length"),
                                     dict(kl_target=0.01, whiten_rewards=True)])
def test_resume_is_bit_for_bit(root, tmp_path, monkeypatch, changes):
    monkeypatch.chdir(root)
    whole = ppo.Config(**settings(root, out_dir=str(tmp_path / "whole"), **changes))
    ppo.main(whole)
    broken = dataclasses.replace(whole, out_dir=str(tmp_path / "broken"))
    run_with_a_break(ppo, broken, 2, monkeypatch)
    a, b = load_checkpoint(whole.out_dir), load_checkpoint(broken.out_dir)
    assert ("critic" in a) == (whole.advantage == "gae")
    assert_same(a, b)


@pytest.mark.parametrize("changes", [dict(), dict(advantage="grpo", group_size=2)])
def test_two_processes_compute_what_one_does(root, tmp_path, changes):
    """Rollouts included: what a micro-step generates depends on (seed, step, micro-step), not on who generates it."""
    config = settings(root, max_steps=2, max_new_tokens=8, lr=1e-4, critic_lr=1e-4, **changes)
    ppo.main(ppo.Config(**config, out_dir=str(tmp_path / "one")))
    run_in_two("ppo.py", str(tmp_path / "two"), config)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        for key in a:
            if key not in TIMES:
                assert a[key] == pytest.approx(b[key], abs=2e-5), key
    a, b = (load_checkpoint(str(tmp_path / name)) for name in ("one", "two"))
    assert_same(a["model"], b["model"], atol=1e-6)


def test_starts_from_adapters(root, tmp_path):
    """A run of sft.py --lora_rank is merged with its base; with adapters of zero it is the base."""
    base = load_checkpoint(f"{root}/base")
    model = add_lora(model_from(base), 2, 4.0, "qkv|down", base="../base", base_hash=weights_hash(base["model"]))
    save_checkpoint(f"{root}/adapters/ckpt.pt", {**base, "model": lora_state_dict(model), "lora": model.lora},
                    f"{root}/base/tokenizer.model")
    for name in ("base", "adapters"):
        ppo.main(ppo.Config(**settings(root, init_from=f"{root}/{name}", out_dir=str(tmp_path / name), max_steps=1)))
    assert_same(*(load_checkpoint(str(tmp_path / name))["model"] for name in ("base", "adapters")))


def test_a_new_kl_coef_is_obeyed_and_a_new_run_has_a_new_log(root, tmp_path):
    cfg = ppo.Config(**settings(root, out_dir=str(tmp_path), max_steps=1))
    ppo.main(cfg)
    ppo.main(dataclasses.replace(cfg, max_steps=2, kl_coef=0.3))
    assert [r["kl_coef"] for r in read_log(tmp_path)[1:]] == [cfg.kl_coef, 0.3]
    ppo.main(dataclasses.replace(cfg, resume=False))
    assert [r["step"] for r in read_log(tmp_path)] == [0, 1]


def test_prompts_too_long_and_none_held_out(root, tmp_path):
    with pytest.raises(SystemExit, match="prompt of .* tokens; with max_new_tokens=90 .* the 96 tokens"):
        ppo.main(ppo.Config(**settings(root, out_dir=str(tmp_path), max_new_tokens=90)))
    ppo.main(ppo.Config(**settings(root, out_dir=str(tmp_path), max_steps=1, eval_prompts=0)))
    assert not any("val_score" in r for r in read_log(tmp_path))
