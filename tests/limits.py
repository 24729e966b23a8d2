"""Prints how long each script is: its lines, and its Python tokens without comments and line ends.

python tests/limits.py"""

import io
import tokenize
from pathlib import Path

LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}

for name in ("tree_grpo.py", "treerl.py", "graph_gpo.py"):
    source = (Path(__file__).parents[1] / name).read_bytes()
    tokens = [token.type for token in tokenize.tokenize(io.BytesIO(source).readline)]
    count = sum(kind not in LAYOUT for kind in tokens)
    print(f"{name}: {len(source.splitlines()):,} lines, {count:,} tokens")
