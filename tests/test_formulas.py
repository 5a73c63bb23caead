"""
The formulas of the project, each worked by hand or written out plainly: short tests to read beside the code. They pass
for any right implementation, so they grade the exercises, too: python -m learn.exercise
"""
import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import dpo
import grpo
import model
import ppo
import pretrain
import reward
import sft
import tokenizer
from common import generate, loss, optim, rollout
from recipes import bpe

# ---------------------------------------------------------------------------- text to rows


def test_join_by_hand():
    """From left to right, every occurrence of the pair becomes one token."""
    assert bpe.join([b"a", b"b", b"c", b"a", b"b"], (b"a", b"b")) == [b"ab", b"c", b"ab"]
    assert bpe.join([b"a", b"a", b"a"], (b"a", b"a")) == [b"aa", b"a"]


def test_join_joins_this_pair_alone():
    """Neighbours that spell the same bytes but are another pair stay apart."""
    assert bpe.join([b"a", b"bc"], (b"ab", b"c")) == [b"a", b"bc"]
    assert bpe.join([b"b", b"a"], (b"a", b"b")) == [b"b", b"a"]


def batch_at(step, micro_step, seed=1):
    cfg = SimpleNamespace(seq_len=8, batch_size=4, grad_accum=2, seed=seed)
    return pretrain.get_batch(np.arange(40, dtype=np.uint16), cfg, step, micro_step, torch.device("cpu"))


def test_get_batch_shifts_by_one():
    """Rows are consecutive tokens, and the target of each is the token after it."""
    x, y = batch_at(0, 0)
    assert x.shape == y.shape == (4, 8) and x.dtype == torch.int64
    assert_close(x, x[:, :1] + torch.arange(8))
    assert_close(y, x + 1)


def test_get_batch_begins_anywhere():
    """Every place of the text is a possible beginning, and the last token a possible target."""
    firsts = set()
    for step in range(100):
        for micro_step in range(2):
            firsts.update(batch_at(step, micro_step)[0][:, 0].tolist())
    assert firsts == set(range(32))


def test_get_batch_depends_on_seed_and_step_alone():
    """The same (seed, step, micro_step) gives the same rows, whatever came before; another gives others."""
    x, _ = batch_at(3, 1)
    torch.manual_seed(9)
    np.random.seed(9)
    assert_close(batch_at(3, 1)[0], x)
    for other in (batch_at(3, 0), batch_at(4, 1), batch_at(3, 1, seed=2)):
        assert not torch.equal(other[0], x)


class Characters:
    """A tokenizer whose ids are code points."""
    im_start_id = 1
    im_end_id = 2

    def encode(self, text):
        return [ord(char) for char in text]


def test_render_chat_by_hand():
    """<|im_start|>role newline words <|im_end|> newline, and 1 on the assistant's words and their <|im_end|> alone."""
    turns = [{"role": "user", "content": "床"}, {"role": "assistant", "content": "月光"}]
    ids, mask = tokenizer.render_chat(Characters(), turns)
    assert ids == [1, *map(ord, "user\n床"), 2, ord("\n"), 1, *map(ord, "assistant\n月光"), 2, ord("\n")]
    learned = [i for i, m in zip(ids, mask, strict=True) if m]
    assert learned == [ord("月"), ord("光"), 2]


def test_render_chat_leaves_out_weight_zero():
    """An answer of weight 0 is read and not learned, its <|im_end|> neither."""
    turns = [{"role": "assistant", "content": "月", "weight": 0}, {"role": "assistant", "content": "光"}]
    ids, mask = tokenizer.render_chat(Characters(), turns)
    assert [i for i, m in zip(ids, mask, strict=True) if m] == [ord("光"), 2]


def test_render_chat_prompt_is_a_prefix_of_the_row():
    """What the model is asked with is the beginning of the row that it learned from."""
    turns = [{"role": "user", "content": "床"}, {"role": "assistant", "content": "月光"}]
    row, _ = tokenizer.render_chat(Characters(), turns)
    prompt, mask = tokenizer.render_chat(Characters(), turns[:1], add_generation_prompt=True)
    assert row[:len(prompt)] == prompt and row[len(prompt):] == [ord("月"), ord("光"), 2, ord("\n")]
    assert not any(mask) and len(mask) == len(prompt)


