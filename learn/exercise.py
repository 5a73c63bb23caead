"""
练习：把项目里的一个函数挖空，自己写出来，由项目自己的测试来判。

    python -m learn.exercise                     # 全部练习，做到哪里了
    python -m learn.exercise rotate              # 写出 learn/work/rotate.py：签名和说明还在，函数体是空的
    python -m learn.exercise rotate --check      # 用 tests/test_formulas.py 判：哪里还不对
    python -m learn.exercise rotate --solution   # 看我们的写法

Exercises are cut from today's source, so they never grow old: nothing here repeats a formula.
"""
import ast
import importlib
import importlib.util
import json
import os
import sys
import textwrap
import traceback
import types
from dataclasses import dataclass

from configurator import check, run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WORK = os.path.join(ROOT, "learn", "work")
TESTS = os.path.join(ROOT, "tests", "test_formulas.py")

# name: (module, function in it, what it does, the card to read before)
EXERCISES = {
    "join": ("recipes.bpe", "join", "BPE 的一次合并", "bpe"),
    "get_batch": ("pretrain", "get_batch", "从一长串词元里取一批行，目标错开一位", "batch"),
    "rotate": ("model", "rotate", "旋转位置编码", "attention"),
    "attend": ("model", "attend", "注意力：softmax(qk/√D)v", "attention"),
    "document_positions": ("model", "document_positions", "一行里几篇文档，各自从 0 数位置", "packing"),
    "append": ("model", "KVCache.append", "KV 缓存：把新的键和值接在后面", "kv_cache"),
    "softmax_nll": ("common.loss", "softmax_nll", "交叉熵和它的梯度", "loss"),
    "render_chat": ("tokenizer", "render_chat", "对话模板，以及哪些词元要学", "packing"),
    "pack": ("sft", "pack", "把长短不一的对话装进等长的行", "packing"),
    "lr_at": ("common.optim", "lr_at", "学习率：升、平、降", "schedule"),
    "orthogonalize": ("common.optim", "orthogonalize", "Muon 的核心：最近的正交矩阵", "optimizers"),
    "ranking_loss": ("reward", "ranking_loss", "奖励模型的损失", "reward"),
    "gae": ("ppo", "gae", "广义优势估计，从后往前", "ppo"),
    "group_advantages": ("grpo", "group_advantages", "GRPO：一组回答互相比", "grpo"),
    "policy_loss": ("grpo", "policy_loss", "带截断的策略损失", "ppo"),
    "preference_loss": ("dpo", "preference_loss", "DPO 和它的变体", "dpo"),
    "filter_logits": ("common.generate", "filter_logits", "温度、top-k、top-p、min-p", "sampling"),
}

