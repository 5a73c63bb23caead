"""DPO and its relatives: their losses against plain loops over the papers' formulas and against TRL, the reference, the
loop, and whether it recovers the reward that made the preferences."""
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dpo
from common.checkpoint import load_checkpoint, load_model
from common.distributed import Env
from configurator import load_config
from common.data import collate, open_data, shuffled
from common.loss import answer_logps
from oracles import random_model, twin
from pairs import (assert_same, check_ten_and_ten, completions, flat_gradient, forget_run, gradient,  # noqa: F401
                   make_run, mean_nll, one_thread, place, read_log, run_in_two, run_with_a_break, write_folder,
                   write_pairs, write_uneven)

CPU = Env(0, 1, torch.device("cpu"), torch.float32)
LOSSES = ["dpo", "cdpo", "ipo", "simpo", "orpo"]


def settings(root, **changes):
    base = dict(data_dir=f"{root}/data", init_from=f"{root}/base", batch_size=4, max_steps=8, warmup_steps=2, lr=1e-3,
                eval_every=4, device="cpu", dtype="float32")
    return {**base, **changes}


# ---------------------------------------------------------------------------- formulas


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_the_paper(c, r, ref_c, ref_r, n_c, n_r, cfg):
    """One pair's loss from log-probs summed over tokens, written with probabilities and plain Python."""
    b = cfg.beta
    if cfg.loss == "dpo":    # Rafailov et al., eq. 7
        loss = -math.log(sigmoid(b * math.log(math.exp(c - ref_c)) - b * math.log(math.exp(r - ref_r))))
    elif cfg.loss == "cdpo":  # Mitchell, eq. 3: (1 - eps) L(chosen, rejected) + eps L(rejected, chosen)
        p = sigmoid(b * (c - ref_c) - b * (r - ref_r))
        loss = -(1 - cfg.label_smoothing) * math.log(p) - cfg.label_smoothing * math.log(1 - p)
    elif cfg.loss == "ipo":  # Azar et al., eq. 17, tau = beta, with log-probs a token
        loss = ((c / n_c - ref_c / n_c) - (r / n_r - ref_r / n_r) - 1 / (2 * b)) ** 2
    elif cfg.loss == "simpo":  # Meng et al., eq. 6
        loss = -math.log(sigmoid(b / n_c * c - b / n_r * r - cfg.simpo_gamma))
    else:                    # Hong et al., eq. 3, 4, 6, 7, lambda = beta
        p_c, p_r = math.exp(c / n_c), math.exp(r / n_r)
        odds_c, odds_r = p_c / (1 - p_c), p_r / (1 - p_r)
        loss = -math.log(p_c) + b * -math.log(sigmoid(math.log(odds_c / odds_r)))
    return loss - cfg.nll_weight * c / n_c


def random_pairs(n=9):
    lengths = torch.randint(1, 12, (2, n)).double()
    logps, refs = -2 * torch.rand(2, 2, n, dtype=torch.float64) * lengths
    return logps[0], logps[1], refs[0], refs[1], lengths[0], lengths[1]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("nll_weight", [0.0, 0.3])
def test_losses_equal_the_papers_formulas(loss, nll_weight):
    cfg = dpo.Config(loss=loss, beta=0.4, label_smoothing=0.15, simpo_gamma=0.7, nll_weight=nll_weight)
    pairs = list(random_pairs())
    if loss in ("simpo", "orpo"):  # as main() calls it
        pairs[2] = pairs[3] = torch.zeros(9)
    losses, _, _ = dpo.preference_loss(*pairs, cfg)
    for i, (c, r, ref_c, ref_r, n_c, n_r) in enumerate(torch.stack(pairs).T.tolist()):
        assert losses[i].item() == pytest.approx(by_the_paper(c, r, ref_c, ref_r, n_c, n_r, cfg), rel=1e-9)


