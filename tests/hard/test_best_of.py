"""Best of N: what it has on average, against all draws."""
import itertools

import pytest

from recipes.best_of import best_of_weights, summarise


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_weights_are_the_share_of_draws_in_which_an_answer_scores_highest(n):
    scores = [0.3, 2.0, -1.0, 0.9, 0.5]
    wins = [0] * 5
    for draw in itertools.combinations(range(5), n):
        wins[max(draw, key=scores.__getitem__)] += 1
    assert best_of_weights(scores, n) == pytest.approx([w / sum(wins) for w in wins])


def test_the_kept_answer_is_judged_by_what_the_choice_did_not_see():
    """Of two answers the higher scored one is kept: here the one of the wrong form, in one of two titles."""
    right = {"form": True, "rhymes": True}
    wrong = {"form": False, "rhymes": False}
    titles = [
        [{"reward": 1.0, **right}, {"reward": 2.0, **wrong}],
        [{"reward": 0.0, **wrong}, {"reward": 1.0, **right}]]
    assert summarise(titles, 1) == {"reward": 1.0, "form": [0.5, 0.5], "rhymes": 1.0}
    assert summarise(titles, 2) == {"reward": 1.5, "form": [0.0, 1.0], "rhymes": 1.0}
