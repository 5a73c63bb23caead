"""learn/: tiny.py against model.py, exercises graded right, links and commands of the lessons."""
import contextlib
import glob
import io
import os
import re

import pytest
import torch
from torch.testing import assert_close

from conftest import ROOT
from learn import broken, exercise, links, show, tiny, tour
from model import ModelConfig, Transformer

# ---------------------------------------------------------------------------- tiny.py


@pytest.fixture
def three_layers(monkeypatch):
    monkeypatch.setattr(tiny, "LAYERS", 3)


def test_tiny_weights_in_model_py_give_the_same_logits(three_layers):
    """tiny.py is written without model.py, so each is an oracle of the other: logits, and gradients."""
    W = tiny.make_weights()
    config = ModelConfig(len(tiny.CHARS), tiny.C, tiny.LAYERS, tiny.H, hidden_dim=tiny.HIDDEN)
    model = Transformer(config)
    model.load_state_dict(W, strict=True)
    ids = torch.tensor([tiny.encode(poem) for poem in tiny.POEMS[:4]])
    ours = tiny.forward(W, ids)
    theirs = model.logits(model(ids))
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for name, p in model.named_parameters():
        assert_close(W[name].grad, p.grad, atol=1e-6, rtol=1e-4)


def test_tiny_masks_the_answer_alone():
    rows = torch.tensor([tiny.encode("床前明月光：疑是\n地上霜")])
    learned = rows[:, 1:][tiny.answer_mask(rows) > 0]
    assert tiny.decode(learned.tolist()) == "疑是\n"


def test_tiny_rule_by_hand():
    answers = ("明月照高楼\n", "白日照高楼\n", "月月照高楼\n", "明月照高楼", "明月照\n")
    assert [tiny.reward(answer) for answer in answers] == [1, 0.2, 0, 0, 0]


def test_tiny_learns():
    """Every stage lowers what it lowers: two short ones."""
    torch.manual_seed(1)
    W = tiny.make_weights()
    rows = tiny.questions_and_answers(tiny.POEMS[:8])
    before = -tiny.token_logps(W, rows).mean()
    with contextlib.redirect_stdout(io.StringIO()):
        tiny.pretrain(W, steps=8)
        tiny.sft(W, rows, steps=8)
        tiny.grpo(W, rows, steps=1)
    assert -tiny.token_logps(W, rows).mean() < before - 0.5


def test_tiny_is_as_short_as_it_says():
    with open(tiny.__file__, encoding="utf-8") as f:
        lines = f.read().splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120


# ---------------------------------------------------------------------------- exercises