def test_implicit_rewards_by_hand():
    """beta * log(pi / ref), summed for dpo, a token for ipo; they carry no gradient."""
    c = torch.tensor([-4.0], requires_grad=True)
    pair = [c] + [torch.tensor([x]) for x in (-9.0, -6.0, -8.0, 2.0, 4.0)]
    _, chosen, rejected = dpo.preference_loss(*pair, dpo.Config(beta=0.5))
    assert (chosen.item(), rejected.item()) == (1.0, -0.5) and not chosen.requires_grad
    _, chosen, rejected = dpo.preference_loss(*pair, dpo.Config(beta=0.5, loss="ipo"))
    assert (chosen.item(), rejected.item()) == (0.5, -0.125)


def test_unknown_loss_is_an_error():
    with pytest.raises(SystemExit, match="dppo"):
        load_config(dpo.Config, ["--loss=dppo"])


def test_pairs_of_a_list_by_hand():
    """The best against each other; every prompt weighs the same, so a list's pairs weigh less than a lone pair."""
    chosen, rejected, weight = dpo.best_against_each([2, 4])
    assert chosen.tolist() == [0, 2, 2, 2] and rejected.tolist() == [1, 3, 4, 5]
    assert torch.allclose(weight, torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6]))


def test_answer_logps_equal_a_loop_over_tokens(place):
    """Answer and <|im_end|> count; prompt, the newline behind, and padding do not. Guards against a shift by one."""
    root, tok = place
    train, _, _ = open_data(f"{root}/data", "pairs")
    model, _, _ = load_model(f"{root}/base")
    documents = [train.document(i) for i in (0, 3, 5)]
    logps, lengths = answer_logps(model, collate(documents, tok.pad_id), CPU)
    for i, (ids, mask) in enumerate(documents):
        table = F.log_softmax(model.logits(model(torch.tensor(ids)[None]))[0], dim=-1)
        learned = [t for t in range(len(ids)) if mask[t]]
        assert ids[learned[-1]] == tok.im_end_id and lengths[i] == len(learned)
        assert logps[i].item() == pytest.approx(sum(table[t - 1, ids[t]].item() for t in learned), abs=1e-4)


# ---------------------------------------------------------------------------- TRL


def rows_for_both(n=5):
    """The same rows for us (documents, best first) and as text of a word a token for TRL: 2 ends an answer."""
    documents, rows = [], []
    g = torch.Generator().manual_seed(3)
    for _ in range(n):
        prompt = torch.randint(3, 96, (int(torch.randint(1, 6, (), generator=g)),), generator=g).tolist()
        answers = [torch.randint(3, 96, (int(torch.randint(1, 9, (), generator=g)),), generator=g).tolist() + [2]
                   for _ in range(2)]
        documents += [(prompt + a, [0] * len(prompt) + [1] * len(a)) for a in answers]
        words = [" ".join(f"<{i}>" for i in ids) for ids in (prompt, *answers)]
        rows.append({"prompt": words[0] + " ", "chosen": words[1], "rejected": words[2]})
    return documents, rows


@pytest.fixture(scope="module")
def word_tokenizer():
    pytest.importorskip("trl", reason="pip install trl==1.12.0")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(96)}, unk_token="<1>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<2>", pad_token="<0>")


def trl_loss(rows, policy, reference, tokenizer, folder, **options):
    """The loss TRL's DPOTrainer computes for all rows in one batch, through its own data path; and its model."""
    import datasets
    import trl
    args = trl.DPOConfig(output_dir=str(folder), use_cpu=True, report_to=[], bf16=False, gradient_checkpointing=False,
                         disable_tqdm=True, **options)
    trainer = trl.DPOTrainer(model=twin(policy, "llama"), ref_model=twin(reference, "llama"), args=args,
                             train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    loss = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(list(trainer.train_dataset)))
    return loss, trainer.model.model.embed_tokens.weight


