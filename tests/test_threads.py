"""The tiny model runs on one thread, unless the user says otherwise: then its figures do not depend on the machine's
number of cores, and other work beside it does not slow it down by more than its share."""

import pytest
import torch

import graph_gpo
import tree_grpo
import treerl


class Threads(Exception):
    """Raised with the number that a script sets."""


@pytest.fixture(params=[tree_grpo, treerl, graph_gpo], ids=lambda script: script.__name__)
def script(request, monkeypatch):
    def set_num_threads(n):
        raise Threads(n)

    monkeypatch.setattr(torch, "set_num_threads", set_num_threads)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return request.param


def test_the_tiny_model_runs_on_one_thread(script):
    with pytest.raises(Threads, match="^1$"):
        script.main(["--device", "cpu"])


def test_the_user_may_set_another_number(script, monkeypatch, tmp_path):
    (tmp_path / "file").touch()  # the folder is refused after threads are set
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with pytest.raises(script.BadInput, match="--out"):
        script.main(["--device", "cpu", "--out", str(tmp_path)])


def test_a_users_model_keeps_torchs_threads(script, tmp_path):
    with pytest.raises(script.BadInput, match="--model"):
        script.main(["--device", "cpu", "--model", str(tmp_path)])
