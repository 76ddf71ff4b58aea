"""Which rows may come at which step, and that a step's batch is always the same."""

import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.train.curriculum import CurriculumBatches

N = 50


class Rows:
    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"tokens": np.full(4, i, np.int32)}


def served(**options):
    difficulty = np.arange(N)[::-1].astype(np.float64)  # row 49 is the easiest
    given = {"batch_size": 8, "seed": 0, "rise": 10, "start": 0.2} | options
    return CurriculumBatches(Rows(), difficulty, **given)


def test_easy_rows_come_first_and_all_of_them_in_the_end():
    data = served(batch_size=400)
    for step in range(12):
        share = min(1.0, np.sqrt(0.04 + 0.96 * step / 10))
        rows = set(data[step]["tokens"][:, 0])
        assert min(rows) == N - round(share * N)
        assert max(rows) == N - 1
    assert set(data[11]["tokens"][:, 0]) == set(range(N))


def test_a_batch_is_a_function_of_seed_and_step():
    a, b = served(), served()
    np.testing.assert_array_equal(a[7]["tokens"], b[7]["tokens"])
    assert a[7]["tokens"].shape == (8, 4)
    assert (a[7]["tokens"] != a[8]["tokens"]).any()
    assert (a[20]["tokens"] != served(seed=1)[20]["tokens"]).any()


@pytest.mark.parametrize("options", [{"start": 0.0}, {"start": 1.5}, {"rise": -1}])
def test_what_no_curriculum_is(options):
    with pytest.raises(UserError, match="accepted: a start in"):
        served(**options)
