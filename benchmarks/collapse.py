"""What a collapse looks like: tree_grpo.py's default run, and the same with 12 times its learning rate.

    OMP_NUM_THREADS=1 python benchmarks/collapse.py            (6 minutes)

Each run of results/collapse.jsonl is kept: to repeat them, move that file away first. Prints the table of
results/collapse.md and draws results/collapse.png.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import default_run
from learning import RESULTS, read_rows, table

import tree_grpo

RUNS = {"lr 5e-4, seed 0": [], **{f"lr 6e-3, seed {seed}": ["--lr=0.006", f"--seed={seed}"] for seed in (0, 1, 2)}}
COLUMNS = {"success": "success in training", "entropy": "entropy", "kl": "KL", "grad_norm": "gradient norm"}
SHOWN = (1, 5, 10, 15, 20, 30, 60)

def run(name: str) -> dict:
    """Name, each of COLUMNS over the steps, and held-out success at T = 1 (pairs of step and share)."""
    rows, _ = default_run.run(tree_grpo, *RUNS[name], "--eval-every", 10, "--device", "cpu")
    steps = [row for row in rows if row["event"] == "train"]
    return {"run": name, **{column: [round(row[column], 4) for row in steps] for column in COLUMNS},
            "held_out": [(row["step"], row["success"]) for row in rows if row["event"] == "eval"]}

def read_results() -> dict[str, dict]:
    return {row["run"]: row for row in read_rows("collapse.jsonl")}

def report() -> str:
    """The runs at the steps SHOWN."""
    rows = []
    for name, found in read_results().items():
        held_out = {step: f"{success:.3f}" for step, success in found["held_out"]}
        for step in SHOWN:
            success, entropy, kl, norm = (found[column][step - 1] for column in COLUMNS)
            rows.append([name, str(step), f"{success:.2f}", f"{entropy:.3f}", f"{kl:.2f}", f"{norm:.2f}",
                         held_out.get(step, "")])
    return table(("run", "step", *COLUMNS.values(), "held-out success"), rows)

def figure() -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    picture, axes = plt.subplots(2, 2, figsize=(10, 5.6), sharex=True, layout="constrained")
    units = {"success": "share of leaves", "entropy": "nats per token", "kl": "nats per token", "grad_norm": ""}
    for axis, (column, title) in zip(axes.flat, COLUMNS.items()):
        for name, found in read_results().items():
            axis.plot(range(1, 1 + len(found[column])), found[column], label=name,
                      color="black" if "5e-4" in name else None, linewidth=1.8 if "5e-4" in name else 1.2)
        axis.set_title(title)
        axis.set_ylabel(units[column])
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[0, 1].legend()
    picture.savefig(RESULTS / "collapse.png", dpi=100)

def main() -> None:
    for name in [name for name in RUNS if name not in read_results()]:
        with open(RESULTS / "collapse.jsonl", "a") as file:
            file.write(json.dumps(run(name)) + "\n")
    print(report())
    figure()

if __name__ == "__main__":
    main()
