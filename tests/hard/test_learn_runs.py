"""Every command of the lessons runs: tour, experiments, mistakes, in a folder of its own and a few steps each."""
import os

import pytest
import torch
from conftest import ROOT

from learn import broken, show, small, tour


@pytest.fixture(scope="module", autouse=True)
def few_steps(tmp_path_factory):
    """A folder that holds nothing but the lessons, and stages of six steps."""
    place = tmp_path_factory.mktemp("learn")
    os.symlink(os.path.join(ROOT, "learn"), place / "learn")
    before = os.getcwd()
    os.chdir(place)
    patch = pytest.MonkeyPatch()
    for settings in small.SETTINGS.values():
        patch.setitem(settings, "max_steps", 6)
        patch.setitem(settings, "eval_every", 6)
    patch.setitem(show.STEPS, "optimizers", 6)
    patch.setitem(show.STEPS, "experts", 6)
    yield
    patch.undo()
    os.chdir(before)


@pytest.fixture(autouse=True)
def one_thread(repeatable):
    torch.set_num_threads(1)


@pytest.mark.parametrize("stop", tour.STOPS)
def test_a_stop_of_the_tour(stop, capsys):
    tour.main(tour.Config(stop))
    said = capsys.readouterr().out
    assert "接着读：" in said and ":0 " not in said  # every function that it names is there


def test_the_tour_of_another_line(capsys):
    tour.main(tour.Config("tokens", line="龘龘"))
    assert r"\xe9" in capsys.readouterr().out


def test_an_untrained_model_is_at_log_v(capsys):
    """What the stop about the loss lets a reader predict."""
    tour.main(tour.Config("loss"))
    said = capsys.readouterr().out
    guess = float(said.split("= ln ")[1].split("= ")[1].split()[0])
    measured = float(said.split("平均：没学过 ")[1].split("，")[0])
    assert abs(guess - measured) < 0.3


@pytest.mark.parametrize("name", show.SHOWS)
def test_an_experiment(name, capsys):
    show.main(show.Config(name))
    assert len(capsys.readouterr().out.splitlines()) > 3


@pytest.mark.parametrize("name", broken.CASES)
def test_a_mistake_runs_beside_the_right_code(name, capsys):
    values, _ = broken.show(name, max_steps=4, eval_every=4)
    said = capsys.readouterr().out
    assert "×" in said and broken.CASES[name].test in said and len(values) == 2
    assert os.path.getsize(f"{broken.OUT}/{name}.png") > 5_000


def test_what_the_kv_cache_writes_is_the_same(capsys):
    show.kv_cache()
    assert "一样：True" in capsys.readouterr().out
