"""A world in a process of its own: for worlds that are slow, or that cannot be many in one.

    python graph_gpo.py --model ... --env envs/processes.py:Process:envs/sokoban.py:Sokoban

After the first colon comes the world as --env would have it. graph_gpo.py asks up to 64 of them at
a time. A process holds one world, and ends with it; what the world prints goes to stderr. An error
in a world is raised here as well, as is the end of its process, and ends one rollout."""

import contextlib
import importlib.util
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path


class Process:
    threads = 64

    def __init__(self, spec: str):
        pipe = subprocess.PIPE
        command = [sys.executable, __file__, spec]
        self.process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            start_new_session=True,  # Ctrl-C is not for it
        )
        told, self.demonstrates = self.ask("about")
        for name, value in told.items():
            setattr(self, name, value)

    def __getattr__(self, name: str):
        if name == "demonstrate" and self.__dict__.get("demonstrates"):
            return lambda rng: self.ask("demonstrate", rng.getrandbits(60))
        raise AttributeError(name)

    def ask(self, call: str, *values):
        """What the world answers to a call of one of its methods."""
        try:
            pickle.dump((call, values), self.process.stdin)
            self.process.stdin.flush()
            error, answer = pickle.load(self.process.stdout)
        except (OSError, EOFError):
            raise RuntimeError("the process of the world has ended") from None
        if error:
            raise RuntimeError(error)
        return answer

    def reset(self, seed: int = 0, options: dict | None = None) -> tuple[str, dict]:
        return self.ask("reset", seed, options)

    def step(self, action: str) -> tuple:
        return self.ask("step", action)

    def __del__(self):
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with what the world has started
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        self.process.wait()


# ------------------------------------------------------------------------- in the process itself
def make(spec: str):
    """FILE.py:NAME[:TEXT] -> a world. As the scripts' load_named; these would import torch."""
    path, _, name = spec.partition(".py:")
    name, *text = name.split(":", 1)
    path = Path(f"{path}.py").resolve()
    sys.path.insert(0, str(path.parent))
    found = importlib.util.spec_from_file_location(f"file_{path.stem}", path)
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return getattr(module, name)(*text)


def serve(spec: str) -> None:
    """Answers calls from stdin on stdout, until stdin ends: (error, None) or (None, answer)."""
    calls, answers, world = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"), None
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the world, and what it starts, have others
    os.dup2(2, 1)
    while True:
        try:
            call, values = pickle.load(calls)
        except EOFError:
            return
        try:
            world = world or make(spec)
            if call == "about":
                told = {n: getattr(world, n) for n in ("instruction", "words") if hasattr(world, n)}
                answer = told, hasattr(world, "demonstrate")
            elif call == "demonstrate":
                answer = world.demonstrate(random.Random(*values))
            else:
                answer = getattr(world, call)(*values)
            message = pickle.dumps((None, answer))
        except (Exception, SystemExit) as error:  # noqa: BLE001 (worlds of users fail in any way)
            message = pickle.dumps((f"{type(error).__name__}: {error}", None))
        answers.write(message)
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
