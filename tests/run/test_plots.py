"""Figures say what the numbers and the trees say."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from gfnem.run.plots import (
    bar_table,
    image_grid,
    labelled_points,
    learning_curves,
    paths,
)


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=50)
    return file.getvalue()


def texts(figure: Figure) -> dict[str, Text]:
    """The written texts of the only axes of a figure."""
    (axes,) = figure.axes
    return {text.get_text(): text for text in axes.texts}


def test_one_panel_per_kind_of_metric_that_is_there() -> None:
    metrics = [
        {"train/m_steps": 0, "train/e_loss": 9.0, "train/e_loss_mean": 9.5},
        {"train/m_steps": 0, "train/e_loss": 4.0},
        {"train/m_steps": 10, "train/e_loss": math.nan, "valid/nll_per_token": 5.5},
        {"train/m_steps": 20, "train/e_loss": 3.0, "other/thing": 1.0, "valid/f1": math.nan},
    ]
    panels = {
        "E-step loss": ("train/e_loss*", "schedule/*"),
        "M-step loss": ("train/m_loss*",),
        "Negative log-likelihood (nats)": ("*/*nll*",),
        "F1": ("valid/f1",),
    }
    figure = learning_curves(metrics, panels)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "E-step loss",
        "Negative log-likelihood (nats)",
    ]
    loss, mean = figure.axes[0].lines
    assert (loss.get_label(), mean.get_label()) == ("train/e_loss", "train/e_loss_mean")
    # The last line of a step counts, NaN is left out.
    np.testing.assert_array_equal(loss.get_xydata(), [[0, 4.0], [20, 3.0]])
    assert png(figure).startswith(b"\x89PNG")


def test_long_curves_get_their_running_mean() -> None:
    values = [float(step % 2) for step in range(200)]
    metrics = [{"train/m_steps": i, "train/m_loss": value} for i, value in enumerate(values)]
    (axes,) = learning_curves(metrics, panels={"M": ["train/m_*"]}).axes
    raw, mean = axes.lines
    np.testing.assert_array_equal(raw.get_ydata(), values)
    # Five points on either side: of eleven, six or five are 1.
    assert np.asarray(mean.get_ydata())[100:102] == pytest.approx([6 / 11, 5 / 11])


def test_wide_ranges_are_drawn_on_a_log_scale() -> None:
    def scale(*values: float) -> str:
        metrics = [{"train/m_steps": i, "train/e_loss": value} for i, value in enumerate(values)]
        return learning_curves(metrics, {"Loss": ("train/e_loss",)}).axes[0].get_yscale()

    assert scale(1.0, 100.0) == "log"
    assert scale(1.0, 10.0) == "linear"
    assert scale(-1.0, 100.0) == "linear"


def test_no_metrics_no_panel() -> None:
    assert learning_curves([], {"Loss": ("train/e_loss",)}).axes == []


def test_bars_are_as_long_as_the_scores() -> None:
    rows = {
        "left-branching": {"sentence F1": 9.7, "corpus F1": 8.9},
        "right-branching": {"sentence F1": 46.2, "corpus F1": 44.1},
        "model": {"sentence F1": 27.2},
    }
    figure = bar_table(rows, title="Validation", own="model")
    sentence, corpus = figure.axes
    assert [bar.get_width() for bar in sentence.patches] == [9.7, 46.2, 27.2]  # type: ignore[attr-defined]
    assert [text.get_text() for text in sentence.texts] == ["9.7", "46.2", "27.2"]
    assert [text.get_text() for text in corpus.texts] == ["8.9", "44.1"]
    assert [label.get_text() for label in sentence.get_yticklabels()] == list(rows)
    left, right, model = (bar.get_facecolor() for bar in sentence.patches)
    assert same_color(left, right) and not same_color(left, model)
    assert sentence.texts[0].get_position()[1] == 0  # an offset: the number stands beside its bar
    assert png(figure).startswith(b"\x89PNG")


def test_images_stand_in_their_rows() -> None:
    grey = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None].expand(3, 1, 4, 4)
    red = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None].expand(1, 3, 4, 8)
    figure = image_grid([("grey $a$", grey), ("", red)])
    (axes,) = figure.axes
    assert list(texts(figure)) == ["grey $a$"]
    boxes = [image.get_extent() for image in axes.images]
    (left, right, bottom, top), second, third, wide = boxes
    assert left < right < second[0] < second[1] < third[0]
    assert bottom == second[2] == third[2]
    assert wide[3] < bottom < top
    # As wide as two, and no image is stretched or cut off.
    assert wide[1] - wide[0] == pytest.approx(2 * (right - left))
    assert all(box[1] - box[0] <= figure.get_figwidth() for box in boxes)
    assert wide[2] > 0
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    file.seek(0)
    drawn = imread(file)
    for box, color in zip(boxes, ([0] * 3, [0.5] * 3, [1] * 3, [1, 0, 0]), strict=True):
        x, y = 50 * (box[0] + box[1]), len(drawn) - 50 * (box[2] + box[3])
        assert drawn[int(y), int(x), :3] == pytest.approx(color, abs=0.01)


def test_images_that_cannot_be_drawn_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one image in each row"):
        image_grid([])
    with pytest.raises(ValueError, match="at least one image in each row"):
        image_grid([("none", torch.zeros(0, 1, 2, 2))])
    with pytest.raises(ValueError, match="1 or 3 channels, not 2"):
        image_grid([("two", torch.zeros(1, 2, 2, 2))])


def test_labelled_points() -> None:
    points = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    panels = [
        ("one", torch.tensor([0, 1, 0]), points[:1]),
        ("two", torch.tensor([6, 0, 1]), points[1:2]),
    ]
    figure = labelled_points(points, panels, columns=1)
    (above, below) = (axes.get_position() for axes in figure.axes)
    assert above.x0 == below.x0 and above.y0 > below.y0
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one", "two"]
    for axes, (_, _, right) in zip(figure.axes, panels, strict=True):
        (scatter,) = axes.collections
        np.testing.assert_array_equal(np.asarray(scatter.get_offsets()), points.numpy())
        (centers,) = axes.lines
        np.testing.assert_array_equal(centers.get_xydata(), right)
    first, second = (np.asarray(axes.collections[0].get_facecolor()) for axes in figure.axes)
    assert same_color(first[0], first[2]) and not same_color(first[0], first[1])
    # The seventh label has the first one's color again.
    assert same_color(second[0], second[1]) and same_color(second[2], first[1])
    assert png(figure).startswith(b"\x89PNG")


def test_paths_have_a_beginning_and_an_end() -> None:
    ways = [[[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]], [[3.0, 3.0]]]
    axes, other = paths(torch.zeros(4, 2), [("one", ways), ("other", ways[1:])]).axes
    assert axes.get_title(loc="left") == "one" and len(other.lines) == 3
    lines = [np.asarray(line.get_xydata()).tolist() for line in axes.lines]
    assert lines == [ways[0], [[0, 0]], [[2, 0]], ways[1], [[3, 3]], [[3, 3]]]
    markers = [line.get_marker() for line in axes.lines]
    assert markers == 2 * [".", "o", "x"]
