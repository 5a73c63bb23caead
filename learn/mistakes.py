"""The mistakes of learn/broken.py: wrong functions, what they do to a run, and the test that catches each."""
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F

import common.generate
import common.loss
import common.optim
import common.rollout
import common.rows
import dpo
import grpo
import model as model_file
import pretrain
import sft
import tokenizer as tokenizer_file
from learn.measures import (
    answer_nats, ended_share, logged,
    moon_reward, pairs_in_order, text_nats)


@dataclass
class Case:
    what: str                      # what is wrong
    stage: str
    curve: str                     # the field of log.jsonl that is drawn
    measure: Callable              # run folder -> a number, by the right code
    unit: str                      # what that number is
    seen: str                      # what a person would have seen
    test: str                      # of tests/test_formulas.py, which catches it
    replace: tuple = ()            # (module or class, name in it, the wrong function)
    both: dict = None              # settings of both runs
    wrong: dict = None             # settings of the wrong one
    data: str = ""                 # the wrong run's data are prepared with the mistake, as this kind


def attend_everywhere(q, k, v, mask):
    """No causal mask: every token sees the whole row, the answer included."""
    if q.size(2) == 1:
        return RIGHT_ATTEND(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def batch_without_shift(tokens, cfg, step, micro_step, device):
    x, _ = RIGHT_GET_BATCH(tokens, cfg, step, micro_step, device)
    return x, x


def learn_everything(tok, messages, add_generation_prompt=False):
    ids, _ = RIGHT_RENDER_CHAT(tok, messages, add_generation_prompt)
    return ids, [1] * len(ids)


def without_end(tok, messages, add_generation_prompt=False):
    """The assistant's turns have no <|im_end|>."""
    ids, mask = RIGHT_RENDER_CHAT(tok, messages, add_generation_prompt)
    kept = [not (learned and i == tok.im_end_id) for i, learned in zip(ids, mask)]
    return [i for i, k in zip(ids, kept) if k], [m for m, k in zip(mask, kept) if k]


def pad_on_the_right(model, prompts, max_new_tokens, **settings):
    """The batch is made rectangular by tokens behind the short prompts, and the model goes on after those."""
    longest = max(map(len, prompts))
    pad_id = settings.pop("pad_id", 0)
    padded = [list(prompt) + [pad_id] * (longest - len(prompt)) for prompt in prompts]
    return RIGHT_GENERATE(model, padded, max_new_tokens, pad_id=pad_id, **settings)


def thirty_times(step, cfg, decay_steps=0):
    return 30 * RIGHT_LR_AT(step, cfg, decay_steps)


def attention_without_norm(self, config):
    RIGHT_ATTENTION_INIT(self, config)
    self.qk_norm = False


def no_divergence(logps, ref_logps):
    return 0.0 * logps


def raw_rewards(totals, group_size, kind):
    return totals.clone()


def no_reference(chosen, rejected, ref_chosen, ref_rejected, len_chosen, len_rejected, cfg):
    zero = torch.zeros_like(chosen)
    return RIGHT_PREFERENCE_LOSS(chosen, rejected, zero, zero, len_chosen, len_rejected, cfg)


def first_learned(mask):
    """The column of each row's first 1, where the score belongs to the last."""
    return mask.argmax(dim=1)


def rounding_optimizers(model, cfg, env):
    """After each step the weights are rounded to bf16, as if they lived in it."""
    optimizers = RIGHT_MAKE_OPTIMIZERS(model, cfg, env)

    def round_weights(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.data.copy_(p.data.bfloat16())

    for optimizer in optimizers:
        optimizer.register_step_post_hook(round_weights)
    return optimizers


RIGHT_ATTEND = model_file.attend
RIGHT_GET_BATCH = pretrain.get_batch
RIGHT_RENDER_CHAT = tokenizer_file.render_chat
RIGHT_GENERATE = common.generate.generate
RIGHT_LR_AT = common.optim.lr_at
RIGHT_ATTENTION_INIT = model_file.Attention.__init__
RIGHT_PREFERENCE_LOSS = dpo.preference_loss
RIGHT_MAKE_OPTIMIZERS = common.optim.make_optimizers


def renders_with(wrong):
    """render_chat under the two names by which data are made and read."""
    return ((tokenizer_file, "render_chat", wrong), (common.rows, "render_chat", wrong))


CASES = {
    "no_causal_mask": Case(
        "注意力没有因果掩码，每个字都看得见后文", "pretrain", "loss", text_nats, "用对的代码量，每个词元的损失",
        "损失快得可疑地降到 0 附近，采样却是乱的：它学会的是抄后文，而采样时没有后文",
        "test_attend_without_a_mask_sees_the_past", ((model_file, "attend", attend_everywhere),)),
    "no_shift": Case(
        "目标没有错开一位，要预测的就是输入自己", "pretrain", "loss", text_nats, "用对的代码量，每个词元的损失",
        "损失几十步就到 0，采样只会把最后一个字重复下去",
        "test_get_batch_shifts_by_one", ((pretrain, "get_batch", batch_without_shift),)),
    "loss_on_questions": Case(
        "问题也算进损失", "sft", "loss", answer_nats, "答案每个词元的损失",
        "日志里的损失开头更低：问题的套话都一样，很好猜；后来停在高处：问题里的诗句没法猜。该学的答案反而学得慢",
        "test_render_chat_by_hand", renders_with(learn_everything), data="sft"),
    "no_end_token": Case(
        "训练数据里，回答后面没有 <|im_end|>", "sft", "loss", ended_share, "会停下的回答，%",
        "损失一切正常；聊天时它答完了还一直说下去",
        "test_render_chat_by_hand", renders_with(without_end), data="sft"),
    "pad_right": Case(
        "一批长短不一的提示，补齐补在了右边", "pretrain", "recited", logged("recited"), "成批背诵的下一句，%",
        "一次问一个时会背的，一次问一批就不会了，只有最长的那几个还对",
        "test_answers_do_not_depend_on_the_batch", ((common.generate, "generate", pad_on_the_right),),
        both=dict(eval_every=40)),
    "lr_30": Case(
        "学习率大了 30 倍", "pretrain", "loss", text_nats, "每个词元的损失",
        "不报错，损失几乎不动，一直停在高处",
        "test_lr_at_warms_up", ((pretrain, "lr_at", thirty_times), (common.optim, "lr_at", thirty_times))),
    "no_qk_norm": Case(
        "学习率很高，又没有 QK-norm", "pretrain", "loss", text_nats, "每个词元的损失",
        "q 和 k 越长越大，softmax 只剩一个字；不报错，只是损失下得慢，一直落在后面",
        "test_qk_norm_keeps_scores_from_growing", ((model_file.Attention, "__init__", attention_without_norm),),
        both=dict(lr=0.1, min_lr=0.01, max_steps=400, eval_every=400)),
    "no_kl": Case(
        "GRPO 没有 KL 惩罚", "grpo", "kl", logged("val_kl"), "离 SFT 模型的 KL，nats",
        "奖励更漂亮；KL 一直涨，离原来的模型越来越远：规则没说的，它都可以丢掉",
        "test_k3_by_hand", ((grpo, "k3", no_divergence), (common.rollout, "k3", no_divergence)),
        both=dict(kl_coef=0.1)),
    "not_centred": Case(
        "优势没有减去一组的平均，而规则给每个回答都加了 5 分", "grpo", "score", moon_reward, "抽样回答的平均奖励",
        "规则不变，只是每个回答多给 5 分：优势全是正的，抽到什么就推高什么，好坏的差别很小。奖励升得慢，还忽高忽低",
        "test_group_advantages_by_hand", ((grpo, "group_advantages", raw_rewards),),
        both=dict(reward="learn/small.py:generous")),
    "dpo_no_reference": Case(
        "DPO 没有减去参考模型的 log-prob", "dpo", "loss", logged("loss", at=0), "第一步的损失（应当是 ln 2 = 0.69）",
        "损失从头就低，准确率从头就是 100 %，看起来很美：好的本来就比坏的可能，不用学。间隔一开始就大，梯度就小，学得慢",
        "test_preference_loss_begins_at_log_2", ((dpo, "preference_loss", no_reference),)),
    "reward_wrong_token": Case(
        "奖励在回答的第一个字上读", "reward", "accuracy", pairs_in_order, "训练过的提示里排对的，%",
        "日志里的准确率照样上升，甚至更快：记住每个问题该用哪个字开头就够了。真正打分时读的是最后一个词元，那里什么也没学",
        "test_scores_are_read_at_the_end_of_the_answer", ((common.loss, "last_learned", first_learned),)),
    "bf16_weights": Case(
        "每一步之后，权重都舍入成 bf16", "sft", "loss", answer_nats, "答案每个词元的损失",
        "不报错，损失几乎不动：步子比权重的最后一位还小，整步被舍掉；学习率越小越明显，微调时最容易遇到",
        "test_small_steps_move_the_weights",
        ((sft, "make_optimizers", rounding_optimizers), (common.optim, "make_optimizers", rounding_optimizers)),
        both=dict(optimizer="adamw", lr=2e-4, min_lr=2e-5)),
}
