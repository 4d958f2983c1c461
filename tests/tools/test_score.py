"""Rows that a run can't be scored on are refused before anything is compiled."""

from types import SimpleNamespace

import pytest
from helpers import tiny_model

from tinylm.core.errors import UserError
from tinylm.core.settings import to_dict
from tinylm.data.config import DataConfig
from tinylm.tools import score


@pytest.mark.parametrize(
    ("seq_len", "wanted"),
    [
        (17, r"--data=seq_len=17 must be at most the context \(16\)"),
        (10, r"--data=seq_len=10 must be divisible by the run's model.loss_chunks \(4\)"),
    ],
)
def test_rows_that_do_not_fit_the_model_are_one_line(seq_len, wanted):
    run = SimpleNamespace(
        config={"data": to_dict(DataConfig())}, model_config=tiny_model(loss_chunks=4)
    )
    request = score.ScoreRequest(source="tales:5", settings=(f"seq_len={seq_len}",))
    with pytest.raises(UserError, match=wanted):
        score._open_text(run, request)