@pytest.mark.parametrize("loss", ["dpo", "ipo", "cdpo"])
def test_equals_trls_trainer(word_tokenizer, tmp_path, loss):
    """Same weights, same rows: masks, shift, padding, reference, normalisation and formula, and the gradient too. TRL
    1.12 has no cDPO of its own, so it is mixed from TRL's losses of the rows and of the rows the wrong way round."""
    documents, rows = rows_for_both()
    policy, reference = random_model("llama", seed=1), random_model("llama", seed=2)
    cfg = dpo.Config(loss=loss, beta=0.05 if loss != "ipo" else 0.3, label_smoothing=0.2)
    batch = collate(documents, 0)
    ours, _ = dpo.batch_loss(policy, reference, batch, [2] * len(rows), cfg, CPU)
    options = dict(beta=cfg.beta, loss_type=["ipo" if loss == "ipo" else "sigmoid"])
    theirs, embed = trl_loss(rows, policy, reference, word_tokenizer, tmp_path, **options)
    grad = torch.autograd.grad(theirs, embed)[0]
    if loss == "cdpo":
        swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
        flipped, embed = trl_loss(swapped, policy, reference, word_tokenizer, tmp_path, **options)
        theirs, grad = 0.8 * theirs + 0.2 * flipped, 0.8 * grad + 0.2 * torch.autograd.grad(flipped, embed)[0]
    assert abs(ours.item() - theirs.item()) < 1e-5 * max(1, abs(theirs.item()))
    assert torch.allclose(torch.autograd.grad(ours, policy.embed.weight)[0], grad, atol=1e-5 * max(1, grad.abs().max()))


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_equals_trls_functions(loss):
    pytest.importorskip("trl", reason="pip install trl==1.12.0")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    c, r, _, _, n_c, n_r = (x.float() for x in random_pairs())
    cfg = dpo.Config(loss=loss, beta=0.4, simpo_gamma=0.7)
    ours, chosen, rejected = dpo.preference_loss(c, r, 0 * c, 0 * r, n_c, n_r, cfg)
    trainer = types.SimpleNamespace(beta=0.4, simpo_gamma=0.7, label_smoothing=0.0, alpha=0.0, loss_type="simpo",
                                    accelerator=types.SimpleNamespace(device="cpu"))
    if loss == "simpo":
        theirs, *rewards = CPOTrainer.cpo_loss(trainer, c / n_c, r / n_r)
    else:  # TRL's likelihood term covers the prompt too, the paper's the answer alone: ours is the paper's
        ratio, *rewards = ORPOTrainer.odds_ratio_loss(trainer, c / n_c, r / n_r)[:3]
        theirs = -c / n_c - ratio
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(chosen, rewards[0], atol=1e-6) and torch.allclose(rejected, rewards[1], atol=1e-6)


# ---------------------------------------------------------------------------- reference


def test_the_reference_is_the_model_as_it_was(place):
    """At step 1 policy and reference are one, so margin 0 and loss ln 2. It moves away from a reference that stays."""
    root, _ = place
    dpo.main(dpo.Config(**settings(root, out_dir=f"{root}/live", max_steps=4)))
    first, *_, last = read_log(f"{root}/live")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(first["margin"]) < 1e-5
    assert abs(first["chosen_ratio"]) < 1e-4 and first["chosen_logp"] < -10
    base, model = load_model(f"{root}/base")[0], load_model(f"{root}/live")[0]
    val = open_data(f"{root}/data", "pairs")[1]
    documents = [val.document(i) for i in val.prompt_bounds()[:-1]]  # the best answer to each prompt
    with torch.no_grad():
        moved = [(len(ids[1:][mask[1:] > 0]) * (mean_nll(base, [(ids, mask)]) - mean_nll(model, [(ids, mask)]))).item()
                 for ids, mask in documents]
    assert last["val_chosen_ratio"] == pytest.approx(np.mean(moved), abs=1e-4)


# ---------------------------------------------------------------------------- the loop


@pytest.fixture(scope="module")
def straight(place):
    """One finished run of 8 steps, two micro-steps each."""
    out_dir = f"{place[0]}/dpo"
    dpo.main(dpo.Config(**settings(place[0], grad_accum=2, out_dir=out_dir)))
    return out_dir


def test_it_learns_and_says_what_moved(place, straight):
    records = read_log(straight)
    assert records[-1]["accuracy"] > 0.9 > records[-1]["loss"] / math.log(2)
    assert records[-1]["val_loss"] < records[3]["val_loss"] and records[-1]["val_accuracy"] > 0.9
    for r in records:  # what the log calls so: margin = beta * (chosen_ratio - rejected_ratio)
        assert r["margin"] == pytest.approx(0.1 * (r["chosen_ratio"] - r["rejected_ratio"]), abs=1e-4)
    assert load_checkpoint(straight)["stage"] == "dpo"
    load_model(straight)  # a run's folder like any other