def test_pack_takes_every_conversation_once():
    """Every conversation that fits is in one row, no row is longer than T, and longer ones are left out."""
    lengths = np.random.default_rng(0).integers(1, 60, size=300)
    rows = sft.pack(lengths, 50, 1)
    assert sorted(i for row in rows for i in row) == [i for i in range(300) if lengths[i] <= 50]
    assert max(lengths[row].sum() for row in rows) <= 50


def test_pack_wastes_little():
    """Short ones fill the room that long ones leave: 7 + 3 = 10."""
    assert len(sft.pack(np.array([7, 3] * 50), 10, 1)) <= 53
    lengths = np.random.default_rng(0).integers(1, 50, size=500)
    assert len(sft.pack(lengths, 50, 1)) < 1.1 * lengths.sum() / 50


def test_pack_order_follows_from_the_seed():
    """The same seed packs the same rows, another seed others."""
    lengths = np.random.default_rng(0).integers(1, 50, size=100)
    assert sft.pack(lengths, 50, 1, 0) == sft.pack(lengths, 50, 1, 0)
    assert sft.pack(lengths, 50, 1, 0) != sft.pack(lengths, 50, 1, 1)


# ---------------------------------------------------------------------------- the model


def test_rotate_by_hand():
    """A quarter turn takes (1, 3) to (-3, 1); pairs are (x[i], x[i + D/2])."""
    quarter = torch.tensor(math.pi / 2)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    angles = torch.stack([quarter, torch.tensor(0.0)])
    y = model.rotate(x, angles.cos(), angles.sin())
    assert_close(y.flatten(), torch.tensor([-3.0, 2.0, 1.0, 4.0]), atol=1e-6, rtol=0)
    assert model.rotate(x.bfloat16(), angles.cos(), angles.sin()).dtype == torch.bfloat16


def test_rotate_makes_products_depend_on_distance():
    """q at 7 times k at 4 is q at 13 times k at 10."""
    config = model.ModelConfig(dim=16, n_heads=1, max_seq_len=32)
    cos, sin = model.rope_table(config)
    q, k = torch.randn(2, 1, 1, 1, 16)

    def product(i, j):
        return (model.rotate(q, cos[i], sin[i]) * model.rotate(k, cos[j], sin[j])).sum()

    assert_close(product(7, 4), product(13, 10))
    assert abs(product(7, 4) - product(7, 5)) > 1e-3


def plain_attention(q, k, v, mask):
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
    scores = q @ k.mT / math.sqrt(q.size(-1))
    scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


def test_attend_without_a_mask_sees_the_past():
    """softmax(q k / sqrt(D)) v over the keys up to each query's own place; query heads share key heads."""
    q = torch.randn(2, 4, 5, 8)
    k, v = torch.randn(2, 2, 2, 5, 8)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    assert_close(model.attend(q, k, v, None), plain_attention(q, k, v, causal))


def test_attend_sees_what_the_mask_shows():
    """Where a mask is given, it alone says which keys a query sees."""
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    mask = torch.rand(2, 1, 5, 5) < 0.5
    mask |= torch.eye(5, dtype=torch.bool)
    assert_close(model.attend(q, k, v, mask), plain_attention(q, k, v, mask))


def test_attend_one_new_token():
    """Decoding: one query, behind all the keys of the cache."""
    q = torch.randn(2, 4, 1, 8)
    k, v = torch.randn(2, 2, 2, 5, 8)
    everything = torch.ones(1, 5, dtype=torch.bool)
    assert_close(model.attend(q, k, v, None), plain_attention(q, k, v, everything))


def test_document_positions_by_hand():
    """Positions begin at 0 in every document, also in one whose number was there before."""
    docs = torch.tensor([[1, 1, 1, 2, 2, 3], [5, 5, 0, 0, 5, 5]])
    assert model.document_positions(docs).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 0, 1]]


