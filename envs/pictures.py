"""The picture that a script writes after each training step, a Mermaid diagram, which GitHub and
editors draw. tree_grpo, treerl and graph_gpo draw for the script of that name, which hands itself
over as `script`."""


def shown(text: str) -> str:
    """A text as part of a label."""
    words = " ".join(text.split())[:160]
    return "".join(f"#{ord(c)};" if c in '#"<>&`[]{}|\\' or c < " " else c for c in words)


def diagram(rows: list[tuple]) -> str:
    """A tree, from node, text, note and value of each of its nodes, parents first: green or red by
    the value's sign, white without a value."""
    lines, number = ["```mermaid", "flowchart TD"], {}
    for i, (node, text, note, value) in enumerate(rows):
        number[node], color = i, "fff"
        if value is not None:
            color = "cfc" if value > 1e-6 else "fcc" if value < -1e-6 else "eee"
        label = "<br>".join(filter(None, [shown(text), note]))
        lines += [f'    n{i}["{label}"]', f"    style n{i} fill:#{color},color:#000"]
        if i > 0:
            trunk = f"|tree {node.tree + 1}|" if number[node.parent] == 0 else ""
            lines.append(f"    n{number[node.parent]} -->{trunk} n{i}")
    return "\n".join([*lines, "```", ""])


def tree_grpo(script, agent, prompts: list[tuple], groups: list) -> str:
    """The trees of a prompt, whose rewards differ if possible, in green or red by the mean
    advantage of the leaves below a node."""
    group = max(groups, key=lambda group: len({leaf.reward for leaf in group.leaves}) > 1)
    A = dict(zip(group.leaves, map(float, group.advantages)))
    rows = [(root, question.text, "", 0.0) for question, root in prompts if root is group.root]
    for node in group.root.below()[1:]:
        kept, note = [A[leaf] for leaf in node.leaves() if leaf in A], ""
        if node.reward is not None:
            note = f"R = {node.reward:g}, " + (f"A = {A[node]:+.2f}" if kept else "not kept")
        rows.append((node, agent.text(node), note, sum(kept) if kept else None))
    return diagram(rows)


def treerl(script, solver, prompts: list[tuple], groups: list) -> str:
    """The trees of a prompt, whose rewards differ if possible, their segments in green or red by
    the sign of R(s)."""
    group = max(groups, key=lambda group: len({leaf.reward for leaf in group.root.leaves()}) > 1)
    R = script.process_rewards(group.root, solver.args.method)
    name = "A" if solver.args.method == "chainrl" else "R(s)"
    rows = [(root, problem.text, "", R[root]) for problem, root in prompts if root is group.root]
    for node in group.root.below()[1:]:
        note = f"{name} = {R[node]:+.2f}"
        if not node.children:
            note += ", right" if node.reward > solver.args.success else ", wrong"
            note += "" if node in group.leaves else ", not kept"
        rows.append((node, solver.text(node.tokens), note, R[node]))
    return diagram(rows)


def graph_gpo(script, tasks: list, args, most: int = 50) -> str:
    """The smallest graph of a task with success and failure, if there is one, as a Mermaid diagram:
    states with their distance to success; edges with the action, how often it was taken and its
    mean advantage, green or red by its sign. Of more than `most` edges those nearest to success."""
    task = min(tasks, key=lambda task: (len(set(task.won)) < 2, len(task.root.children)))
    transitions, edges = [step.transition for step in task.steps], {}
    for t, A in zip(transitions, script.advantages(task, args).tolist()):
        edges.setdefault((t.state, t.action, t.next_state), []).append(A)
    d, number = script.goal_distances(transitions), {}
    nearest = sorted(edges, key=lambda edge: d[edge[2]] + d[edge[0]])[:most]
    lines = ["```mermaid", "flowchart TD"]
    title = f"Task: {shown(task.text)}<br>{len(nearest)} of {len(edges)} edges"
    lines.append(f'    task["{title}"]')
    for i, (before, action, after) in enumerate(nearest):
        for state in (before, after):
            if state not in number:
                number[state] = n = len(number)
                name, color = shown(str(state)), "fff"
                if state is script.SUCCESS:
                    name, color = "SUCCESS", "cfc"
                lines.append(f'    n{n}["{name}<br>d = {d[state]:g}"]')
                lines.append(f"    style n{n} fill:#{color},color:#000")
        A = edges[before, action, after]
        mean = round(sum(A) / len(A), 2) + 0.0  # + 0.0: no -0.00
        label = f"{shown(action)}, {len(A)} x, A = {mean:+.2f}"
        lines.append(f'    n{number[before]} -->|"{label}"| n{number[after]}')
        color = "2a2" if mean > 0 else "c22" if mean < 0 else "888"
        lines.append(f"    linkStyle {i} stroke:#{color}")
    return "\n".join([*lines, "```", ""])
