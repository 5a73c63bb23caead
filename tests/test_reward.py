"""reward.py: its loss and accuracies by hand, as plain loops and against TRL, its score, its bias, its loop."""
import math

import numpy as np
import pytest
import torch
from oracles import random_model, their_names
from small_runs import run, settings

import reward
from common.checkpoint import load_checkpoint, load_reward_model
from common.data import open_data
from common.loss import score_answers
from model import ModelConfig, ScalarModel

SIZES = [2, 4, 3, 2]


def test_ranked_pairs_by_hand():
    """ranked_pairs: each answer against every worse one to the same prompt."""
    chosen, rejected, prompt = reward.ranked_pairs([2, 3])
    assert chosen.tolist() == [0, 2, 2, 3] and rejected.tolist() == [1, 3, 4, 4] and prompt.tolist() == [0, 1, 1, 1]


def test_accuracies_by_hand():
    """Three answers 5 > 4, 5 < 6, 4 < 6 (ranked best first: 5, 4, 6); a right and a tied pair; a tie is not right."""
    right, lead, pairs = reward.pair_stats(torch.tensor([5.0, 4.0, 6.0, 2.0, 1.0, 3.0, 3.0]), [3, 2, 2]).tolist()
    assert (right, pairs) == (1 + 1, 3 + 1 + 1)
    assert lead == (5 - 4) + (5 - 6) + (4 - 6) + (2 - 1) + (3 - 3)
    assert reward.pair_stats(torch.tensor([2.0, 1.0]), [2]).tolist() == [1, 1, 1]


@pytest.mark.parametrize("centre", [0.0, 0.01, 0.5])
def test_loss_is_the_double_loop_over_each_prompts_pairs(centre):
    """Guards against pairs across prompts, against a sum in place of the mean over C(K, 2), and against weighing a
    prompt by its number of pairs (the mean over all pairs of the batch)."""
    scores = torch.randn(sum(SIZES), dtype=torch.float64)
    expected, start = [], 0
    for K in SIZES:
        total = 0.0
        for i in range(K):
            for j in range(i + 1, K):
                a, b = scores[start + i].item(), scores[start + j].item()
                total += math.log(1 + math.exp(-(a - b))) + centre * (a + b) ** 2
        expected.append(total / math.comb(K, 2))
        start += K
    losses = reward.ranking_loss(scores, SIZES, centre)
    assert torch.allclose(losses, torch.tensor(expected, dtype=torch.float64), atol=1e-12)


# ---------------------------------------------------------------------------- model and score


def test_head_init():
    """std 1/sqrt(d + 1) from Stiennon et al. (not the trunk's 0.02), bias 0."""
    head = ScalarModel(ModelConfig(vocab_size=8, dim=4096, n_layers=0, n_heads=8)).head
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(4097), rel=0.05) and head.bias.item() == 0


def test_scores_equal_transformers_sequence_classifier():
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    trunk = random_model("llama_gqa", tie_embeddings=True)
    ours, c = ScalarModel(trunk.config), trunk.config
    ours.trunk.load_state_dict(trunk.state_dict())
    theirs = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, rms_norm_eps=c.norm_eps, pad_token_id=0,
        num_labels=1, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})).eval()
    missing = theirs.load_state_dict({**their_names(trunk), "score.weight": ours.head.weight}, strict=False)
    assert not missing.missing_keys
    ids = torch.randint(1, c.vocab_size, (3, 12))
    ends = torch.tensor([11, 6, 2])
    ids[torch.arange(12) > ends[:, None]] = 0
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=(ids > 0).long()).logits[:, 0]
        mask = torch.zeros(3, 12).scatter_(1, ends[:, None], 1.0)
        assert torch.allclose(score_answers(ours, ids, mask), logits, atol=1e-5)


# ---------------------------------------------------------------------------- the loop


def mean_scores(model, split):
    """Scores of all answers, one by one."""
    scores = []
    for i in range(len(split)):
        ids, mask = split.document(i)
        with torch.no_grad():
            scores.append(model(torch.tensor(ids)[None])[0, np.flatnonzero(mask)[-1]].item())
    return scores


def test_trunk_starts_from_the_run_and_learns(place, tmp_path):
    root, _ = place
    still, _ = run(settings(root, "reward", f"{tmp_path}/still", lr=1e-30, min_lr=1e-30, max_steps=1))
    base = load_checkpoint(f"{root}/base")["model"]
    assert still["stage"] == "reward"
    assert all(torch.equal(still["model"][f"trunk.{name}"], tensor) for name, tensor in base.items())
    _, records = run(settings(root, "reward", f"{tmp_path}/learns"))
    assert records[-1]["val_loss"] < records[3]["val_loss"] < 0.75
    assert records[-1]["val_accuracy"] > 0.8


def test_centring_moves_the_scores_to_0(place, tmp_path):
    """Differences alone leave open where 0 is: without the term the bias stays 0 and the mean anywhere."""
    root, _ = place
    means = {}
    for centre in (0.0, 0.1):
        cfg = settings(root, "reward", f"{tmp_path}/{centre}", centre=centre, max_steps=30, lr=3e-3)
        checkpoint, _ = run(cfg)
        means[centre] = abs(np.mean(mean_scores(load_reward_model(cfg.out_dir), open_data(cfg.data_dir)[0])))
        assert (checkpoint["model"]["head.bias"].item() == 0) == (centre == 0)
    assert means[0.1] < 0.2 < means[0.0]


def test_the_logged_loss_is_the_mean_over_prompts_with_the_centre_term(place, tmp_path):
    """Training and validation, from scores taken one by one; the weights stand still."""
    cfg = settings(place[0], "reward", str(tmp_path), centre=0.2, lr=1e-30, min_lr=1e-30, max_steps=7, grad_accum=1)
    _, records = run(cfg)
    model = load_reward_model(cfg.out_dir)
    expected = []
    for split in open_data(cfg.data_dir)[:2]:
        scores, bounds, losses = mean_scores(model, split), split.prompt_bounds(), []
        for first, end in zip(bounds, bounds[1:]):
            terms = [math.log(1 + math.exp(-(scores[i] - scores[j]))) + 0.2 * (scores[i] + scores[j]) ** 2
                     for i in range(first, end) for j in range(i + 1, end)]
            losses.append(np.mean(terms))
        expected.append(np.mean(losses))
    assert np.mean([r["loss"] for r in records]) == pytest.approx(expected[0], abs=1e-5)  # 7 steps of 4: every prompt
    assert records[-1]["val_loss"] == pytest.approx(expected[1], abs=1e-5)
