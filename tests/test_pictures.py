"""Pictures of trees and graphs, as Mermaid."""

import re
from types import SimpleNamespace

import pictures
import torch

import graph_gpo
import tree_grpo
import treerl
from graph_gpo import SUCCESS, Transition


def test_tree_as_mermaid():
    # n0 - n1 - n2 is tree 1, n0 - n3 is tree 2. Green or red by the sign of a value, white without.
    root = tree_grpo.Node()
    first = tree_grpo.Node(root)
    leaf = tree_grpo.Node(first)
    second = tree_grpo.Node(root, tree=1)
    rows = [(root, "Who?", "", None), (first, "one\n  two", "", 0.5)]
    rows += [(leaf, "three", "R = 1", -1.0), (second, "<b>", "R = 0", 0.0)]
    drawn = pictures.diagram(rows)
    assert drawn.startswith("```mermaid\nflowchart TD\n    n0[")
    assert drawn.endswith("\n```\n")
    shown = re.findall(r"\[.*\]|fill:#\w+|n\d -->.*", drawn)
    assert shown == [
        *['["Who?"]', "fill:#fff", '["one two"]', "fill:#cfc", "n0 -->|tree 1| n1"],
        *['["three<br>R = 1"]', "fill:#fcc", "n1 --> n2"],
        *['["#60;b#62;<br>R = 0"]', "fill:#eee", "n0 -->|tree 2| n3"],
    ]


def test_trees_of_a_question_whose_rewards_differ():
    # A question with equal rewards, and one with two trees: a trunk of two turns with a branch below
    # its first, and a lone leaf that is not trained on. The first turn's color is that of the mean
    # of its leaves' advantages, 0.5 and -1.5.
    same, root = tree_grpo.Node(), tree_grpo.Node()
    for _ in range(2):
        tree_grpo.Node(same, reward=1.0)
    turn = tree_grpo.Node(root)
    right, wrong = tree_grpo.Node(turn, reward=1.0), tree_grpo.Node(turn, reward=-0.25)
    lone = tree_grpo.Node(root, reward=0.2, tree=1)
    names = {turn: "search", right: "right", wrong: "wrong", lone: "lone"}
    question = SimpleNamespace(text="Who?")
    prompts = [(SimpleNamespace(text="Where?"), same), (question, root)]
    Group = tree_grpo.Group
    groups = [Group(same, same.children, torch.zeros(2, 1), 1.0)]
    groups.append(Group(root, [right, wrong], torch.tensor([[0.5], [-1.5]]), 1.0))
    agent = SimpleNamespace(text=names.get)
    drawn = pictures.tree_grpo(tree_grpo, agent, prompts, groups)
    shown = re.findall(r"\[.*\]|fill:#\w+|n\d -->.*", drawn)
    assert shown == [
        *['["Who?"]', "fill:#eee", '["search"]', "fill:#fcc", "n0 -->|tree 1| n1"],
        *['["right<br>R = 1, A = +0.50"]', "fill:#cfc", "n1 --> n2"],
        *['["wrong<br>R = -0.25, A = -1.50"]', "fill:#fcc", "n1 --> n3"],
        *['["lone<br>R = 0.2, not kept"]', "fill:#fff", "n0 -->|tree 2| n4"],
    ]


def test_segments_of_a_problem():
    # A trunk that was forked: of the leaves one is right, so V = 0.4, 0.4, 0.9, -0.1 from the root on.
    # R(s) = (V - V(root) + V - V(parent)) / sqrt(leaves): 0 for the trunk, and 1, -1 below it.
    root = treerl.Node()
    trunk = treerl.Node(root, [1])
    right = treerl.Node(trunk, [2], reward=0.9)
    treerl.Node(trunk, [3], reward=-0.1)
    problem = SimpleNamespace(text="1 + 1?")
    groups = [treerl.Group(root, [right], torch.ones(1, 2), 1.0)]
    args = treerl.Args(success=0.8)
    solver = SimpleNamespace(args=args, text=lambda tokens: f"segment {tokens[0]}")
    drawn = pictures.treerl(treerl, solver, [(problem, root)], groups)
    assert re.findall(r"\[.*\]|fill:#\w+", drawn) == [
        *['["1 + 1?"]', "fill:#eee", '["segment 1<br>R(s) = +0.00"]', "fill:#eee"],
        *['["segment 2<br>R(s) = +1.00, right"]', "fill:#cfc"],
        *['["segment 3<br>R(s) = -1.00, wrong, not kept"]', "fill:#fcc"],
    ]
    args.success = 0.9  # a reward has to be above it
    assert "right" not in pictures.treerl(treerl, solver, [(problem, root)], groups)