# what a failed test means, in a sentence
MEANING = {
    "test_join_by_hand": "从左到右，每一处都要合并；刚合并出来的词元不再参加这一次合并",
    "test_join_joins_this_pair_alone": "只合并这一对：拼起来字节相同、但不是这一对的，不能合并",
    "test_get_batch_shifts_by_one": "一行是相连的词元，每个位置的目标是它后面的那一个",
    "test_get_batch_begins_anywhere": "每个位置都可能是开头，最后一个词元也可能是目标",
    "test_get_batch_depends_on_seed_and_step_alone": "同样的 (seed, step, micro_step) 必须给出同样的行，不管之前运行过什么",
    "test_render_chat_by_hand": "编号的顺序，或者掩码不对：只学助手的话和它的 <|im_end|>",
    "test_render_chat_leaves_out_weight_zero": "weight 为 0 的回答只读不学",
    "test_render_chat_prompt_is_a_prefix_of_the_row": "提问时的编号必须正好是训练时那一行的开头",
    "test_pack_takes_every_conversation_once": "每段放得下的对话要正好出现一次，行不能超过 T",
    "test_pack_wastes_little": "空位太多：短的要去填长的留下的空",
    "test_pack_order_follows_from_the_seed": "顺序要由 seed 决定：同一个 seed 结果相同，不同的 seed 结果不同",
    "test_rotate_by_hand": "转 90 度，(1, 3) 应变成 (-3, 1)；一对是 (x[i], x[i + D/2])，dtype 不变",
    "test_rotate_makes_products_depend_on_distance": "转过之后，q 和 k 的乘积只能与距离有关",
    "test_attend_without_a_mask_sees_the_past": "没有掩码时：只看自己和前面的；除以 √D；几个 q 头共用一个 k 头",
    "test_attend_sees_what_the_mask_shows": "有掩码时：只由掩码决定看见谁",
    "test_attend_one_new_token": "生成时只有一个 q，它在所有 k 之后，都看得见",
    "test_document_positions_by_hand": "每篇文档从 0 数起；编号以前出现过的，也是新的一篇",
    "test_append_returns_old_and_new": "新的接在旧的后面，各层分开，下次调用还在；length 由模型来改",
    "test_softmax_nll_and_its_gradient": "损失是 -log softmax，梯度是 softmax - onehot",
    "test_softmax_nll_of_huge_logits": "logits 很大时不能溢出",
    "test_lr_at_warms_up": "第 step 步（从 0 数）是 lr * (step + 1) / warmup_steps；0 表示全程的十分之一，最多 100",
    "test_lr_at_falls_along_a_cosine": "余弦：中间降到一半，最后是 min_lr",
    "test_lr_at_stays_then_falls_in_a_line": "decay_steps > 0：先平，最后 decay_steps 步直线降到 min_lr",
    "test_orthogonalize_against_an_svd": "结果应接近 U V'（奇异值全变成 1），高的和宽的矩阵都要对",
    "test_orthogonalize_forgets_the_scale": "矩阵放大一千倍，结果不变：先除以范数",
    "test_ranking_loss_by_hand": "-log sigmoid(好 - 坏)，先在一个提示的各对上平均，每个提示一个数",
    "test_ranking_loss_centres": "只看差时整体平移不改变损失；centre 项是 (好 + 坏)²",
    "test_gae_by_hand": "delta = r + γ·下一个 V - V，再加 γλ·下一个优势；returns = 优势 + V",
    "test_gae_with_lam_1_waits_for_the_reward": "λ=1：真正得到的减去预期的；λ=0：只看一步",
    "test_gae_counts_nothing_outside_the_mask": "掩码之外一律算 0：不能漏进来",
    "test_group_advantages_by_hand": "rloo 减别人的平均，dr_grpo 减全组平均，grpo 再除以标准差（+1e-4）",
    "test_policy_loss_begins_at_ratio_1": "还没学时比值正好是 1，损失是负的优势之和；掩码之外不算",
    "test_policy_loss_clips_what_has_gone_far_enough": "两种损失取大的：已经走够的不再有好处，走反的仍要付代价",
    "test_policy_loss_variants": "sequence：一个回答一个比值（几何平均），一个回答算一次；cispo：截断的比值乘 log-prob",
    "test_preference_loss_begins_at_log_2": "策略还等于参考时，损失是 log 2：要减去参考的 log-prob",
    "test_preference_loss_by_hand": "-log sigmoid(β(好的增益 - 坏的增益))；nll_weight 加上好回答每个词元的损失",
    "test_preference_loss_variants": "cdpo、ipo、simpo、orpo 里有一个不对；后三个按词元平均",
    "test_filter_logits_by_hand": "top-k、top-p、min-p 里有一个留错了词元",
    "test_filter_logits_divides_by_the_temperature_first": "先除以温度，再筛选",
    "test_filter_logits_makes_seen_tokens_less_likely": "重复惩罚：正的除，负的乘，只对出现过的",
}


# ---------------------------------------------------------------------------- the source of an exercise


def read_function(name):
    """Return (source lines of the module, syntax tree of the function, the class it is in or "")."""
    module, qualified, _, _ = EXERCISES[name]
    with open(os.path.join(ROOT, *module.split(".")) + ".py", encoding="utf-8") as f:
        source = f.read()
    class_name, _, function = qualified.rpartition(".")
    body = ast.parse(source).body
    if class_name:
        body = next(node for node in body if getattr(node, "name", "") == class_name).body
    node = next(node for node in body if getattr(node, "name", "") == function)
    return source.splitlines(), node, class_name


def solution(name):
    """Return our function as text, not indented."""
    lines, node, _ = read_function(name)
    return textwrap.dedent("\n".join(lines[node.lineno - 1:node.end_lineno])) + "\n"


def blank(name):
    """Return the function with its signature and docstring, and a body that is still to be written."""
    lines, node, _ = read_function(name)
    first = node.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    end = first.end_lineno if has_docstring else first.lineno - 1
    head = textwrap.dedent("\n".join(lines[node.lineno - 1:end]))
    return f'{head}\n    raise NotImplementedError("write me")\n'


def imports(name):
    """Return the import lines for the names that our function uses."""
    module = importlib.import_module(EXERCISES[name][0])
    _, node, _ = read_function(name)
    found = set()
    for part in ast.walk(node):
        if not isinstance(part, ast.Name) or part.id == node.name or part.id not in vars(module):
            continue
        value = vars(module)[part.id]
        if not isinstance(value, types.ModuleType):
            home = getattr(value, "__module__", module.__name__)
            found.add(f"from {home} import {part.id}")
        elif value.__name__ == part.id:
            found.add(f"import {part.id}")
        else:
            found.add(f"import {value.__name__} as {part.id}")
    return "\n".join(sorted(found))


def template(name):
    """Return the text of a new learn/work/NAME.py."""
    module, qualified, about, card = EXERCISES[name]
    path = module.replace(".", "/") + ".py"
    head = f'"""\n{about}：{path} 里的 {qualified}。先读 learn/cards/{card}.md。\n\n'
    head += f'写好函数体，然后  python -m learn.exercise {name} --check\n"""\n'
    needed = imports(name)
    return head + (needed + "\n" if needed else "") + "\n\n" + blank(name)


