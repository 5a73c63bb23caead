"""dpo.py: its losses against plain loops over the papers' formulas and against TRL, the reference, the loop, and
whether it recovers the reward that made the preferences."""
import math

import numpy as np
import pytest
import torch
from small_runs import make_run, mean_nll, read_log, run, settings, write_pairs

import dpo
from common.checkpoint import load_checkpoint, load_model
from common.data import open_data

LOSSES = ["dpo", "cdpo", "ipo", "simpo", "orpo"]


def test_pairs_of_a_list_by_hand():
    """best_against_each: the best against each other; every prompt weighs the same, so a list's pairs weigh less
    than a lone pair."""
    chosen, rejected, weight = dpo.best_against_each([2, 4])
    assert chosen.tolist() == [0, 2, 2, 2] and rejected.tolist() == [1, 3, 4, 5]
    assert torch.allclose(weight, torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6]))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_orpo_where_a_probability_is_1():
    """Loss and gradient are finite where p is 1 in fp32, and where the other one is 0."""
    c = torch.tensor([0.0, -1e-9, -1e-3], requires_grad=True)
    r = torch.tensor([-200.0, -50.0, -1e-9], requires_grad=True)
    ones, zeros = torch.ones(3), torch.zeros(3)
    losses, _, _ = dpo.preference_loss(c, r, zeros, zeros, ones, ones, dpo.Config(loss="orpo"))
    losses.sum().backward()
    assert losses.isfinite().all() and c.grad.isfinite().all() and r.grad.isfinite().all()


# ---------------------------------------------------------------------------- the loop


def test_the_reference_is_the_model_as_it_was(place, tmp_path):
    """At step 1 policy and reference are one, so margin 0 and loss ln 2. It moves away from a reference that stays."""
    root, _ = place
    _, (first, *_, last) = run(settings(root, "dpo", f"{tmp_path}/live", max_steps=4))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(first["margin"]) < 1e-5
    assert abs(first["chosen_ratio"]) < 1e-4 and first["chosen_logp"] < -10
    base, model = load_model(f"{root}/base")[0], load_model(f"{tmp_path}/live")[0]
    val = open_data(f"{root}/pairs", "pairs")[1]
    documents = [val.document(i) for i in val.prompt_bounds()[:-1]]  # the best answer to each prompt
    with torch.no_grad():
        moved = [(len(ids[1:][mask[1:] > 0]) * (mean_nll(base, [(ids, mask)]) - mean_nll(model, [(ids, mask)]))).item()
                 for ids, mask in documents]
    assert last["val_chosen_ratio"] == pytest.approx(np.mean(moved), abs=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns(place, tmp_path, loss):
    beta = {"simpo": 2.0, "ipo": 0.5}.get(loss, 0.1)
    _, records = run(settings(place[0], "dpo", str(tmp_path), loss=loss, beta=beta))
    assert records[-1]["val_loss"] < records[3]["val_loss"] and records[-1]["val_accuracy"] > 0.8
    has_reference = loss in ("dpo", "cdpo", "ipo")
    assert all(("chosen_ratio" in record) == has_reference for record in records)
    if loss == "dpo":  # what the log calls so: margin = beta * (chosen_ratio - rejected_ratio)
        for r in records:
            assert r["margin"] == pytest.approx(0.1 * (r["chosen_ratio"] - r["rejected_ratio"]), abs=1e-4)


@pytest.mark.parametrize("lr", [0.01, 0.1])
def test_orpo_on_yes_and_no_stays_finite(place, tmp_path, lr):
    """One-token answers that end with p(yes) = 1 to the last bit, where log(1 - p) is -inf. Hundreds of steps with a
    large learning rate end with finite weights, or in one sentence before anything else is saved."""
    tok = place[1]
    prompts = [[([5 + i, 6], [0, 1]), ([5 + i, 7], [0, 1])] for i in range(8)]
    write_pairs(f"{tmp_path}/data", tok, {"train": prompts, "val": prompts[:2]})
    make_run(f"{tmp_path}/base", tok, n_layers=1)
    cfg = settings(tmp_path, "dpo", "out", data_dir="data", loss="orpo", lr=lr, min_lr=lr, max_steps=300,
                   eval_every=50, log_every=10)
    try:
        dpo.main(cfg)
    except SystemExit as error:
        assert "\n" not in str(error)
    checkpoint = load_checkpoint(cfg.out_dir)
    model, _, _ = load_model(cfg.out_dir)
    with torch.no_grad():
        p = model.logits(model(torch.tensor([[5]])))[0, -1].softmax(-1)[6].item()
    assert p > 0.999
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
    assert all(math.isfinite(value) for record in read_log(cfg.out_dir) for value in record.values())


def test_it_recovers_a_planted_reward(place, tmp_path):
    """16 one-token answers with planted rewards, pairs drawn by Bradley-Terry. DPO's optimum is then
    beta * log(pi / ref) = reward + a constant (arXiv 2305.18290, eq. 5), whatever the reference. Guards against a lost
    reference (the slope's R² falls), against a beta that is missing or doubled (slope), and against a flipped sign."""
    tok = place[1]
    rng, n, beta = np.random.default_rng(0), 16, 0.5
    planted = rng.uniform(-1.5, 1.5, n)
    prompt, first = [5, 6], 20
    prompts = []
    for _ in range(6000):
        a, b = rng.choice(n, 2, replace=False)
        if rng.random() > sigmoid(planted[a] - planted[b]):
            a, b = b, a
        prompts.append([(prompt + [first + k], [0, 0, 1]) for k in (a, b)])
    write_pairs(f"{tmp_path}/data", tok, {"train": prompts[:5900], "val": prompts[5900:]})
    make_run(f"{tmp_path}/base", tok, vocab_size=64 * 5, n_layers=1, dim=32)
    with torch.no_grad():  # a reference that is far from uniform
        base = load_checkpoint(f"{tmp_path}/base")
        base["model"]["norm.weight"] *= 10
        torch.save(base, f"{tmp_path}/base/ckpt.pt")
    run(settings(tmp_path, "dpo", "out", data_dir="data", beta=beta, lr=5e-3, min_lr=0.0, max_steps=160, batch_size=128,
                 grad_accum=1, eval_every=1000, log_every=100))

    def logps(run):
        model, _, _ = load_model(run)
        with torch.no_grad():
            return model.logits(model(torch.tensor([prompt])))[0, -1].log_softmax(-1)[first:first + n].numpy()

    ref = logps(f"{tmp_path}/base")
    assert ref.std() > 0.3
    found = beta * (logps(f"{tmp_path}/out") - ref)
    slope, _ = np.polyfit(planted, found, 1)
    r2 = np.corrcoef(planted, found)[0, 1] ** 2
    assert abs(slope - 1) < 0.1 and r2 > 0.95
