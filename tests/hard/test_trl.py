"""Losses against TRL's own code, fed with the same numbers or, for DPO, the same rows."""
import collections
import types

import pytest
import torch
from oracles import random_model, twin

import dpo
import grpo
import reward
from common.data import pad
from common.loss import answer_logps
from common.rollout import k3

trl = pytest.importorskip("trl", reason="pip install trl==1.12.0")


def test_loss_equals_trl():
    """TRL's own compute_loss on the same scores: plain and centred."""
    scores = torch.randn(12)
    batch = torch.cat([scores[0::2], scores[1::2]])  # TRL's batches hold all chosen, then all rejected answers

    def theirs(centre):
        gather = types.SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
        trainer = types.SimpleNamespace(
            model=types.SimpleNamespace(training=True), accelerator=gather, _total_train_tokens=0,
            args=types.SimpleNamespace(center_rewards_coefficient=centre),
            _metrics={"train": collections.defaultdict(list)})
        inputs = {"attention_mask": torch.ones(12, 5)}
        model = lambda attention_mask, use_cache, **_: types.SimpleNamespace(logits=batch[:, None])  # noqa: E731
        return trl.RewardTrainer.compute_loss(trainer, model, inputs)

    for centre in (None, 0.01, 0.3):
        ours = reward.ranking_loss(scores, [2] * 6, centre or 0.0).mean()
        assert torch.allclose(ours, theirs(centre), atol=1e-6)


def random_pairs(n=9):
    lengths = torch.randint(1, 12, (2, n)).double()
    logps, refs = -2 * torch.rand(2, 2, n, dtype=torch.float64) * lengths
    return logps[0], logps[1], refs[0], refs[1], lengths[0], lengths[1]


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
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(96)}, unk_token="<1>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<2>", pad_token="<0>")


def trl_loss(rows, policy, reference, tokenizer, folder, **options):
    """The loss TRL's DPOTrainer computes for all rows in one batch, through its own data path; and its model."""
    import datasets
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
    batch = pad(documents, 0)
    logps, lengths = answer_logps(policy, policy.head_weight, *batch)
    ours, _ = dpo.batch_loss(logps, lengths, dpo.reference_logps(reference, batch), [2] * len(rows), cfg)
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


VARIANTS = [dict(clip=0.2), dict(clip=0.2, clip_high=0.35), dict(ratio="sequence", clip=0.02),
            dict(surrogate="cispo", clip=0.2, clip_high=0.3), dict(ratio="sequence", clip_high=0.05, clip=0.01),
            dict(surrogate="cispo", ratio="sequence", clip=0.03)]


def answers_for_the_loss():
    """logps (with gradient), old logps, advantages, mask of five answers: ratios on both sides of every bound."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0],
                         [1, 1, 1, 1, 0, 0]]).double()
    old = -torch.rand(5, 6, dtype=torch.float64) * 3
    logps = old + 0.4 * torch.randn(5, 6, dtype=torch.float64)
    advantages = torch.tensor([1.3, -0.7, 0.4, -2.0, 0.9], dtype=torch.float64)
    return logps.requires_grad_(), old, advantages, mask


# TRL has no cispo with a constant length, nor with a ratio an answer
@pytest.mark.parametrize("changes, advantage", [(v, "rloo") for v in VARIANTS[:-1]] + [
    (v, "dr_grpo") for v in VARIANTS if "surrogate" not in v and "ratio" not in v])
def test_policy_loss_equals_trl(changes, advantage):
    """TRL's own GRPOTrainer._compute_loss: dapo's mean over tokens, or dr_grpo's constant length, and cispo; without a
    reference, and with k3 in the loss. TRL's cispo bound is the whole ratio, ours 1 + clip_high."""
    cfg = grpo.Config(**changes)
    logps, old, advantages, mask = answers_for_the_loss()
    ref = old - 0.3 * torch.rand(5, 6, dtype=torch.float64)
    weight = 1 / mask.sum() if advantage == "rloo" else 1 / (5 * 11)
    if cfg.ratio == "sequence":
        weight = 1 / 5  # the mean over answers
    high = cfg.clip_high or cfg.clip
    loss_type = {"rloo": "dapo", "dr_grpo": "dr_grpo"}[advantage] if cfg.ratio == "token" else "grpo"
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
        counts = mask / mask.sum(1, keepdim=True) if cfg.ratio == "sequence" else mask
        ours = (ours + kl_coef * (k3(logps, ref) * counts).sum()) * weight
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
        grads = [torch.autograd.grad(x, logps)[0] for x in (ours, theirs)]
        assert torch.allclose(*grads, atol=1e-7)
