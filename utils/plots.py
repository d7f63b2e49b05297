"""Pictures, to PNG."""

import io
from pathlib import Path

import numpy as np

from utils.files import write_atomically


def new_figure(columns: int, rows: int = 1):
    """Panels that need no display: the figure, and its axes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * columns, 3.6 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def save_figure(figure, path: Path) -> None:
    """Write the figure to path, a PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(Path(path), picture.getbuffer())


def draw_bars(axis, title: str, values: list[float], names: list[str] | None = None) -> None:
    """A bar for each layer, from input to output; numbered, or named below."""
    positions = range(1, len(values) + 1)
    axis.bar(positions, values)
    # a log axis, from a power of ten: bars may differ a hundredfold, and need a foot to be compared
    foot = 10.0 ** np.floor(np.log10(min(values)) - 1e-9)
    axis.set(xlabel="layer, input to output", yscale="log", ylim=(foot, 1.2 * max(values)))
    axis.set_title(title, fontsize=9)  # a model's name may be long
    if names:
        axis.set_xticks(positions, names, rotation=90, fontsize=6)  # so that resnet34's 36 names fit
