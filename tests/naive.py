"""What the engine of the three scripts computes, in the plainest way: read this before `Lanes` and
`Packed`.

A tree of tokens is a set of paths from the root to a leaf, and all that is defined is defined on
paths. Here each token is drawn by a forward of its whole path, and each leaf is trained on by a
forward of its own: nothing is kept, nothing is shared, nothing is batched. The scripts give the
same numbers, and the tests compare the two."""

import torch


def tokens_of(path) -> list[int]:
    return [token for node in path for token in node.tokens]


def draw(logits, temperature: float, top_p: float, generator) -> int:
    """A token from logits (V,): temperature first (0: the largest), then the likeliest that
    together reach top_p."""
    if temperature == 0:
        return int(logits.argmax())
    probs = (logits / temperature).softmax(-1)
    ranked, order = probs.sort(descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked  # the likelier tokens' share
    ranked[before >= top_p] = 0
    return int(order[torch.multinomial(ranked, 1, generator=generator)])


@torch.no_grad()
def sample(
    model, nodes, limits, stop, eos, generator, temperature, top_p, counts, keep=True
) -> None:
    """Continue the path of each (new, empty) node until a token of eos, stop(tokens), or its limit.
    keep is for the scripts' own, which may be exchanged for this one: there is nothing to keep."""
    for node, limit in zip(nodes, limits):
        over = False
        while not over:
            ids = torch.tensor([tokens_of(node.path())], device=model.device)
            logits = model(ids, use_cache=False).logits[0, -1]
            logps = logits.log_softmax(-1)  # at temperature 1, whatever is drawn from
            token = draw(logits, temperature, top_p, generator)
            node.tokens.append(token)
            node.logps.append(float(logps[token]))
            counts["generated_tokens"] += 1
            counts["entropy"] -= float((logps.exp() * logps).sum())
            over = token in eos or len(node.tokens) >= limit or stop(node.tokens)


def path_logps(model, path) -> torch.Tensor:
    """Log-probs of the drawn tokens of a path, root to leaf, by a forward of that path alone. Of a
    node those are the first len(node.logps); a prompt and an observation are not drawn."""
    ids = torch.tensor([tokens_of(path)], device=model.device)
    drawn = [i < len(node.logps) for node in path for i in range(len(node.tokens))]
    drawn = torch.tensor(drawn, device=model.device)
    logps = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, ids[0, 1:, None])[:, 0][drawn[1:]]


def loss(model, groups, old_logps, ref_logps, clip_low: float, clip_high: float, kl_coef: float):
    """Tree-GRPO's Eq. 8, to be minimised, leaf by leaf. old_logps, ref_logps: functions of a leaf's
    log-probs and its path. An advantage is one number, or one for each drawn token."""
    total = 0.0
    for group in groups:
        for leaf, advantages in zip(group.leaves, group.advantages.to(model.device)):
            path = leaf.path()
            logp = path_logps(model, path)
            A = advantages[: len(logp)]
            ratio = (logp - old_logps(logp, path)).exp()
            clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
            gap = ref_logps(logp, path) - logp
            kl = gap.exp() - gap - 1
            gain = torch.minimum(ratio * A, clipped * A) - kl_coef * kl
            total = total - group.weight * gain.mean()
    return total
