"""Learning curves of runs: `python benchmarks/plot.py RUN... [--out FILE.png]`, where a RUN is the
--out of a script: held-out success over steps, and the mean reward in training."""

from pathlib import Path

import common
from common import pyplot, read_rows

CURVES = {  # what is drawn -> the event whose rows have it
    "success": "eval",
    "greedy_success": "eval",
    "reward": "train",
}


def draw(runs: list[Path], file: Path) -> None:
    figure, axes = pyplot().subplots(1, len(CURVES), figsize=(13, 4), layout="constrained")
    for run in runs:
        rows = read_rows((run / "metrics.jsonl").resolve())
        for axis, (name, event) in zip(axes, CURVES.items()):
            shown = [row for row in rows if row["event"] == event]
            steps = [row["step"] for row in shown]
            values = [row[name] for row in shown]
            axis.plot(steps, values, marker="o" if event == "eval" else "", label=str(run))
    for axis, title in zip(axes, ("held-out success at T = 1", "greedy", "reward in training")):
        axis.set(title=title, xlabel="training step")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("runs.png"), metavar="FILE.png")
    options = parser.parse_args()
    for run in options.runs:
        if not (run / "metrics.jsonl").exists():
            parser.error(f"{run} has no metrics.jsonl")
    draw(options.runs, options.out)


if __name__ == "__main__":
    main()
