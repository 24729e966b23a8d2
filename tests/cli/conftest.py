"""Fixtures of the tests of the scripts as seen from outside: what takes long is made once."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

pytest.register_assert_rewrite("cli.outside")
from cli.outside import ENVIRONMENT, FORKING, SCRIPTS, TRACKIO, make_bad_runs, make_files


def pytest_generate_tests(metafunc):
    """A test is run with each script; those in a file about some of them, which it names in SCRIPT,
    with these."""
    if "script" in metafunc.fixturenames:
        own = getattr(metafunc.module, "SCRIPT", "")
        names = own.split() or list(SCRIPTS)
        metafunc.parametrize("script", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def script(request):
    return SCRIPTS[request.param]


@pytest.fixture(scope="session")
def fork(tmp_path_factory):
    """fork(script, folder, line) runs the script there with the arguments in `line`."""
    stubs = tmp_path_factory.mktemp("stubs")
    (stubs / "trackio.py").write_text(TRACKIO)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = {**ENVIRONMENT, "PYTHONPATH": str(stubs)}
    with subprocess.Popen([sys.executable, "-c", FORKING], env=env, **pipes) as parent:

        def run(script, folder, line):
            output = tmp_path_factory.mktemp("output")
            message = [str(script.path), str(folder), str(output), line.split()]
            parent.stdin.write(json.dumps(message) + "\n")
            parent.stdin.flush()
            status = int(parent.stdout.readline())
            stdout, stderr = ((output / name).read_text() for name in ("stdout", "stderr"))
            return subprocess.CompletedProcess(line, status, stdout, stderr)

        yield run
        parent.stdin.close()


@dataclass
class Run:
    """run(line) is the finished process of the script in a folder, where what it writes goes to."""

    script: object
    folder: object
    fork: object

    def __call__(self, line: str):
        return self.fork(self.script, self.folder, line)

    def well(self, line: str):
        result = self(line)
        assert result.returncode == 0, result.stderr[-3000:]
        return result


@pytest.fixture
def run(script, fork, tmp_path):
    return Run(script, tmp_path, fork)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture(scope="session")
def whole(script, fork, tmp_path_factory):
    """The folder of a run of five steps of the built-in task that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    result = Run(script, folder, fork).well(f"{script.small} {script.five} --out out")
    (folder / "stdout").write_text(result.stdout)
    (folder / "stderr").write_text(result.stderr)
    return folder / "out"


@pytest.fixture(scope="session")
def runs(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_bad_runs(folder, whole)
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    return folder