# ---------------------------------------------------------------------------- grading


def load_file(path, name):
    """Return the module in a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def swap(name, function):
    """Put a function in the place of ours; return the one that was there."""
    module, qualified, _, _ = EXERCISES[name]
    owner = importlib.import_module(module)
    class_name, _, attribute = qualified.rpartition(".")
    if class_name:
        owner = getattr(owner, class_name)
    ours = getattr(owner, attribute)
    setattr(owner, attribute, function)
    return ours


def tests_of(name):
    """Return {name: function} of the tests of an exercise."""
    module = load_file(TESTS, "test_formulas")
    return {key: value for key, value in vars(module).items() if key.startswith(f"test_{name}_")}


def grade(name, function):
    """Run the tests of an exercise with this function in the place of ours; return [(test, exception)] that failed."""
    import torch
    ours = swap(name, function)
    failed = []
    try:
        for test, body in tests_of(name).items():
            torch.manual_seed(0)
            try:
                body()
            except Exception as error:
                failed.append((test, error))
    finally:
        swap(name, ours)
    return failed


def explain(error):
    """Return the line of the test that failed, and what it found."""
    frames = traceback.extract_tb(error.__traceback__)
    in_tests = [frame for frame in frames if os.path.samefile(frame.filename, TESTS)]
    where = f"tests/test_formulas.py:{in_tests[-1].lineno}" if in_tests else ""
    line = in_tests[-1].line if in_tests else ""
    told = [text for text in str(error).splitlines() if text and "Tensor-likes" not in text and "Mismatch" not in text]
    reason = (told or ["这个断言不成立"])[0]
    own = [frame for frame in frames if os.sep + "work" + os.sep in frame.filename]
    if own and not isinstance(error, AssertionError):
        reason += f"（{type(error).__name__}，在你的第 {own[-1].lineno} 行：{own[-1].line}）"
    return f"{where}  {line}\n    {reason}"


def check_work(name, path):
    """Print what is right and what is still wrong; return whether all is right."""
    attribute = EXERCISES[name][1].rpartition(".")[2]
    try:
        function = getattr(load_file(path, "work"), attribute)
    except (SyntaxError, NameError, AttributeError, ImportError) as error:
        print(f"✗ {path} 还读不进来：{type(error).__name__}: {error}")
        return False
    failed = grade(name, function)
    n_tests = len(tests_of(name))
    if not failed:
        print(f"✓ {name}：{n_tests} 个测试都过了。对照我们的写法：python -m learn.exercise {name} --solution")
        return True
    test, error = failed[0]
    if isinstance(error, NotImplementedError):
        print(f"✗ {name}：函数体还是空的。写在 {os.path.relpath(path)}")
        return False
    print(f"✗ {name}：{n_tests} 个测试，{len(failed)} 个没过。先看这一个：\n  {MEANING[test]}\n  {explain(error)}")
    return False


# ---------------------------------------------------------------------------- progress and commands


def read_progress():
    path = os.path.join(WORK, "progress.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def remember(name, done):
    progress = read_progress()
    progress[name] = "done" if done or progress.get(name) == "done" else "tried"
    with open(os.path.join(WORK, "progress.json"), "w", encoding="utf-8") as f:
        json.dump(progress, f, indent=1)


def show_list():
    progress = read_progress()
    for name, (module, qualified, about, _) in EXERCISES.items():
        mark = {"done": "✓", "tried": "…"}.get(progress.get(name), " ")
        print(f"{mark} {name:<20}{module.replace('.', '/') + '.py':<20}{about}")
    n_done = list(progress.values()).count("done")
    print(f"\n做完 {n_done} / {len(EXERCISES)}。开始一个：python -m learn.exercise rotate")


@dataclass
class Config:
    name: str = ""          # the exercise
    check: bool = False     # run the tests on learn/work/NAME.py
    solution: bool = False  # show ours


def main(cfg):
    if not cfg.name:
        show_list()
        return
    check(cfg.name in EXERCISES, f"没有练习 {cfg.name!r}：python -m learn.exercise 列出全部")
    path = os.path.join(WORK, cfg.name + ".py")
    if cfg.solution:
        print(solution(cfg.name))
    elif cfg.check:
        check(os.path.exists(path), f"还没有 {os.path.relpath(path)}：先运行 python -m learn.exercise {cfg.name}")
        done = check_work(cfg.name, path)
        remember(cfg.name, done)
        sys.exit(not done)
    elif os.path.exists(path):
        print(f"{os.path.relpath(path)} 已经有了（删掉它，就重新生成）。检查：python -m learn.exercise {cfg.name} --check")
    else:
        os.makedirs(WORK, exist_ok=True)
        with open(path, "w", encoding="utf-8") as f:
            f.write(template(cfg.name))
        print(f"写好了 {os.path.relpath(path)}：打开它，写出函数体，再运行 python -m learn.exercise {cfg.name} --check")


if __name__ == "__main__":
    run(main, Config, positional="name")
