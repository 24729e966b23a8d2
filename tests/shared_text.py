"""Prints what several of the three scripts hold as the same text, for ruff: `python tests/shared_text.py | ruff format -`."""

from test_shared_text import SCRIPTS, definitions

texts = [definitions(path.read_text(encoding="utf-8")) for path in SCRIPTS]
shared = {name: text for found in texts for name, text in found.items() if sum(name in other for other in texts) > 1}
functions = [text for text in shared.values() if text.startswith(("def ", "class ", "@"))]
print("\n\n\n".join(functions))
