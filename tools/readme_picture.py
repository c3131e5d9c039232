"""Draw the README's picture from the table of docs/study.md: SPIN against fictitious play.

Run it from the repository: `python tools/readme_picture.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import matplotlib.pyplot as plt

PAGE: Final = Path("docs/study.md")
PICTURE: Final = Path("docs/stability.png")
_LINES: Final = {
    "SPIN": ("plain SPIN", "tab:red", "-"),
    "FictitiousSPIN": ("fictitious play", "tab:blue", "-"),
    "SFT": ("SFT, equal steps", "tab:gray", "--"),
}


def medians(page: str) -> dict[str, list[float]]:
    """Exact KL of iterates 0 to 8, nats, by variant: the rows `exact/kl` of the page's table."""
    rows = (line.strip("| \n").split(" | ") for line in page.splitlines())
    return {row[1]: [float(v) for v in row[2:-1]] for row in rows if row[0] == "exact/kl"}


def main() -> None:
    """Draw and save."""
    found = medians(PAGE.read_text(encoding="utf-8"))
    plt.rcParams["font.size"] = 11  # legible on a phone
    figure, axes = plt.subplots(figsize=(7, 3), dpi=170)
    for variant, (label, color, style) in _LINES.items():
        values = found[variant]
        axes.plot(range(len(values)), values, style, color=color, label=label, marker="o", ms=4)
        axes.annotate(
            f"{label}: {values[-1]:.2f}",
            (len(values) - 1, values[-1]),
            xytext=(8, {"SPIN": 0, "FictitiousSPIN": 5, "SFT": -5}[variant]),
            textcoords="offset points",
            color=color,
            va="center",
        )
    axes.set_xlim(-0.2, 8.2)
    axes.set_ylim(-0.2, 3.5)
    axes.set_xticks(range(9))
    axes.set_xlabel("iterate")
    axes.set_ylabel("exact KL(data ‖ iterate), nats")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
