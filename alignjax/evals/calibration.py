"""Measure how far an accuracy can be trusted, and whether score differences are calibrated.

A difference is the chosen response's score minus the rejected response's score. A pair is right
if its difference is above 0. A difference of 0 is a tie, and a tie does not count as right.
"""

import itertools

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from alignjax.algorithms.intervals import wilson_interval

BIN_EDGES = np.linspace(0.5, 1, 11)  # of the bins of predicted probability
RATIO_STARTS = (1.0, 1.5, 2.0, 3.0, 5.0)  # lower bounds of the score-ratio buckets

# Colour-blind readers can tell these colours apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
REFERENCE_COLOUR = "0.6"  # of the diagonal on which a calibrated model lies
MAX_PANEL_COLUMNS = 4
MAX_TITLE_LENGTH = 36  # characters; a longer title keeps its end


def accuracy_summary(right: Bool[np.ndarray, " pairs"]) -> dict:
    """Return the number of pairs, their accuracy and its interval.

    Accuracy and interval are None if there are no pairs.
    """
    total = len(right)
    if total == 0:
        return {"pairs": 0, "accuracy": None, "interval": None}
    return {
        "pairs": total,
        "accuracy": float(right.mean()),
        "interval": wilson_interval(int(right.sum()), total),
    }


def accuracy_by_ratio(
    differences: Float[np.ndarray, " pairs"], ratios: Float[np.ndarray, " pairs"]
) -> list[dict]:
    """Return an accuracy summary for each bucket of score ratios.

    A ratio says how much better people liked the chosen response. A ratio below 1 means that it
    is unknown, and its pair is in no bucket.
    """
    bucket_of_pair = np.searchsorted(RATIO_STARTS, ratios, side="right") - 1
    summaries = []
    bounds = zip(RATIO_STARTS, (*RATIO_STARTS[1:], None), strict=True)
    for bucket, (low, high) in enumerate(bounds):
        right = differences[bucket_of_pair == bucket] > 0
        summaries.append({"from": low, "to": high, **accuracy_summary(right)})
    return summaries


def calibration_curve(differences: Float[np.ndarray, " pairs"]) -> dict:
    """Return accuracy against predicted probability in ten bins, and the calibration error.

    The ranking loss (Bradley-Terry) gives the response with the higher score the probability
    sigmoid(|difference|) of being the better one. Ties are left out, because neither response
    has a higher score. The expected calibration error is the mean distance between accuracy and
    probability over all pairs.
    """
    differences = differences[differences != 0]
    probabilities = 1 / (1 + np.exp(-np.abs(differences)))
    bin_of_pair = np.searchsorted(BIN_EDGES, probabilities, side="right") - 1
    bin_of_pair = np.minimum(bin_of_pair, len(BIN_EDGES) - 2)  # a probability of 1: the last bin
    bins = []
    for number, (low, high) in enumerate(itertools.pairwise(BIN_EDGES)):
        inside = bin_of_pair == number
        bins.append(
            {
                "from": round(float(low), 2),
                "to": round(float(high), 2),
                **accuracy_summary(differences[inside] > 0),
                "probability": float(probabilities[inside].mean()) if inside.any() else None,
            }
        )
    weighted_distance = sum(
        bin["pairs"] * abs(bin["accuracy"] - bin["probability"]) for bin in filled_bins(bins)
    )
    return {"error": weighted_distance / max(len(differences), 1), "bins": bins}


def filled_bins(bins: list[dict]) -> list[dict]:
    """Return the bins that hold pairs."""
    return [bin for bin in bins if bin["pairs"]]


def calibration_figure(curves: dict[str, dict[str, dict]]) -> Figure:
    """Draw the curves of {set: {run: curve}}: one panel for each set, one colour for each run.

    A dot stands at the mean probability and the accuracy of a bin. Its area is the bin's share
    of the pairs, and a line shows the accuracy's interval. The dots of a calibrated model lie on
    the diagonal; a model below it is too sure of itself.
    """
    runs = list(next(iter(curves.values())))
    colours = dict(zip(runs, itertools.cycle(COLOURS), strict=False))
    rows = -(-len(curves) // MAX_PANEL_COLUMNS)
    columns = -(-len(curves) // rows)
    size = (max(3.4 * columns + 0.4, 5), 3.5 * rows + 0.7)  # inches
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for panel in panels[len(curves) :]:
        panel.remove()
    for panel, (name, curves_of_set) in zip(panels, curves.items(), strict=False):
        draw_panel(panel, name, curves_of_set, colours)
    figure.legend(
        handles=legend_entries(colours), loc="outside upper left", fontsize=8, frameon=False
    )
    figure.supxlabel("mean predicted probability of being right", fontsize=10)
    figure.supylabel("accuracy, with its 95 % interval", fontsize=10)
    return figure


def draw_panel(panel: Axes, name: str, curves: dict[str, dict], colours: dict[str, str]) -> None:
    """Draw the curves {run: curve} of one set."""
    panel.plot([0.5, 1], [0.5, 1], color=REFERENCE_COLOUR, linestyle="--", linewidth=1)
    for number, (run, curve) in enumerate(curves.items()):
        draw_curve(panel, filled_bins(curve["bins"]), colours[run])
        panel.text(
            0.04,
            0.93 - 0.06 * number,
            f"calibration error {100 * curve['error']:.1f} %",
            fontsize=8,
            transform=panel.transAxes,
            color=colours[run],
        )
    shortened = name if len(name) <= MAX_TITLE_LENGTH else f"...{name[3 - MAX_TITLE_LENGTH :]}"
    panel.set_title(shortened, fontsize=10)
    panel.grid(color="0.92")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlim(0.49, 1.01)
    panel.tick_params(labelbottom=True)


def draw_curve(panel: Axes, bins: list[dict], colour: str) -> None:
    """Draw one curve through bins that hold pairs."""
    probabilities = np.array([bin["probability"] for bin in bins])
    accuracies = np.array([bin["accuracy"] for bin in bins])
    pairs = np.array([bin["pairs"] for bin in bins])
    intervals = np.array([bin["interval"] for bin in bins]).reshape(-1, 2)
    panel.vlines(
        probabilities, intervals[:, 0], intervals[:, 1], color=colour, linewidth=1, alpha=0.6
    )
    panel.plot(probabilities, accuracies, color=colour, linewidth=1, alpha=0.6)
    panel.scatter(
        probabilities,
        accuracies,
        14 + 160 * pairs / max(pairs.sum(), 1),
        color=colour,
        alpha=0.85,
        linewidths=0,
        zorder=3,
    )


def legend_entries(colours: dict[str, str]) -> list[Line2D]:
    """Return a legend entry for each run, and one for the diagonal."""
    entries = [
        Line2D([], [], color=colour, marker="o", linewidth=1, label=run)
        for run, colour in colours.items()
    ]
    diagonal = Line2D(
        [],
        [],
        color=REFERENCE_COLOUR,
        linestyle="--",
        linewidth=1,
        label="calibrated; a dot's area: share of pairs",
    )
    return [*entries, diagonal]
