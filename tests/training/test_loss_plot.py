"""What loss.png shows, read from the curves themselves."""

import pytest
from matplotlib import pyplot

from tuner.training import loss_plot

STEPS = [4, 8, 12]
COUNTS = {"decided": [13, 20, 23], "named": [12, 19, 21], "right": [11, 14, 17], "general": [11, 12, 13]}
LOSSES = [("training loss", [3.0, 2.0, 1.0, 0.5]), ("validation loss", [2.5, 1.5, 0.75])]


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Return a function that plots a run's record and gives (left axes, right axes or None, legend)."""
    monkeypatch.setattr(pyplot, "close", lambda _: None)
    yield lambda **calls: draw_run(tmp_path / "loss.png", **calls)
    monkeypatch.undo()
    pyplot.close("all")


def draw_run(path, evaluated=True, **calls):
    evaluations = [
        {"step": step, "loss": loss, **{key: counts[i] for key, counts in COUNTS.items()}}
        for i, (step, loss) in enumerate(zip(STEPS, LOSSES[1][1], strict=True))
    ]
    history = {
        "losses": LOSSES[0][1],
        "evaluations": evaluations if evaluated else [],
        "rows": {"validation": 23},
        "validation_calls": calls if evaluated else None,
    }
    loss_plot.plot(history, path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    figure = pyplot.gcf()
    [legend] = figure.legends
    left, *right = figure.axes
    return left, right[0] if right else None, [text.get_text() for text in legend.get_texts()]


def curves(axes):
    return [(line.get_label(), list(line.get_ydata())) for line in axes.lines]


def test_calls_that_are_all_one_tag_are_one_curve(draw):
    left, right, legend = draw(rows=10, tools=1, arguments=False)
    assert curves(left) == LOSSES
    assert curves(right) == [("validation accuracy (call/text)", COUNTS["right"])]
    assert list(right.lines[0].get_xdata()) == STEPS
    assert right.get_ylabel() == "validation rows right, of 23"
    assert set(legend) == {label for label, _ in curves(left) + curves(right)}
    assert len(legend) == 3


@pytest.mark.parametrize("calls", [{"tools": 2, "arguments": False}, {"tools": 1, "arguments": True}])
def test_decision_name_and_arguments_are_a_curve_each_the_last_two_of_call_rows_alone(draw, calls):
    left, right, legend = draw(rows=10, **calls)
    assert curves(left) == LOSSES
    assert curves(right) == [
        ("validation decision (of 23)", [13, 20, 23]),
        ("validation name (of 10)", [1, 7, 8]),  # without 11, 12 and 13 text rows
        ("validation arguments (of 10)", [0, 2, 4]),
    ]
    assert all(list(line.get_xdata()) == STEPS for line in right.lines)
    assert right.get_ylabel() == "validation rows right"
    assert set(legend) == {label for label, _ in curves(left) + curves(right)}
    drawn = [*left.lines, *right.lines]
    assert len({line.get_color() for line in drawn}) == len(set(legend)) == 5
    assert len({line.get_marker() for line in right.lines}) == 3
    top = right.get_ylim()[1]
    assert 23 < top < 25
    assert all(tick == int(tick) for tick in right.get_yticks())


def test_without_validation_rows_there_is_the_training_loss_alone(draw):
    left, right, legend = draw(evaluated=False)
    assert right is None
    assert legend == ["training loss"]
    assert curves(left) == LOSSES[:1]
