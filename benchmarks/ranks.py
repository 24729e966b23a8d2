"""What several processes cost: how long a rank waits for the others, and the all-reduce of the gradients.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/ranks.py tree_grpo --steps 20
    torchrun --nproc-per-node 2 benchmarks/ranks.py --numbers 494000000     the all-reduce alone, of so many numbers

Seconds per training step, of rank 0 and of the others' mean: all, sampling and credit, waiting (for the last rank to
reach a point where all have to be), exchanging (what comes after that: gradients, and the counts of a step).
"""

import os
import sys
import tempfile
import time
from collections import Counter
from unittest import mock

import common
import torch
from torch import distributed

SPENT = Counter()


def timed(script):
    """script.together, which notes how long it waits and exchanges."""
    plain = script.together

    def together(collective: str, *values) -> None:
        began = time.perf_counter()
        plain("barrier")
        waited = time.perf_counter()
        plain(collective, *values)
        SPENT["waiting"] += waited - began
        SPENT["exchanging"] += time.perf_counter() - waited

    return together


def all_reduce_alone(numbers: int) -> None:
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    flat, seconds = torch.zeros(numbers), []
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        flat = flat.cuda()
    for _ in range(5):
        distributed.barrier()
        began = time.perf_counter()
        distributed.all_reduce(flat)
        flat[0].item()
        seconds.append(time.perf_counter() - began)
    if distributed.get_rank() == 0:
        print(f"{numbers:,} numbers, {distributed.get_world_size()} ranks: {min(seconds):.3f} s")
    distributed.destroy_process_group()


def run(script, arguments: list[str]) -> None:
    plain_log = script.open_log

    def open_log(args, size: int):
        log = plain_log(args, size)

        def log_all(event: str, step: int, row: dict) -> None:
            log(event, step, row)
            if event == "train":
                spent = {"step": row["seconds"], "sampling": row["seconds_sampling"], **SPENT}
                first = script.over_ranks(spent if script.RANK == 0 else {})
                rest = script.over_ranks(spent if script.RANK else {})
                rows.append((first, Counter({k: v / max(1, script.RANKS - 1) for k, v in rest.items()})))
            SPENT.clear()

        return log_all

    rows = []
    with mock.patch.multiple(script, open_log=open_log, together=timed(script)):
        script.main(arguments)
    if script.RANK == 0:
        names = ("step", "sampling", "waiting", "exchanging")
        cells = [
            (who, *(f"{sum(row[i][name] for row in rows) / len(rows):.3f}" for name in names))
            for i, who in enumerate(("rank 0", "the others")[: script.RANKS])
        ]
        print(common.table(["seconds a step", *names], cells))


if __name__ == "__main__":
    if sys.argv[1] == "--numbers":
        all_reduce_alone(int(sys.argv[2]))
    else:
        name, *arguments = sys.argv[1:]
        with tempfile.TemporaryDirectory() as folder:
            run(common.SCRIPTS[name], [*arguments, f"--out={folder}/out"])
