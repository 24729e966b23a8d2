"""Folders and checkpoints of runs, as far as no run is needed (runs: cli/test_all_scripts.py)."""

import os
import time

import pytest
import torch


def test_two_runs_of_one_second_get_two_folders(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260102-030405")
    for process in (7, 8):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        script.make_folder(script.Args())
    names = [f"{script.__name__}-20260102-030405-{process}" for process in (7, 8)]
    assert sorted(os.listdir("runs")) == names


def test_a_folder_is_used_if_it_is_empty_or_the_runs_own(script, tmp_path):
    args = script.Args(out=str(tmp_path))
    assert script.make_folder(args) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(script.BadInput, match=f"^--out {tmp_path}: .*--resume"):
        script.make_folder(args)
    args.resume = str(tmp_path)
    assert script.make_folder(args) == tmp_path


# -------------------------------------------------------------------------------- resumed arguments
@pytest.fixture
def stopped(script, tmp_path):
    """The folder of a run with two checkpoints, of which the newer counts."""
    for step, lr in ((9, 1.0), (10, 0.25)):
        folder = tmp_path / f"checkpoint-{step:06d}"
        folder.mkdir()
        args = vars(script.Args(lr=lr, seed=3, kl_coef=0.5, out="elsewhere"))
        state = {"script": f"{script.__name__}.py", "step": step, "args": args}
        torch.save(state, folder / "state.pt")
    return tmp_path


def test_arguments_given_with_resume_replace_the_runs_own(script, stopped):
    line = f"--resume {stopped} --kl-coef 0.001 --steps 7 --save-every 2 --warmup 0".split()
    args, given = script.parse_args(script.Args, line)
    found, weights, state = script.resume_run(args, given)
    assert weights == str(stopped / "checkpoint-000010") and state["step"] == 10
    assert (found.kl_coef, found.steps, found.save_every, found.warmup) == (0.001, 7, 2, 0)
    assert (found.lr, found.seed) == (0.25, 3)  # the run's own
    assert found.out == found.resume == str(stopped)  # wherever it was before


def test_a_default_can_be_given_to_a_resumed_run(script, stopped):
    # What counts is that it is given, not that it differs from the default.
    default = script.Args()
    line = f"--resume {stopped} --kl-coef {default.kl_coef} --seed {default.seed}".split()
    found, _, _ = script.resume_run(*script.parse_args(script.Args, line))
    assert (found.kl_coef, found.seed, found.lr) == (default.kl_coef, default.seed, 0.25)


@pytest.mark.parametrize("flag", ["model", "method", "out", "eval_prompts", "skip_bad_records", "env"])
def test_what_a_resumed_run_keeps(script, stopped, flag):
    """Other held-out questions would be some that it was trained on, for example."""
    with pytest.raises(script.BadInput, match=f"--resume: leave out {flag};"):
        script.resume_run(script.Args(resume=str(stopped)), {flag, "lr", "resume"})
