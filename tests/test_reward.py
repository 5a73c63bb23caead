"""The reward model: its loss and its accuracies against plain loops and TRL, its score, its bias, its loop."""
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import reward
from common.checkpoint import load_checkpoint, load_reward_model
from common.distributed import Env
from common.data import Split, get_prompts, open_data
from common.loss import score_answers
from model import ModelConfig, ScalarModel
from oracles import random_model, their_names
from pairs import (assert_same, check_ten_and_ten, completions, one_thread, place, read_log, run_in_two,  # noqa: F401
                   run_with_a_break, write_pairs, write_uneven)

CPU = Env(0, 1, torch.device("cpu"), torch.float32)
SIZES = [2, 4, 3, 2]


def settings(root, **changes):
    base = dict(data_dir=f"{root}/data", init_from=f"{root}/base", batch_size=4, max_steps=8, warmup_steps=2, lr=1e-3,
                eval_every=4, device="cpu", dtype="float32")
    return {**base, **changes}


# ---------------------------------------------------------------------------- formulas


def test_ranked_pairs_by_hand():
    chosen, rejected, prompt = reward.ranked_pairs([2, 3])
    assert chosen.tolist() == [0, 2, 2, 3] and rejected.tolist() == [1, 3, 4, 4] and prompt.tolist() == [0, 1, 1, 1]


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


def test_pair_loss_by_hand():
    # -log sigmoid(1 - 0) = 0.313262; centre 0.1: + 0.1 * (1 + 0)^2, and 0.1 * (1 + 2)^2 where both are 1 higher
    scores = torch.tensor([1.0, 0.0])
    assert reward.ranking_loss(scores, [2]).item() == pytest.approx(0.313262, abs=1e-6)
    assert reward.ranking_loss(scores, [2], centre=0.1).item() == pytest.approx(0.313262 + 0.1, abs=1e-6)
    assert reward.ranking_loss(scores + 1, [2], centre=0.1).item() == pytest.approx(0.313262 + 0.9, abs=1e-6)


def test_loss_equals_trl():
    """TRL's own compute_loss on the same scores: plain and centred."""
    trl = pytest.importorskip("trl", reason="pip install trl==1.12.0")
    scores = torch.randn(12)
    batch = torch.cat([scores[0::2], scores[1::2]])  # TRL's batches hold all chosen, then all rejected answers

    def theirs(centre):
        gather = types.SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
        from collections import defaultdict
        trainer = types.SimpleNamespace(
            model=types.SimpleNamespace(training=True), accelerator=gather, _total_train_tokens=0,
            args=types.SimpleNamespace(center_rewards_coefficient=centre), _metrics={"train": defaultdict(list)})
        inputs = {"attention_mask": torch.ones(12, 5)}
        model = lambda attention_mask, use_cache, **_: types.SimpleNamespace(logits=batch[:, None])  # noqa: E731
        return trl.RewardTrainer.compute_loss(trainer, model, inputs)

    for centre in (None, 0.01, 0.3):
        ours = reward.ranking_loss(scores, [2] * 6, centre or 0.0).mean()
        assert torch.allclose(ours, theirs(centre), atol=1e-6)


def test_accuracies_by_hand():
    """Three answers 5 > 4, 5 < 6, 4 < 6 (ranked best first: 5, 4, 6); a right and a tied pair; a tie is not right."""
    right, lead, pairs = reward.pair_stats(torch.tensor([5.0, 4.0, 6.0, 2.0, 1.0, 3.0, 3.0]), [3, 2, 2]).tolist()
    assert (right, pairs) == (1 + 1, 3 + 1 + 1)
    assert lead == (5 - 4) + (5 - 6) + (4 - 6) + (2 - 1) + (3 - 3)
    assert reward.pair_stats(torch.tensor([2.0, 1.0]), [2]).tolist() == [1, 1, 1]


# ---------------------------------------------------------------------------- model and score


def test_head_init():
    """std 1/sqrt(d + 1) from Stiennon et al. (not the trunk's 0.02), bias 0."""
    head = ScalarModel(ModelConfig(vocab_size=8, dim=4096, n_layers=0, n_heads=8)).head
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(4097), rel=0.05) and head.bias.item() == 0