def test_append_returns_old_and_new():
    """New keys and values stand behind the old ones, layer by layer, and stay for the next call."""
    config = model.ModelConfig(dim=8, n_heads=2, n_layers=2)
    cache = model.KVCache(config, torch.zeros(1, dtype=torch.long), 4, torch.float32)
    k, v = torch.randn(2, 1, 2, 3, 4)
    for layer in range(2):
        keys, values = cache.append(layer, k[:, :, :2] + layer, v[:, :, :2] - layer)
        assert_close(keys, k[:, :, :2] + layer)
        assert_close(values, v[:, :, :2] - layer)
    cache.length = 2  # the model does this after its last layer
    for layer in range(2):
        keys, values = cache.append(layer, k[:, :, 2:] + layer, v[:, :, 2:] - layer)
        assert_close(keys, k + layer)
        assert_close(values, v - layer)
    assert cache.length == 2


# ---------------------------------------------------------------------------- losses and optimizers


def test_softmax_nll_and_its_gradient():
    """-log softmax at the target, and softmax - onehot, as autograd finds them."""
    logits = torch.randn(5, 7, requires_grad=True)
    target = torch.tensor([0, 6, 3, 3, 1])
    nll, gradient = loss.softmax_nll(logits.detach(), target[:, None])
    expected = F.cross_entropy(logits, target, reduction="none")
    assert_close(nll, expected.detach())
    assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0])


def test_softmax_nll_of_huge_logits():
    """exp(1000) is infinite in fp32; the loss is not."""
    logits = torch.tensor([[1000.0, 0.0]])
    nll, gradient = loss.softmax_nll(logits, torch.tensor([[1]]))
    assert nll.item() == 1000
    assert gradient.tolist() == [[1, -1]]


def schedule(**changes):
    return SimpleNamespace(**{**dict(lr=1.0, min_lr=0.0, max_steps=20, warmup_steps=4), **changes})


def test_lr_at_warms_up():
    """A straight rise to lr; without a number, over a tenth of the run, at most 100 steps."""
    assert [optim.lr_at(step, schedule()) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert optim.lr_at(0, schedule(warmup_steps=0)) == 0.5
    assert math.isclose(optim.lr_at(0, schedule(warmup_steps=0, max_steps=5000)), 0.01)


def test_lr_at_falls_along_a_cosine():
    """Half-way down in the middle, at min_lr in the end."""
    cfg = schedule(min_lr=0.2)
    assert math.isclose(optim.lr_at(12, cfg), 0.6)
    assert math.isclose(optim.lr_at(8, cfg), 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert math.isclose(optim.lr_at(20, cfg), 0.2)


def test_lr_at_stays_then_falls_in_a_line():
    """decay_steps: flat, then a straight line to min_lr."""
    assert optim.lr_at(15, schedule(), decay_steps=4) == 1
    assert optim.lr_at(18, schedule(), decay_steps=4) == 0.5
    assert math.isclose(optim.lr_at(18, schedule(min_lr=0.2), decay_steps=4), 0.6)


def test_orthogonalize_against_an_svd():
    """About U V' of the singular value decomposition U S V', for tall and for wide matrices, several at once."""
    for rows, columns in ((16, 16), (16, 40), (40, 16)):
        x = torch.randn(3, rows, columns)
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        error = (optim.orthogonalize(x) - u @ v).norm() / (u @ v).norm()
        assert error < 0.1, f"{rows} x {columns}: a relative error of {error:.2f}"


def test_orthogonalize_forgets_the_scale():
    """A matrix a thousand times as large has the same directions."""
    x = torch.randn(1, 8, 12)
    assert_close(optim.orthogonalize(1000 * x), optim.orthogonalize(x), atol=1e-2, rtol=0)


# ---------------------------------------------------------------------------- learning from preferences and rewards


def test_ranking_loss_by_hand():
    """-log sigmoid(chosen - rejected), the mean over a prompt's pairs, one number a prompt."""
    losses = reward.ranking_loss(torch.tensor([2.0, 0.0, 3.0, 1.0, 0.0]), [2, 3])
    pairs = -F.logsigmoid(torch.tensor([2.0, 2.0, 3.0, 1.0]))
    assert_close(losses, torch.stack([pairs[0], pairs[1:].mean()]))


def test_ranking_loss_centres():
    """Differences alone leave open where 0 is; the second term pulls the sum of two scores there."""
    scores = torch.tensor([2.0, 1.0])
    assert_close(reward.ranking_loss(scores, [2]), reward.ranking_loss(scores + 100, [2]))
    extra = reward.ranking_loss(scores, [2], centre=0.1) - reward.ranking_loss(scores, [2])
    assert_close(extra, torch.tensor([0.9]))


def test_gae_by_hand():
    """delta = reward + gamma next value - value, and each advantage adds gamma lam of the next one."""
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.25, 0.5]])
    advantages, returns = ppo.gae(rewards, values, torch.ones(1, 3), 0.5, 0.5)
    # delta: 0.5 * 0.25 - 0.5, 0.5 * 0.5 - 0.25, 1 - 0.5
    expected = torch.tensor([[-0.375 + 0.25 * 0.125, 0.0 + 0.25 * 0.5, 0.5]])
    assert_close(advantages, expected)
    assert_close(returns, expected + values)