def test_resume_is_exact(place, monkeypatch):
    root, _ = place
    run_with_a_break(dpo, dpo.Config(**settings(root, out_dir=f"{root}/broken", grad_accum=2)), 4, monkeypatch)
    dpo.main(dpo.Config(**settings(root, out_dir=f"{root}/whole", grad_accum=2)))
    assert_same(load_checkpoint(f"{root}/whole"), load_checkpoint(f"{root}/broken"))
    assert read_log(f"{root}/whole") == read_log(f"{root}/broken")


def test_ten_and_ten_steps_are_twenty(place):
    root, _ = place
    check_ten_and_ten(dpo, dpo.Config(**settings(root, out_dir=f"{root}/ten", eval_every=10, min_lr=1e-3)))


def test_two_processes_are_one(place, straight):
    """Guards against rows chosen by rank and statistics of one rank."""
    root, _ = place
    run_in_two("dpo.py", f"{root}/two", settings(root, grad_accum=2))
    assert_same(load_checkpoint(straight)["model"], load_checkpoint(f"{root}/two")["model"], atol=1e-6)
    assert_same(read_log(straight), read_log(f"{root}/two"), atol=1e-4)


def test_two_processes_with_uneven_work_are_one(place, tmp_path):
    """Long and short answers: a rank that needs more forward passes than the other must not wait for it."""
    root, tok = place
    write_uneven(f"{tmp_path}/data", tok)
    config = settings(root, data_dir=f"{tmp_path}/data", batch_size=80, grad_accum=2, max_steps=2, eval_every=2)
    dpo.main(dpo.Config(**config, out_dir=f"{tmp_path}/one"))
    run_in_two("dpo.py", f"{tmp_path}/two", config, seconds=60)
    assert_same(load_checkpoint(f"{tmp_path}/one")["model"], load_checkpoint(f"{tmp_path}/two")["model"], atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_every_loss_trains(place, loss):
    root, _ = place
    beta = {"simpo": 2.0, "ipo": 0.5}.get(loss, 0.1)
    dpo.main(dpo.Config(**settings(root, out_dir=f"{root}/{loss}", loss=loss, beta=beta)))
    records = read_log(f"{root}/{loss}")
    assert records[-1]["val_loss"] < records[3]["val_loss"] and records[-1]["val_accuracy"] > 0.8
    assert ("chosen_ratio" in records[0]) == (loss in ("cdpo", "ipo"))  # the others have no reference to compare with


def test_lora_trains_adapters_alone(place):
    """The base stays as it is, the reference is the base, and the checkpoint holds the adapters."""
    pytest.importorskip("lora")
    root, _ = place
    dpo.main(dpo.Config(**settings(root, out_dir=f"{root}/lora", lora_rank=2, lr=1e-2)))
    records, checkpoint = read_log(f"{root}/lora"), load_checkpoint(f"{root}/lora")
    assert abs(records[0]["margin"]) < 1e-5 and records[-1]["val_loss"] < records[3]["val_loss"]
    assert checkpoint["lora"]["rank"] == 2 and checkpoint["model"]
    assert all("lora_" in name for name in checkpoint["model"])
    merged, base = load_model(f"{root}/lora")[0].state_dict(), load_checkpoint(f"{root}/base")["model"]
    changed = {name.split(".", 2)[-1] for name in merged if not torch.equal(merged[name], base[name])}
    assert changed == {"attn.qkv.weight", "attn.out.weight", "ffn.gate_up.weight", "ffn.down.weight"}


def test_data_that_cannot_be_paired_is_an_error_and_no_validation_is_none(place, tmp_path):
    root, tok = place
    two = [completions(tok, i, 2) for i in range(3)]
    write_pairs(f"{tmp_path}/one", tok, {"train": [two[0][:1], two[1]], "val": two})
    with pytest.raises(SystemExit, match="a prompt with 1 answers"):
        dpo.main(dpo.Config(**settings(root, data_dir=f"{tmp_path}/one", out_dir=f"{tmp_path}/x")))
    write_pairs(f"{tmp_path}/none", tok, {"train": two, "val": []})
    dpo.main(dpo.Config(**settings(root, data_dir=f"{tmp_path}/none", out_dir=f"{tmp_path}/x", max_steps=2)))
    assert "val_loss" not in read_log(f"{tmp_path}/x")[-1]


# ---------------------------------------------------------------------------- rows mixed in


@pytest.fixture(scope="module")
def mixed(place):
    """A base that sees 160 tokens, conversations of different lengths and a text to mix in."""
    root, tok = place
    make_run(f"{root}/base160", tok, max_seq_len=160)
    talks = [completions(tok, i, 1 + i % 3)[0] for i in range(21)]
    write_folder(f"{root}/talks", tok, "sft", {"train": talks, "val": talks[:1]})
    text = np.random.default_rng(2).integers(5, 60, 7 * 128 + 50).tolist()
    write_folder(f"{root}/text", tok, "text", {"train": text, "val": text[:200]})
    pieces = [(text[128 * i:128 * i + 129], [1] * 129) for i in range(7)]
    return {"talks": talks, "text": pieces}


@pytest.mark.parametrize("kind", ["talks", "text"])
def test_rows_mixed_in_add_their_loss(place, mixed, kind):
    """The gradient of a step = that without them + ptx_coef * that of the mean over their learned tokens, from a plain
    loop over whole logits, document by document. Two processes make the same step, and take other rows in the next."""
    root, _ = place
    config = settings(root, init_from=f"{root}/base160", grad_accum=2, grad_clip=0.0, max_steps=2, eval_every=1)
    ptx = dict(ptx_dir=f"{root}/{kind}", ptx_coef=0.7, ptx_rows=6)
    one_step = {}
    for name, changes in (("none", {}), ("one", ptx)):
        cfg = dpo.Config(**{**config, **changes, "max_steps": 1, "out_dir": f"{root}/{kind}-{name}"})
        dpo.main(cfg)
        one_step[name] = load_checkpoint(cfg.out_dir)
    model, _, _ = load_model(f"{root}/base160")
    documents = [mixed[kind][i] for i in shuffled(len(mixed[kind]), 0, 6, 1234)]
    plain = flat_gradient(mean_nll(model, documents), model)
    added = gradient(one_step["one"]) - gradient(one_step["none"])
    assert plain.abs().max() > 0.01
    assert (added - 0.7 * plain).abs().max() <= 1e-6

    dpo.main(dpo.Config(**config, **ptx, out_dir=f"{root}/{kind}-both"))
    run_in_two("dpo.py", f"{root}/{kind}-two", {**config, **ptx})
    one, two = (load_checkpoint(f"{root}/{kind}-{name}") for name in ("both", "two"))
    assert_same(one["model"], two["model"], atol=1e-6)
    assert_same(one["optimizers"][0]["state"], two["optimizers"][0]["state"], atol=1e-6)


def test_the_next_step_mixes_in_the_next_rows(place, mixed, monkeypatch):
    root, _ = place
    seen = []
    real = dpo.mixed_rows

    def spy(*args):
        x, y, weights = real(*args)
        seen.extend(x.tolist())
        return x, y, weights

    monkeypatch.setattr(dpo, "mixed_rows", spy)
    dpo.main(dpo.Config(**settings(root, init_from=f"{root}/base160", out_dir=f"{root}/order", max_steps=3,
                                   ptx_dir=f"{root}/text", ptx_coef=0.5, ptx_rows=4)))
    assert seen == [mixed["text"][i][0][:-1] for i in shuffled(7, 0, 12, 1234)]


def test_rows_longer_than_the_model_sees_are_no_traceback(place, mixed):
    """Text comes in pieces of 128 tokens, conversations as they are; base/ sees 96 tokens. Either they fit in some way,
    or one sentence says that they do not."""
    root, _ = place
    cfg = dpo.Config(**settings(root, out_dir=f"{root}/narrow", max_steps=1, ptx_dir=f"{root}/text", ptx_coef=0.5))
    try:
        dpo.main(cfg)
    except (SystemExit, ValueError) as error:  # what configurator.run shows as one line
        assert "\n" not in str(error)


def test_rows_of_another_kind_are_refused(place, mixed):
    """Ranked answers are no conversations to imitate: the rejected ones would be learned, too. Prompts have no targets.
    A text shorter than a piece has none either."""
    root, tok = place
    prompt = [([5, 6, 7], [0, 0, 0])]
    write_folder(f"{root}/prompts", tok, "prompts", {"train": prompt, "val": prompt})
    write_folder(f"{root}/short", tok, "text", {"train": [5] * 100, "val": [5] * 100})
    for name in ("data", "prompts", "short", "nowhere"):
        cfg = dpo.Config(**settings(root, init_from=f"{root}/base160", out_dir=f"{root}/refused", max_steps=1,
                                    ptx_dir=f"{root}/{name}", ptx_coef=0.5))
        with pytest.raises(SystemExit, match=f"error: .*{root}/{name}"):
            dpo.main(cfg)
        forget_run()


# ---------------------------------------------------------------------------- probabilities near 1


@pytest.mark.parametrize("lr", [0.01, 0.1])
def test_orpo_on_yes_and_no_stays_finite(place, tmp_path, lr):
    """One-token answers that end with p(yes) = 1 to the last bit, where log(1 - p) is -inf. Hundreds of steps with a
    large learning rate end with finite weights, or in one sentence before anything else is saved."""
    root, tok = place
    prompts = [[([5 + i, 6], [0, 1]), ([5 + i, 7], [0, 1])] for i in range(8)]
    write_pairs(f"{tmp_path}/data", tok, {"train": prompts, "val": prompts[:2]})
    make_run(f"{tmp_path}/base", tok, n_layers=1)
    cfg = dpo.Config(**settings(tmp_path, out_dir=f"{tmp_path}/out", loss="orpo", lr=lr, min_lr=lr, max_steps=300,
                                eval_every=50, log_every=10))
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


def test_orpo_where_a_probability_is_1():
    """Loss and gradient are finite where p is 1 in fp32, and where the other one is 0."""
    c = torch.tensor([0.0, -1e-9, -1e-3], requires_grad=True)
    r = torch.tensor([-200.0, -50.0, -1e-9], requires_grad=True)
    ones, zeros = torch.ones(3), torch.zeros(3)
    losses, _, _ = dpo.preference_loss(c, r, zeros, zeros, ones, ones, dpo.Config(loss="orpo"))
    losses.sum().backward()
    assert losses.isfinite().all() and c.grad.isfinite().all() and r.grad.isfinite().all()


# ---------------------------------------------------------------------------- a planted reward


def test_it_recovers_a_planted_reward(place, tmp_path):
    """16 one-token answers with planted rewards, pairs drawn by Bradley-Terry. DPO's optimum is then
    beta * log(pi / ref) = reward + a constant (arXiv 2305.18290, eq. 5), whatever the reference. Guards against a lost
    reference (the slope's R² falls), against a beta that is missing or doubled (slope), and against a flipped sign."""
    root, tok = place
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
    dpo.main(dpo.Config(**settings(tmp_path, out_dir=f"{tmp_path}/out", beta=beta, lr=5e-3, min_lr=0.0, max_steps=160,
                                   batch_size=128, eval_every=1000, log_every=100)))

    def logps(run):
        model, _, _ = load_model(run)
        with torch.no_grad():
            return model.logits(model(torch.tensor([prompt])))[0, -1].log_softmax(-1)[first:first + n].numpy()

    ref = logps(f"{tmp_path}/base")
    assert ref.std() > 0.3
    found = beta * (logps(f"{tmp_path}/out") - ref)
    slope, _ = np.polyfit(planted, found, 1)
    r2 = np.corrcoef(planted, found)[0, 1] ** 2
    print(f"slope {slope:.3f}, R² {r2:.4f}")
    assert abs(slope - 1) < 0.1 and r2 > 0.95