# what a learner could write: a sign, a place, a mask that is wrong. (a piece of our source, what stands there instead)
WRONG = {
    "join": [("if joined and (joined[-1], token) == pair", "if joined and joined[-1] + token == pair[0] + pair[1]"),
             ("(joined[-1], token) == pair", "(token, joined[-1]) == pair")],
    "get_batch": [("rows[:, 1:]", "rows[:, :-1]"), ("- T, size", "- T - 1, size"), ("[cfg.seed, step]", "[step]")],
    "rotate": [("x1 * cos - x2 * sin", "x1 * cos + x2 * sin"), ("x.chunk(2, dim=-1)", "(x[..., ::2], x[..., 1::2])"),
               ("turned.to(x.dtype)", "turned")],
    "attend": [("is_causal=mask is None", "is_causal=False"), ("q, k, v, mask,", "q, k, v,"),
               ("if T == 1", "if False")],
    "document_positions": [("torch.where(begins, index, 0).cummax(dim=1).values", "begins.cumsum(1)"),
                           (".cummax(dim=1).values", ""),
                           ("docs[:, 1:] != docs[:, :-1]", "docs[:, 1:] > docs[:, :-1]")],
    "append": [("self.length:] = k", ":k.size(2)] = k"), (":end]", "self.length:end]"), ("self.v[layer]", "self.v[0]")],
    "softmax_nll": [("- onehot", "+ onehot"), ("nll = -", "nll = "),
                    ("logits.float().log_softmax(-1)", "logits.exp().div(logits.exp().sum(-1, keepdim=True)).log()")],
    "render_chat": [("[learned] * len(words)", "[learned] * (len(words) - 1) + [0]"),
                    ("int(is_learned(message))", "int(message['role'] == 'assistant')"),
                    ("[0] * len(newline)", "[learned] * len(newline)"),
                    ("[0] * len(header) +", "[learned] * len(header) +")],
    "pack": [("(lengths <= T)", "(lengths < T)"),
             ("rng = np.random.default_rng(seed)", "rng = np.random.default_rng()"),
             ("best = bisect.bisect_left(rooms, (lengths[i],))", "best = len(rooms)")],
    "lr_at": [("(step + 1)", "step"), ("1 + math.cos", "1 - math.cos"), ("cfg.max_steps - step) /", "cfg.max_steps) /"),
              ("cfg.min_lr + (cfg.lr - cfg.min_lr) * share", "cfg.lr * share")],
    "orthogonalize": [("x = x / (1.02 * norm + 1e-6)", "x = x / x.size(-1) ** 0.5"), (").mT", ")"),
                      ("beta=a)", "beta=1.0)")],
    "ranking_loss": [("scores[chosen] - scores[rejected])", "scores[rejected] - scores[chosen])"),
                     ("losses = losses / prompt.bincount()[prompt]", "pass"),
                     ("scores[chosen] + scores[rejected]", "scores[chosen] - scores[rejected]")],
    "gae": [("- values[:, t]", "+ values[:, t]"), ("gamma * lam", "lam"), ("reversed(range(values.size(1)))",
            "range(values.size(1))"), ("values = values * mask", "pass")],
    "group_advantages": [("groups - groups.mean(dim=1, keepdim=True)", "groups - totals.mean()"),
                         ("* group_size / (group_size - 1)", ""), (" + 1e-4", "")],
    "policy_loss": [("torch.max(plain", "torch.min(plain"), ("-advantages * ratio\n", "advantages * ratio\n"),
                    ("(loss * weights)", "loss"), ("clamp(low, high)", "clamp(max=high)"), ("cfg.clip_high or ", "")],
    "preference_loss": [("chosen_gain - rejected_gain", "rejected_gain - chosen_gain"),
                        ("chosen - ref_chosen", "chosen"), ("- cfg.simpo_gamma", "+ cfg.simpo_gamma"),
                        ("- cfg.nll_weight", "+ cfg.nll_weight")],
    "filter_logits": [("<= 1 - top_p", "< top_p"), ("* repetition_penalty", "/ repetition_penalty"),
                      ("+ math.log(min_p)", "+ min_p"), ("logits / temperature", "logits * temperature")],
}


def function_from(text, name):
    """The function that a text defines, with the names of the module it is for."""
    module = exercise.importlib.import_module(exercise.EXERCISES[name][0])
    names = dict(vars(module))
    exec(text, names)
    return names[exercise.EXERCISES[name][1].rpartition(".")[2]]


@pytest.mark.parametrize("name", exercise.EXERCISES)
def test_an_exercise_is_red_blank_and_green_with_our_body(name):
    blank = exercise.blank(name)
    assert blank.startswith(exercise.solution(name).split(":\n")[0])
    failed = exercise.grade(name, function_from(blank, name))
    assert len(failed) == len(exercise.tests_of(name)) > 0
    assert not exercise.grade(name, function_from(exercise.solution(name), name))


@pytest.mark.parametrize("name", exercise.EXERCISES)
def test_plausible_mistakes_are_red(name):
    ours = exercise.solution(name)
    for right, wrong in WRONG[name]:
        assert right in ours, f"{name} no longer contains {right!r}: choose another mistake"
        failed = exercise.grade(name, function_from(ours.replace(right, wrong), name))
        assert failed, f"{name} with {wrong!r} instead of {right!r} passes"


