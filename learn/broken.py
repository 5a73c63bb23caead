"""
弄坏一处，看会怎样：同一次短训练跑两遍，一遍对，一遍错一处，曲线画在一起。

    python -m learn.broken                  # 有哪些
    python -m learn.broken no_shift         # 跑一个：终端里的曲线，out/learn-broken/no_shift.png，哪个测试抓得住它
    python -m learn.broken all              # 全部，最后一张表

Each mistake is a function put in the place of ours while a stage of the project trains on learn/poems.txt. Everything
is measured afterwards by the right code.
"""
import contextlib
import time
from dataclasses import dataclass

import pretrain
from configurator import check, run
from learn import draw, small
from learn.measures import curve_of, log_recitals
from learn.mistakes import CASES

OUT = "out/learn-broken"


@contextlib.contextmanager
def replaced(replace):
    """Context: wrong functions stand in the place of ours."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replace]
    try:
        for owner, name, wrong in replace:
            setattr(owner, name, wrong)
        yield
    finally:
        for owner, name, ours in before:
            setattr(owner, name, ours)


def train_both(name, **changes):
    """Train the right run and the wrong one; return their folders."""
    case = CASES[name]
    folders = []
    for side in ("right", "wrong"):
        steps = {"max_steps": 200, "eval_every": 200} if case.stage == "pretrain" else {}
        settings = {**steps, **(case.both or {}), **changes, "out_dir": f"{OUT}/{name}-{side}"}
        if case.curve == "recited":
            replace = ((pretrain, "print_sample", log_recitals),)
        else:
            replace = ()
        if side == "wrong":
            replace += case.replace
            settings.update(case.wrong or {})
        # the runs that both start from are right
        if case.stage != "pretrain":
            small.make_run("sft" if case.stage != "sft" else "pretrain")
        with replaced(replace):
            if case.data and side == "wrong":
                settings["data_dir"] = small.make_data(case.data, f"learn-broken-{name}")
            folders.append(small.train(case.stage, **settings))
    return folders


def show(name, **changes):
    """Run one case and draw it; return (right, wrong) numbers and the seconds it took."""
    case = CASES[name]
    began = time.perf_counter()
    print(f"{name}：{case.what}", flush=True)
    right, wrong = train_both(name, **changes)
    curves = {"·": curve_of(right, case.curve), "×": curve_of(wrong, case.curve)}
    draw.print_curves(curves)
    values = [case.measure(folder) for folder in (right, wrong)]
    path = f"{OUT}/{name}.png"
    saved = draw.save_curves({"right": curves["·"], "wrong": curves["×"]}, name, "step", case.curve, path)
    seconds = time.perf_counter() - began
    print(f"  日志里的 {case.curve}：· 对  × 错{'    ' + path if saved else '    （没有 matplotlib，不画 png）'}")
    print(f"  {case.unit}：对 {values[0]:.2f}，错 {values[1]:.2f}")
    print(f"  你会看到：{case.seen}")
    print(f"  抓住它的测试：tests/test_formulas.py 的 {case.test}    {seconds:.0f} 秒\n", flush=True)
    return values, seconds


@dataclass
class Config:
    name: str = ""  # the mistake, or all


def main(cfg):
    if not cfg.name:
        for name, case in CASES.items():
            print(f"{name:<20}{case.what}")
        return
    check(cfg.name in CASES or cfg.name == "all", f"没有 {cfg.name!r}：python -m learn.broken 列出全部")
    if cfg.name != "all":
        show(cfg.name)
        return
    rows = []
    for name, case in CASES.items():
        (right, wrong), seconds = show(name)
        numbers = f"{case.unit} | {right:.2f} | {wrong:.2f}"
        rows.append(f"| `{name}` | {case.what} | {numbers} | `{case.test}` | {seconds:.0f} |")
    print("| | 哪里错了 | 量什么 | 对 | 错 | 抓住它的测试 | 秒 |\n|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    run(main, Config, positional="name")