def draw_graph(monkeypatch, text, transitions, A, **how) -> str:
    """The picture of a task whose steps have the advantages A; its first rollout won."""
    steps = [graph_gpo.Step(t, graph_gpo.Node(), 0.0, True) for t in transitions]
    task = graph_gpo.Task(text, graph_gpo.Node(), [1.0, 0.0], [True, False], steps)
    monkeypatch.setattr(graph_gpo, "advantages", lambda task, args: torch.tensor(A))
    return pictures.graph_gpo(graph_gpo, [task], None, **how)


def test_graph_as_mermaid(monkeypatch):
    # d(m) = 1, d(s) = 2, and 3 for x, which has no way. Edges come by d(state) + d(next state):
    # m - G 1, s - m 3, s - x 5. The edge s - m was taken twice, with A = 1 and 0.5.
    ways = [("s", "to m", "m", 0), ("m", "to G", SUCCESS, 0), ("s", "to m", "m", 1)]
    graph = [Transition(*way) for way in [*ways, ("s", "to x", "x", 2)]]
    drawn = draw_graph(monkeypatch, "do it", graph, [1.0, 0.0, 0.5, -1.25])
    assert drawn.startswith("```mermaid\nflowchart TD\n    task[")
    assert drawn.endswith("\n```\n")
    assert re.findall(r"\[.*\]|fill:#\w+|stroke:#\w+|n\d -->.*", drawn) == [
        *['["Task: do it<br>3 of 3 edges"]', '["m<br>d = 1"]', "fill:#fff"],
        *['["SUCCESS<br>d = 0"]', "fill:#cfc", 'n0 -->|"to G, 1 x, A = +0.00"| n1'],
        *["stroke:#888", '["s<br>d = 2"]', "fill:#fff"],
        *['n2 -->|"to m, 2 x, A = +0.75"| n0', "stroke:#2a2", '["x<br>d = 3"]', "fill:#fff"],
        *['n2 -->|"to x, 1 x, A = -1.25"| n3', "stroke:#c22"],
    ]
    few = draw_graph(monkeypatch, "do it", graph, [0.0] * 4, most=2)  # those nearest to success
    assert "Task: do it<br>2 of 3 edges" in few
    assert few.count("-->") == 2
    assert '["x' not in few


def test_mermaid_of_strange_texts(monkeypatch):
    strange = '"A <b>|C|</b>"; #1 & [x] {y} `z` \\ --> (and\n\nwhy)?'
    escaped = (
        "#34;A #60;b#62;#124;C#124;#60;/b#62;#34;; #35;1 #38; #91;x#93; #123;y#125; #96;z#96; "
        "#92; --#62; (and why)?"
    )
    long = "x" * 300
    first = Transition(strange, strange, "SUCCESS", 0)
    graph = [first, Transition("SUCCESS", long, SUCCESS, 0, 0.5)]
    text = draw_graph(monkeypatch, strange, graph, [0.0, 0.0])
    assert f'["Task: {escaped}<br>' in text
    assert f'["{escaped}<br>d = 1.5"]' in text
    assert f'|"{escaped}, 1 x, A = +0.00"|' in text
    assert f'|"{long[:160]}, 1 x' in text
    assert text.count('["SUCCESS<br>') == 2  # a state of that name is no success
    assert text.count("#cfc") == 1

    # With control characters git and editors would take the file for a binary one.
    words = "".join(map(chr, range(40)))
    tree = pictures.diagram([(tree_grpo.Node(), words, "", None)])
    graph = draw_graph(monkeypatch, words, [Transition(words, words, SUCCESS, 0)], [0.0])
    for drawn in (tree, graph):
        assert "#0;" in drawn
        assert all(c >= " " for c in drawn.replace("\n", ""))