def test_every_test_of_an_exercise_has_a_meaning():
    names = [test for name in exercise.EXERCISES for test in exercise.tests_of(name)]
    assert sorted(names) == sorted(exercise.MEANING)


# ---------------------------------------------------------------------------- broken


@pytest.mark.parametrize("name", broken.CASES)
def test_the_test_that_a_mistake_names_catches_it(name):
    case = broken.CASES[name]
    body = vars(exercise.load_file(exercise.TESTS, "test_formulas"))[case.test]
    torch.manual_seed(0)
    body()
    with broken.replaced(case.replace), pytest.raises(AssertionError):
        torch.manual_seed(0)
        body()


# ---------------------------------------------------------------------------- lessons


@pytest.mark.parametrize("document", links.documents(), ids=lambda path: path.split("learn/")[-1])
def test_links_point_to_todays_lines(document):
    assert not links.wrong_links(document), "python -m learn.links --fix"


CARDS = sorted(glob.glob(os.path.join(ROOT, "learn", "cards", "*.md")))


@pytest.mark.parametrize("path", CARDS, ids=os.path.basename)
def test_a_card_has_what_a_card_has(path):
    with open(path, encoding="utf-8") as f:
        text = f.read()
    assert len(text.splitlines()) <= 60
    parts = ["**先想一想。**", "```bash", "**看什么。**", "**弄坏它。**", "**容易错的地方。**", "<details><summary>答案</summary>"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert links.LINK.search(text)


COMMAND = re.compile(r"python -m learn\.(tour|broken|show|exercise) (\w+)")
LESSONS = [*links.documents(), os.path.join(ROOT, "learn", "mingyue.ipynb"), os.path.join(ROOT, "runs", "learn.sh")]


def test_every_command_of_the_lessons_is_one():
    known = {"tour": tour.STOPS, "broken": {**broken.CASES, "all": None}, "show": show.SHOWS,
             "exercise": exercise.EXERCISES}
    n_found = 0
    for path in LESSONS:
        with open(path, encoding="utf-8") as f:
            for module, name in COMMAND.findall(f.read()):
                assert name in known[module] or name in ("STOP", "NAME"), f"{path}: python -m learn.{module} {name}"
                n_found += 1
    assert n_found > 50


def test_every_exercise_has_its_card():
    names = {os.path.basename(path).removesuffix(".md") for path in CARDS}
    assert {card for _, _, _, card in exercise.EXERCISES.values()} <= names


def test_an_exercise_from_start_to_end(tmp_path, monkeypatch, capsys):
    """Written, not overwritten, refused while it is blank, wrong or broken, passed when right, remembered."""
    monkeypatch.setattr(exercise, "WORK", str(tmp_path / "work"))
    path = tmp_path / "work" / "rotate.py"
    Config = exercise.Config

    def checked():
        with pytest.raises(SystemExit) as stopped:
            exercise.main(Config("rotate", check=True))
        return stopped.value.code, capsys.readouterr().out

    exercise.main(Config("rotate"))
    blank = path.read_text(encoding="utf-8")
    exercise.main(Config("rotate"))
    assert "已经有了" in capsys.readouterr().out
    code, said = checked()
    assert code == 1 and "函数体还是空的" in said
    right = exercise.imports("rotate") + "\n" + exercise.solution("rotate")
    path.write_text(right.replace("x1 * cos - x2 * sin", "x1 * cos + x2 * sin"), encoding="utf-8")
    code, said = checked()
    assert code == 1 and "转 90 度" in said and "test_formulas.py" in said
    path.write_text(blank + "def (", encoding="utf-8")
    assert "SyntaxError" in checked()[1]
    path.write_text(right, encoding="utf-8")
    assert checked()[0] == 0
    exercise.main(Config())
    assert "做完 1 / 17" in capsys.readouterr().out
