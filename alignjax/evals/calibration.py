"""How far a figure of accuracy can be trusted, and whether differences of scores can be read as probabilities.

Letters: n pairs. difference[n] is the chosen response's score less the rejected one's; a pair is right if it is above
0, and a tie, which is not right, if it is 0.
"""

import itertools

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Z = 1.959963984540054  # of 95 %, two-sided
EDGES = np.linspace(0.5, 1, 11)  # of the bins of probability
RATIOS = (1.0, 1.5, 2.0, 3.0, 5.0)  # where the buckets of a score ratio begin
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # told apart by the colour-blind too
COLUMNS = 4  # at most, of the picture's panels


def interval(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, `right` of n > 0, by Wilson's score method (1927), which holds near 0 and 1 too.

    It takes pairs as independent. Those of one post or problem are not quite, and then it is too narrow.
    """
    middle, half = right + Z**2 / 2, Z * np.sqrt(right * (n - right) / n + Z**2 / 4)
    return float(max(middle - half, 0) / (n + Z**2)), float(min((middle + half) / (n + Z**2), 1))


def share(right: np.ndarray) -> dict:
    """How many of right[n] bool hold: pairs, accuracy, interval; the last two are None where there are no pairs."""
    n = len(right)
    return {
        "pairs": n,
        "accuracy": float(right.mean()) if n else None,
        "interval": interval(int(right.sum()), n) if n else None,
    }


def by_ratio(difference: np.ndarray, ratio: np.ndarray) -> list[dict]:
    """`share` by buckets of ratio[n], by how much the chosen response was the better liked; below 1, it is unknown."""
    bucket = np.searchsorted(RATIOS, ratio, side="right") - 1
    return [
        {"from": low, "to": high, **share(difference[bucket == i] > 0)}
        for i, (low, high) in enumerate(zip(RATIOS, (*RATIOS[1:], None), strict=True))
    ]


def curve(difference: np.ndarray) -> dict:
    """Accuracy against probability, in ten bins, and the expected calibration error: their mean distance over all pairs.

    The ranking loss (Bradley-Terry) gives the response that scores higher probability sigmoid(|difference|) of being
    the better one. Ties are left out: of them no response scores higher.
    """
    difference = difference[difference != 0]
    probability = 1 / (1 + np.exp(-np.abs(difference)))
    which = np.minimum(
        np.searchsorted(EDGES, probability, side="right") - 1, len(EDGES) - 2
    )  # 1 is of the last
    bins = []
    for i, (low, high) in enumerate(zip(EDGES[:-1], EDGES[1:], strict=True)):
        mine = which == i
        bins.append(
            {
                "from": round(float(low), 2),
                "to": round(float(high), 2),
                **share(difference[mine] > 0),
                "probability": float(probability[mine].mean()) if mine.any() else None,
            }
        )
    filled = [b for b in bins if b["pairs"]]
    distance = sum(b["pairs"] * abs(b["accuracy"] - b["probability"]) for b in filled)
    return {"error": distance / max(len(difference), 1), "bins": bins}


def picture(sets: dict[str, dict[str, dict]]) -> Figure:
    """The curves of {set: {run: curve}}: a panel for each set, a colour for each run.

    A dot stands at the mean probability and the accuracy of a bin, as large as the bin's share of the pairs, with the
    accuracy's interval. A calibrated model's dots lie on the diagonal; below it, a model is too sure of itself.
    """
    runs = list(next(iter(sets.values())))
    colours = dict(zip(runs, itertools.cycle(COLOURS), strict=False))
    rows = -(-len(sets) // COLUMNS)
    columns = -(-len(sets) // rows)
    figure = Figure(figsize=(max(3.4 * columns + 0.4, 5), 3.5 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for panel in panels[len(sets) :]:
        panel.remove()
    for panel, (name, curves) in zip(panels, sets.items(), strict=False):
        panel.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", linewidth=1)
        for i, (run, found) in enumerate(curves.items()):
            dots(panel, [b for b in found["bins"] if b["pairs"]], colours[run])
            panel.text(
                0.04,
                0.93 - 0.06 * i,
                f"calibration error {100 * found['error']:.1f} %",
                fontsize=8,
                transform=panel.transAxes,
                color=colours[run],
            )
        panel.set_title(name if len(name) <= 36 else f"...{name[-33:]}", fontsize=10)
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlim(0.49, 1.01)
        panel.tick_params(labelbottom=True)
    keys = [Line2D([], [], color=colours[run], marker="o", linewidth=1, label=run) for run in runs]
    keys.append(
        Line2D(
            [],
            [],
            color="0.6",
            linestyle="--",
            linewidth=1,
            label="calibrated; a dot's area: share of pairs",
        )
    )
    figure.legend(handles=keys, loc="outside upper left", fontsize=8, frameon=False)
    figure.supxlabel("mean predicted probability of being right", fontsize=10)
    figure.supylabel("accuracy, with its 95 % interval", fontsize=10)
    return figure


def dots(panel, bins: list[dict], colour: str) -> None:
    """One curve of a panel, of bins with pairs in them."""
    at, height, pairs = (
        np.array([b[key] for b in bins]) for key in ("probability", "accuracy", "pairs")
    )
    ends = np.array([b["interval"] for b in bins]).reshape(-1, 2).T
    panel.vlines(at, *ends, color=colour, linewidth=1, alpha=0.6)
    panel.plot(at, height, color=colour, linewidth=1, alpha=0.6)
    panel.scatter(
        at,
        height,
        14 + 160 * pairs / max(pairs.sum(), 1),
        color=colour,
        alpha=0.85,
        linewidths=0,
        zorder=3,
    )
