"""torchrun record_ranks.py FOLDER SCRIPT ARGUMENTS...: a run of a script, of which each rank leaves
in FOLDER what it trained on in each step, as STEP-RANK.pkl. With FAIL=RANK in the environment this
rank fails in the second step."""

import importlib
import os
import pickle
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
folder, name, *arguments = sys.argv[1:]
script = importlib.import_module(name)
plain_train, plain_update = script.train, script.update
folder = Path(folder).resolve()


def update(model, reference, optimizer, groups, args):
    step = len(list(folder.glob(f"*-{script.RANK}.pkl")))
    if step == 1 and os.environ.get("FAIL") == str(script.RANK):
        raise torch.OutOfMemoryError("no memory, says the test")
    (folder / f"{step}-{script.RANK}.pkl").write_bytes(pickle.dumps(groups))
    return plain_update(model, reference, optimizer, groups, args)


def train(*state):
    with mock.patch.object(script, "update", update):  # not that of the warm start
        return plain_train(*state)


script.train = train
script.cli(arguments)