def test_score_is_read_at_the_end_of_the_answer():
    """Not at the padding, nor at the newline behind <|im_end|>, nor one token early (collate drops a row's last)."""
    documents = [([5, 6, 7, 8, 9], [0, 0, 1, 1, 0]), ([5, 6, 7], [0, 1, 1]), ([3, 4], [0, 1])]
    split = Split(np.concatenate([d for d, _ in documents]), np.concatenate([m for _, m in documents]),
                  np.array([0, 5, 8, 10]), np.array([0, 0, 0]), {})
    (ids, targets, _), sizes = batch = get_prompts(split, [0], 1, CPU.device)
    assert ids.tolist() == [[5, 6, 7, 8], [5, 6, 7, 1], [3, 4, 1, 1]] and targets[0].tolist() == [6, 7, 8, 9]
    assert sizes == [3]
    places = lambda ids, docs=None: torch.arange(ids.size(1)).float().expand(ids.shape)  # noqa: E731
    assert score_answers(places, batch[0], CPU).tolist() == [3, 2, 1]


def test_padding_and_neighbours_do_not_touch_a_score(place):
    root, tok = place
    train, _, _ = open_data(f"{root}/data", "pairs")
    model = ScalarModel(random_model("qwen3", vocab_size=448, max_seq_len=96).config).eval()
    bounds = train.prompt_bounds()
    assert np.diff(bounds).tolist() == [(2, 4, 3, 2)[i % 4] for i in range(28)]
    batch, _ = get_prompts(train, range(6), tok.pad_id, CPU.device)
    ids, targets, mask = batch
    ends = [max(t for t, m in enumerate(row.tolist()) if m) for row in mask]
    assert len(set(ends)) > 3 and all(targets[i, e] == tok.im_end_id for i, e in enumerate(ends))
    together = score_answers(model, batch, CPU)
    alone = torch.stack([model(torch.cat([ids[i:i + 1, :1], targets[i:i + 1, :e + 1]], 1))[0, -1]
                         for i, e in enumerate(ends)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_scores_equal_transformers_sequence_classifier():
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    trunk = random_model("llama_gqa", tie_embeddings=True)
    ours, c = ScalarModel(trunk.config).eval(), trunk.config
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
        mask = torch.zeros(3, 11).scatter_(1, ends[:, None] - 1, 1.0)
        assert torch.allclose(score_answers(ours, (ids[:, :-1], ids[:, 1:], mask), CPU), logits, atol=1e-5)


# ---------------------------------------------------------------------------- the loop


@pytest.fixture(scope="module")
def straight(place):
    """One finished run of 8 steps, two micro-steps each."""
    out_dir = f"{place[0]}/reward"
    reward.main(reward.Config(**settings(place[0], grad_accum=2, out_dir=out_dir)))
    return out_dir


def test_trunk_starts_from_the_run_and_learns(place, straight):
    root, _ = place
    cfg = reward.Config(**settings(root, out_dir=f"{root}/still", lr=1e-30, min_lr=1e-30, max_steps=1))
    reward.main(cfg)
    base, still = load_checkpoint(f"{root}/base")["model"], load_checkpoint(cfg.out_dir)
    assert still["stage"] == "reward"
    assert all(torch.equal(still["model"][f"trunk.{name}"], tensor) for name, tensor in base.items())
    records = read_log(straight)
    assert records[-1]["val_loss"] < records[3]["val_loss"] < 0.75
    assert records[-1]["val_accuracy"] > 0.8


def mean_score(root, out_dir):
    """Mean score of all training answers, one by one."""
    model = load_reward_model(out_dir)
    train, _, _ = open_data(f"{root}/data", "pairs")
    scores = []
    for i in range(len(train)):
        ids, mask = train.document(i)
        with torch.no_grad():
            scores.append(model(torch.tensor(ids)[None])[0, np.flatnonzero(mask)[-1]].item())
    return np.mean(scores)


def test_centring_moves_the_scores_to_0(place):
    """Differences alone leave open where 0 is: without the term the bias stays 0 and the mean anywhere."""
    root, _ = place
    means = {}
    for centre in (0.0, 0.1):
        cfg = reward.Config(**settings(root, out_dir=f"{root}/centre{centre}", centre=centre, max_steps=30, lr=3e-3))
        reward.main(cfg)
        means[centre] = abs(mean_score(root, cfg.out_dir))
        assert (load_checkpoint(cfg.out_dir)["model"]["head.bias"].item() == 0) == (centre == 0)
    assert means[0.1] < 0.2 < means[0.0]


def test_loss_in_the_log_is_the_mean_over_prompts_with_the_centre_term(place):
    """Training and validation, from scores of the base's trunk taken one by one; the weights stand still."""
    root, _ = place
    cfg = reward.Config(**settings(root, out_dir=f"{root}/logged", centre=0.2, lr=1e-30, min_lr=1e-30, max_steps=7))
    reward.main(cfg)
    model = load_reward_model(cfg.out_dir)
    splits = open_data(f"{root}/data", "pairs")[:2]
    expected = []
    for split in splits:
        losses = []
        bounds = split.prompt_bounds()
        for p in range(len(bounds) - 1):
            scores = []
            for i in range(bounds[p], bounds[p + 1]):
                ids, mask = split.document(i)
                with torch.no_grad():
                    scores.append(model(torch.tensor(ids)[None])[0, np.flatnonzero(mask)[-1]].item())
            terms = [math.log(1 + math.exp(-(a - b))) + 0.2 * (a + b) ** 2
                     for i, a in enumerate(scores) for b in scores[i + 1:]]
            losses.append(np.mean(terms))
        expected.append(np.mean(losses))
    records = read_log(cfg.out_dir)
    assert np.mean([r["loss"] for r in records]) == pytest.approx(expected[0], abs=1e-5)  # 7 steps of 4: every prompt
    assert records[-1]["val_loss"] == pytest.approx(expected[1], abs=1e-5)


@pytest.mark.parametrize("centre", [0.0, 0.01])
def test_resume_is_exact(place, monkeypatch, centre):
    root, _ = place
    whole, broken = f"{root}/whole{centre}", f"{root}/broken{centre}"
    reward.main(reward.Config(**settings(root, out_dir=whole, centre=centre)))
    run_with_a_break(reward, reward.Config(**settings(root, out_dir=broken, centre=centre)), 4, monkeypatch)
    assert_same(load_checkpoint(whole), load_checkpoint(broken))
    assert read_log(whole) == read_log(broken)


def test_ten_and_ten_steps_are_twenty(place):
    root, _ = place
    check_ten_and_ten(reward, reward.Config(**settings(root, out_dir=f"{root}/ten", eval_every=10, min_lr=1e-3)))


def test_two_processes_are_one(place, straight):
    """Guards against rows chosen by rank, and against losses or accuracies averaged over one rank's part."""
    root, _ = place
    run_in_two("reward.py", f"{root}/two", settings(root, grad_accum=2))
    assert_same(load_checkpoint(straight)["model"], load_checkpoint(f"{root}/two")["model"], atol=1e-6)
    assert_same(read_log(straight), read_log(f"{root}/two"), atol=1e-5)


def test_two_processes_with_uneven_work_are_one(place, tmp_path):
    """Long and short answers: a rank that needs more forward passes than the other must not wait for it."""
    root, tok = place
    write_uneven(f"{tmp_path}/data", tok)
    config = settings(root, data_dir=f"{tmp_path}/data", batch_size=80, grad_accum=2, max_steps=2, eval_every=2)
    reward.main(reward.Config(**config, out_dir=f"{tmp_path}/one"))
    run_in_two("reward.py", f"{tmp_path}/two", config, seconds=60)
    assert_same(load_checkpoint(f"{tmp_path}/one")["model"], load_checkpoint(f"{tmp_path}/two")["model"], atol=1e-6)


def test_data_that_cannot_be_ranked_is_an_error_and_no_validation_is_none(place, tmp_path):
    root, tok = place
    two = [completions(tok, i, 2) for i in range(3)]
    write_pairs(f"{tmp_path}/one", tok, {"train": [two[0][:1], two[1]], "val": two})
    with pytest.raises(SystemExit, match="a prompt with 1 answers"):
        reward.main(reward.Config(**settings(root, data_dir=f"{tmp_path}/one", out_dir=f"{tmp_path}/x")))
    write_pairs(f"{tmp_path}/none", tok, {"train": two, "val": []})
    reward.main(reward.Config(**settings(root, data_dir=f"{tmp_path}/none", out_dir=f"{tmp_path}/x", max_steps=2)))
    assert "val_loss" not in read_log(f"{tmp_path}/x")[-1]
