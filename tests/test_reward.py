"""The reward model: its loss and its accuracies against plain loops and TRL, its score, its bias, its loop."""
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import reward
from common import Env, Split, load_checkpoint, model_from, open_data
from model import ModelConfig, ScalarModel
from oracles import random_model, their_names
from pairs import (assert_same, completions, one_thread, place, read_log, run_in_two, run_with_a_break,  # noqa: F401
                   write_pairs)

CPU = Env(0, 1, torch.device("cpu"), torch.float32)
SIZES = [2, 4, 3, 2]


def settings(root, **changes):
    base = dict(data_dir=f"{root}/data", init_from=f"{root}/base", batch_size=4, max_steps=8, warmup_steps=2, lr=1e-3,
                eval_every=4, save_every=4, device="cpu", dtype="float32")
    return {**base, **changes}


# ---------------------------------------------------------------------------- formulas


def test_ranked_pairs_by_hand():
    chosen, rejected, prompt = reward.ranked_pairs([2, 3])
    assert chosen.tolist() == [0, 2, 2, 3] and rejected.tolist() == [1, 3, 4, 4] and prompt.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("margin, centre", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.01), (0.3, 0.01)])
def test_loss_is_the_double_loop_over_each_prompts_pairs(margin, centre):
    """Guards against pairs across prompts, against a sum in place of the mean over C(K, 2), and against weighing a
    prompt by its number of pairs (the mean over all pairs of the batch)."""
    scores = torch.randn(sum(SIZES), dtype=torch.float64)
    expected, start = [], 0
    for K in SIZES:
        total = 0.0
        for i in range(K):
            for j in range(i + 1, K):
                a, b = scores[start + i].item(), scores[start + j].item()
                total += math.log(1 + math.exp(-(a - b - margin * (j - i)))) + centre * (a + b) ** 2
        expected.append(total / math.comb(K, 2))
        start += K
    losses = reward.ranking_loss(scores, SIZES, margin, centre)
    assert torch.allclose(losses, torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_pair_loss_by_hand():
    # -log sigmoid(1 - 0) = 0.313262; margin 0.5: -log sigmoid(0.5) = 0.474077; centre 0.1: + 0.1 * (1 + 0)^2
    scores = torch.tensor([1.0, 0.0])
    assert reward.ranking_loss(scores, [2]).item() == pytest.approx(0.313262, abs=1e-6)
    assert reward.ranking_loss(scores, [2], margin=0.5, centre=0.1).item() == pytest.approx(0.474077 + 0.1, abs=1e-6)


def test_loss_equals_trl():
    """TRL's own compute_loss on the same scores: plain, with a margin a pair, and centred."""
    trl = pytest.importorskip("trl", reason="pip install trl==1.12.0")
    scores = torch.randn(12)
    batch = torch.cat([scores[0::2], scores[1::2]])  # TRL's batches hold all chosen, then all rejected answers

    def theirs(margin, centre):
        gather = types.SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
        from collections import defaultdict
        trainer = types.SimpleNamespace(
            model=types.SimpleNamespace(training=True), accelerator=gather, _total_train_tokens=0,
            args=types.SimpleNamespace(center_rewards_coefficient=centre), _metrics={"train": defaultdict(list)})
        inputs = {"attention_mask": torch.ones(12, 5), **({"margin": torch.full((6,), margin)} if margin else {})}
        model = lambda attention_mask, use_cache, **_: types.SimpleNamespace(logits=batch[:, None])  # noqa: E731
        return trl.RewardTrainer.compute_loss(trainer, model, inputs)

    for margin, centre in [(0.0, None), (0.7, None), (0.0, 0.01), (0.7, 0.01)]:
        ours = reward.ranking_loss(scores, [2] * 6, margin, centre or 0.0).mean()
        assert torch.allclose(ours, theirs(margin, centre), atol=1e-6)


def test_accuracies_by_hand():
    """Three answers 5 > 4, 5 < 6, 4 < 6 (ranked best first: 5, 4, 6); a right and a tied pair; a tie is not right."""
    table = reward.count_right(torch.tensor([5.0, 4.0, 6.0, 2.0, 1.0, 3.0, 3.0]), [3, 2, 2], 4)
    assert reward.accuracies(table) == {"accuracy_pairs": 1 / 2, "accuracy_lists": 1 / 3, "accuracy_lists_1": 1 / 2,
                                        "accuracy_lists_2": 0.0}
    only_pairs = reward.count_right(torch.tensor([2.0, 1.0]), [2], 2)
    assert reward.accuracies(only_pairs) == {"accuracy_pairs": 1.0}


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
    (ids, targets, _), sizes = batch = reward.get_batch(split, common.prompt_bounds(split), [0], 1, CPU)
    assert ids.tolist() == [[5, 6, 7, 8], [5, 6, 7, 1], [3, 4, 1, 1]] and targets[0].tolist() == [6, 7, 8, 9]
    assert sizes == [3]
    places = lambda ids, docs=None: torch.arange(ids.size(1)).float().expand(ids.shape)  # noqa: E731
    assert common.score_answers(places, batch[0], CPU).tolist() == [3, 2, 1]


def test_padding_and_neighbours_do_not_touch_a_score(place):
    root, tok = place
    train, _, _ = open_data(f"{root}/data", "pairs")
    model = ScalarModel(random_model("qwen3", vocab_size=448, max_seq_len=96).config).eval()
    bounds = common.prompt_bounds(train)
    assert np.diff(bounds).tolist() == [(2, 4, 3, 2)[i % 4] for i in range(28)]
    batch, _ = reward.get_batch(train, bounds, range(6), tok.pad_id, CPU)
    ids, targets, mask = batch
    ends = [max(t for t, m in enumerate(row.tolist()) if m) for row in mask]
    assert len(set(ends)) > 3 and all(targets[i, e] == tok.im_end_id for i, e in enumerate(ends))
    together = common.score_answers(model, batch, CPU)
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
        assert torch.allclose(common.score_answers(ours, (ids[:, :-1], ids[:, 1:], mask), CPU), logits, atol=1e-5)


# ---------------------------------------------------------------------------- the loop


def mean_of_best(root, out_dir, name="ckpt.pt"):
    """Mean score of the best training answers, one by one."""
    model = model_from(load_checkpoint(f"{out_dir}/{name}"), ScalarModel).eval()
    train, _, _ = open_data(f"{root}/data", "pairs")
    scores = []
    for i in np.flatnonzero(np.diff(train.group, prepend=-1)):
        ids, mask = train.document(i)
        with torch.no_grad():
            scores.append(model(torch.tensor(ids)[None])[0, np.flatnonzero(mask)[-1]].item())
    return np.mean(scores)


@pytest.fixture(scope="module")
def straight(place):
    """One finished run of 8 steps, two micro-steps each."""
    out_dir = f"{place[0]}/reward"
    reward.main(reward.Config(**settings(place[0], grad_accum=2, out_dir=out_dir)))
    return out_dir


def test_trunk_starts_from_the_run_and_learns(place, straight):
    root, _ = place
    cfg = reward.Config(**settings(root, out_dir=f"{root}/still", lr=0.0, min_lr=0.0, max_steps=1))
    reward.main(cfg)
    base, still = load_checkpoint(f"{root}/base")["model"], load_checkpoint(cfg.out_dir)
    assert still["stage"] == "reward"
    assert all(torch.equal(still["model"][f"trunk.{name}"], tensor) for name, tensor in base.items())
    records = read_log(straight)
    assert records[-1]["val_loss"] < records[3]["val_loss"] < 0.75
    assert records[-1]["val_accuracy_lists"] > 0.8 and "val_accuracy_lists_3" in records[-1]
    assert "val_accuracy_pairs" in records[-1]


def test_the_best_answers_score_0_on_average(place, straight, capsys):
    """In what is saved at the end and as best.pt; the checkpoint says by how much it was shifted. Going on with more
    steps starts from the unshifted bias and ends at mean 0 again (guards against shifting twice)."""
    root, _ = place
    assert abs(mean_of_best(root, straight)) < 1e-5 and abs(mean_of_best(root, straight, "best.pt")) < 1e-5
    shift = load_checkpoint(straight)["shift"]
    assert abs(shift) > 1e-3 and load_checkpoint(straight)["model"]["head.bias"].item() == pytest.approx(-shift)
    longer = f"{root}/longer"
    reward.main(reward.Config(**settings(root, out_dir=longer)))
    reward.main(reward.Config(**settings(root, out_dir=longer)))  # finished: changes nothing
    assert abs(mean_of_best(root, longer)) < 1e-5
    reward.main(reward.Config(**settings(root, out_dir=longer, max_steps=10)))
    assert abs(mean_of_best(root, longer)) < 1e-5
    again = load_checkpoint(longer)
    assert again["step"] == 10 and again["model"]["head.bias"].item() == pytest.approx(-again["shift"])
    assert "mean score" in capsys.readouterr().out


def test_unfinished_runs_are_not_shifted(place, monkeypatch):
    root, _ = place
    cfg = reward.Config(**settings(root, out_dir=f"{root}/cut"))
    seen = []
    monkeypatch.setattr(reward, "save_checkpoint",
                        lambda path, checkpoint, tokenizer: seen.append((path.split("/")[-1], checkpoint)))
    reward.main(cfg)
    middle = [c for name, c in seen if name == "ckpt.pt" and c["step"] == 4][0]
    assert middle["shift"] == 0.0 and middle["model"]["head.bias"].item() == 0.0


@pytest.mark.parametrize("centre", [0.0, 0.01])
def test_resume_is_exact(place, monkeypatch, centre):
    root, _ = place
    whole, broken = f"{root}/whole{centre}", f"{root}/broken{centre}"
    reward.main(reward.Config(**settings(root, out_dir=whole, centre=centre)))
    run_with_a_break(reward, reward.Config(**settings(root, out_dir=broken, centre=centre)), 4, monkeypatch)
    assert_same(load_checkpoint(whole), load_checkpoint(broken))
    assert read_log(whole) == read_log(broken)


def test_two_processes_are_one(place, straight):
    """Guards against rows chosen by rank, and against losses, accuracies or the shift averaged over one rank's part."""
    root, _ = place
    run_in_two("reward.py", f"{root}/two", settings(root, grad_accum=2))
    assert_same(load_checkpoint(straight)["model"], load_checkpoint(f"{root}/two")["model"], atol=1e-6)
    assert_same(read_log(straight), read_log(f"{root}/two"), atol=1e-5)


def test_data_that_cannot_be_ranked_is_an_error_and_no_validation_is_none(place, tmp_path):
    root, tok = place
    two = [completions(tok, i, 2) for i in range(3)]
    write_pairs(f"{tmp_path}/one", tok, {"train": [two[0][:1], two[1]], "val": two})
    with pytest.raises(SystemExit, match="a prompt with 1 answers"):
        reward.main(reward.Config(**settings(root, data_dir=f"{tmp_path}/one", out_dir=f"{tmp_path}/x")))
    write_pairs(f"{tmp_path}/none", tok, {"train": two, "val": []})
    reward.main(reward.Config(**settings(root, data_dir=f"{tmp_path}/none", out_dir=f"{tmp_path}/x", max_steps=2)))
    assert "val_loss" not in read_log(f"{tmp_path}/x")[-1] and abs(read_log(f"{tmp_path}/x")[-1]["mean_chosen"]) > 0
