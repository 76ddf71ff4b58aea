"""Progress where there is no terminal: plain lines, few enough for a log."""

import io

from rich.console import Console

from jaxdistill._progress import ItemProgress


def test_a_line_comes_at_the_first_item_every_ten_seconds_and_at_the_end():
    said, clock = io.StringIO(), [0.0]
    with ItemProgress(Console(file=said, width=20), fields=("loss",)) as progress:
        progress.get_time = lambda: clock[0]
        task = progress.add_task("train", total=30, loss="")
        for i in range(30):
            clock[0] += 4.0
            progress.update(task, advance=1, loss=f"loss {i}")
    lines = said.getvalue().splitlines()
    assert [int(line.split()[1]) for line in lines] == [*range(1, 30, 3), 30]
    assert lines[1] == "train: 4 of 30, loss 3, ETA 0:01:44"  # 26 items at 4 s
    assert lines[-1] == "train: 30 of 30, loss 29, 0:02:00 elapsed"


def test_on_a_terminal_it_is_a_bar():
    said = io.StringIO()
    with ItemProgress(Console(file=said, width=80, force_terminal=True)) as progress:
        progress.advance(progress.add_task("rows", total=1))
    assert "1/1" in said.getvalue() and "rows: 1" not in said.getvalue()