def test_gae_with_lam_1_waits_for_the_reward():
    """lam 1, gamma 1: what really came, less what was expected; lam 0: one step only."""
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.25, 0.75]])
    mask = torch.ones(1, 3)
    assert_close(ppo.gae(rewards, values, mask, 1.0, 1.0)[0], 1 - values)
    assert_close(ppo.gae(rewards, values, mask, 1.0, 0.0)[0], torch.tensor([[-0.25, 0.5, 0.25]]))


def test_gae_counts_nothing_outside_the_mask():
    """Prompt and padding have no advantage, and what the critic says there leaks into none."""
    rewards = torch.tensor([[9.0, 0.0, 1.0, 9.0]])
    values = torch.tensor([[7.0, 0.5, 0.5, 7.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    assert_close(advantages, torch.tensor([[0.0, 0.5, 0.5, 0.0]]))
    assert_close(returns, torch.tensor([[0.0, 1.0, 1.0, 0.0]]))


def test_group_advantages_by_hand():
    """rloo: minus the mean of the others; dr_grpo: minus the mean; grpo: that over the deviation."""
    totals = torch.tensor([1.0, 0.0, 0.0, 0.0, 5.0, 5.0, 5.0, 5.0])
    flat = [0.0] * 4
    assert_close(grpo.group_advantages(totals, 4, "rloo"), torch.tensor([1, -1 / 3, -1 / 3, -1 / 3, *flat]))
    assert_close(grpo.group_advantages(totals, 4, "dr_grpo"), torch.tensor([0.75, -0.25, -0.25, -0.25, *flat]))
    scaled = torch.tensor([0.75, -0.25, -0.25, -0.25, *flat]) / (0.5 + 1e-4)
    assert_close(grpo.group_advantages(totals, 4, "grpo"), scaled)


def policy(logps, old_logps, advantages, mask=None, **changes):
    cfg = SimpleNamespace(**{**dict(clip=0.2, clip_high=0.0, ratio="token", surrogate="ppo"), **changes})
    tensors = [torch.tensor(x) for x in (logps, old_logps, advantages)]
    mask = torch.ones_like(tensors[0]) if mask is None else torch.tensor(mask)
    return grpo.policy_loss(*tensors, mask, cfg)


def test_policy_loss_begins_at_ratio_1():
    """Before anything is learned the ratio is 1, and the loss minus the sum of the advantages."""
    total, ratio = policy([[-1.0, -2.0, -3.0]], [[-1.0, -2.0, -9.0]], [[1.0, 2.0, 4.0]], [[1.0, 1.0, 0.0]])
    assert_close(ratio[:, :2], torch.ones(1, 2))
    assert_close(total, torch.tensor(-3.0))


def test_policy_loss_clips_what_has_gone_far_enough():
    """A good token's ratio gains nothing above 1.2, a bad one's nothing below 0.8; the other way they still cost."""
    log = math.log
    ratios = [[log(1.5), log(0.5), log(1.5), log(0.5)]]
    total, _ = policy(ratios, [[0.0] * 4], [[1.0, 1.0, -1.0, -1.0]])
    assert_close(total, torch.tensor(-1.2 - 0.5 + 1.5 + 0.8))
    total, _ = policy(ratios, [[0.0] * 4], [[1.0, 1.0, -1.0, -1.0]], clip_high=0.4)
    assert_close(total, torch.tensor(-1.4 - 0.5 + 1.5 + 0.8))


def test_policy_loss_variants():
    """GSPO: one ratio an answer, its tokens' geometric mean, and an answer counts once; CISPO: the clipped ratio weighs
    the log-probs."""
    logps = [[math.log(1.1), math.log(0.9), 5.0]]
    mask = [[1.0, 1.0, 0.0]]
    total, ratio = policy(logps, [[0.0] * 3], [[1.0] * 3], mask, ratio="sequence")
    assert_close(ratio[:, :2], torch.full((1, 2), math.sqrt(0.99)))
    assert_close(total, torch.tensor(-math.sqrt(0.99)))
    total, _ = policy([[-1.0]], [[-2.0]], [[3.0]], surrogate="cispo")
    assert_close(total, torch.tensor(1.2 * 3.0))


def preference(name, chosen, rejected, ref_chosen=0.0, ref_rejected=0.0, **changes):
    settings = dict(loss=name, beta=0.5, label_smoothing=0.1, simpo_gamma=0.5, nll_weight=0.0)
    numbers = (chosen, rejected, ref_chosen, ref_rejected, 2.0, 4.0)
    tensors = [torch.tensor([number], dtype=torch.float64) for number in numbers]
    losses, *rewards = dpo.preference_loss(*tensors, SimpleNamespace(**{**settings, **changes}))
    return losses.item(), *[r.item() for r in rewards]


def test_preference_loss_begins_at_log_2():
    """A policy that is still the reference prefers nothing: log 2, and no implicit reward."""
    assert_close(preference("dpo", -3.0, -5.0, -3.0, -5.0), (math.log(2), 0.0, 0.0))


def test_preference_loss_by_hand():
    """-log sigmoid(beta * (gain of the chosen - gain of the rejected)), gains over the reference."""
    losses, chosen, rejected = preference("dpo", -2.0, -6.0, -3.0, -5.0)
    assert_close((losses, chosen, rejected), (math.log(1 + math.exp(-1)), 0.5, -0.5))
    # RPO: a nat a token of the better answer's own loss
    assert_close(preference("dpo", -2.0, -6.0, -3.0, -5.0, nll_weight=0.1)[0], losses + 0.1 * 1.0)


def test_preference_loss_variants():
    """cdpo, ipo, simpo and orpo; the last three count a token, the last two have no reference."""
    def nls(x):
        return math.log(1 + math.exp(-x))

    assert_close(preference("cdpo", -2.0, -6.0, -3.0, -5.0)[0], 0.9 * nls(1) + 0.1 * nls(-1))
    assert_close(preference("ipo", -2.0, -6.0, -3.0, -5.0)[0], (0.75 - 1) ** 2)
    assert_close(preference("simpo", -2.0, -6.0)[0], nls(0.5 * 0.5 - 0.5))
    # odds p / (1 - p) of the mean probability of a token
    odds = [p / (1 - p) for p in (math.exp(-1.0), math.exp(-1.5))]
    assert_close(preference("orpo", -2.0, -6.0)[0], 1.0 + 0.5 * nls(math.log(odds[0] / odds[1])), rtol=1e-5, atol=0)


def allowed(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Which of four tokens with probabilities 0.5, 0.1, 0.3, 0.1 may be drawn."""
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    seen = torch.zeros(1, 4, dtype=torch.bool)
    filtered = generate.filter_logits(logits, seen, temperature, top_k, top_p, min_p, 1.0)
    return filtered.isfinite()[0].nonzero().flatten().tolist()


def test_filter_logits_by_hand():
    """top-k: the k likeliest; top-p: the fewest that reach p; min-p: p times as likely as the likeliest."""
    assert allowed() == [0, 1, 2, 3]
    assert allowed(top_k=2) == [0, 2]
    assert allowed(top_p=0.49) == [0]
    assert allowed(top_p=0.7) == [0, 2]
    assert allowed(min_p=0.55) == [0, 2]
    assert allowed(min_p=0.65) == [0]


def test_filter_logits_divides_by_the_temperature_first():
    """At temperature 0.25 the likeliest holds 0.88, so top-p 0.8 keeps it alone."""
    assert allowed(temperature=0.25, top_p=0.8) == [0]
    logits = torch.tensor([[1.0, -2.0]])
    seen = torch.zeros(1, 2, dtype=torch.bool)
    assert_close(generate.filter_logits(logits, seen, 0.5, 0, 1.0, 0.0, 1.0), 2 * logits)


def test_filter_logits_makes_seen_tokens_less_likely():
    """The penalty divides what is positive and multiplies what is negative, of tokens that were there."""
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    filtered = generate.filter_logits(logits, seen, 1.0, 0, 1.0, 0.0, 2.0)
    assert filtered.tolist() == [[1.0, -4.0, 2.0, -2.0]]


# ---------------------------------------------------------------------------- what pieces do together


def small_model(**changes):
    config = model.ModelConfig(vocab_size=64, dim=32, n_layers=2, n_heads=2, max_seq_len=32, **changes)
    net = model.Transformer(config)
    for p in net.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return net


def test_answers_do_not_depend_on_the_batch():
    """Prompts of different lengths in one batch are answered as each alone: padding stands on the left, unseen."""
    net = small_model()
    prompts = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    together = generate.generate(net, prompts, 8, temperature=0)
    assert together == [generate.generate(net, [prompt], 8, temperature=0)[0] for prompt in prompts]


def test_qk_norm_keeps_scores_from_growing():
    """With QK-norm, q and k a hundred times as large give the same attention."""
    attention = small_model(qk_norm=True).blocks[0].attn
    cos, sin = (table[:5].unsqueeze(-2) for table in model.rope_table(model.ModelConfig(dim=32, n_heads=2)))
    x = torch.randn(1, 5, 32)
    before = attention(x, cos, sin)
    with torch.no_grad():
        attention.qkv.weight[:64] *= 100
    assert_close(attention(x, cos, sin), before, atol=1e-3, rtol=1e-3)


def test_scores_are_read_at_the_end_of_the_answer():
    """The reward is the number at the answer's last token: not in the prompt, not at its first, not in padding."""
    ids = torch.tensor([[3, 4, 5, 6, 0], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]).float()
    scores = loss.score_answers(lambda ids: ids.float(), ids, mask)
    assert scores.tolist() == [6, 7]


def test_small_steps_move_the_weights():
    """Weights stay in fp32 between steps: in bf16, 1 + 0.001 is 1, and small steps are lost."""
    net = small_model()
    cfg = SimpleNamespace(optimizer="adamw", lr=1e-3, weight_decay=0.0)
    optimizer = optim.make_optimizers(net, cfg, SimpleNamespace(dtype=torch.float32))[0]
    net(torch.tensor([[1, 2, 3]])).square().sum().backward()
    optimizer.step()
    weight = net.norm.weight.detach()
    assert_close((weight - 1).abs(), torch.full_like(weight, 1e-3), atol=1e-5, rtol=0)


def test_k3_by_hand():
    """ref/pi - 1 - log(ref/pi): 0 where both agree, positive elsewhere."""
    logps = torch.tensor([-1.0, -1.0, -1.0])
    ref_logps = torch.tensor([-1.0, -2.0, -0.5])
    expected = [0.0, math.exp(-1) - 1 + 1, math.exp(0.5) - 1 - 0.5]
    assert_close(rollout.k3(logps, ref_logps), torch.tensor(expected))
