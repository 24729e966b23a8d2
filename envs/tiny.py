"""The tiny model that a script trains if no --model is given, so small that a CPU trains it in a
minute or two: built here, and warm-started on the demonstrations of the task.

tree_grpo, treerl and graph_gpo do this for the script of that name, which hands itself over as
`script`, for its nodes and for its `update`."""

import dataclasses
import random
from collections import Counter

import torch
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer


def tiny_model(words, device: torch.device, seed: int):
    """A Qwen2 of 0.5M parameters with random weights, and a Qwen tokenizer of single bytes and the
    given words."""
    alphabet = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer({token: i for i, token in enumerate(alphabet)}, [])
    tokenizer.add_tokens(list(words))
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    room = {"vocab_size": len(tokenizer), "max_position_embeddings": 32768, "eos_token_id": 0}
    # At the usual initializer_range, 0.02, so small a model does not leave its plateau.
    config = Qwen2Config(**size, **heads, **room, initializer_range=0.08)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    model.set_attn_implementation("token_tree")
    return model.to(device).eval(), tokenizer


def imitate(script, model, leaves: list, batch: int, args, lr: float = 3e-3) -> None:
    """Supervised steps on demonstrations, so many paths to a leaf in each: a policy gradient with
    advantage 1 is imitation."""
    args = dataclasses.replace(args, kl_coef=0.0, epochs=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    parts = script.batches(leaves, batch)
    for step, part in enumerate(tqdm(parts, "warm start", unit="step")):
        slope = min(1, (step + 1) / 20, (1 - step / len(parts)) / 0.3)
        optimizer.param_groups[0]["lr"] = lr * slope
        one = torch.ones(1, 1)
        own = part[script.RANK :: script.RANKS]
        groups = [script.Group(leaf.path()[0], [leaf], one, 1 / len(part)) for leaf in own]
        script.update(model, None, optimizer, groups, args)


def demonstrated(task, args):
    """The items that are demonstrated, 32 for each supervised step, each with the random numbers
    of its demonstration."""
    rng = random.Random(f"{args.seed}/demonstrations")
    for _ in range(32 * args.sft_steps):
        yield rng.choice(task.training) if task.training else task.draw(rng), rng


def tree_grpo(script, args, task, device: torch.device):
    """On episodes: the turns of task.demonstrate(question, rng)."""
    script.quiet_transformers()
    model, tokenizer = tiny_model(task.words, device, args.seed)
    agent, leaves = script.Agent(model, tokenizer, args, task), []
    for question, rng in demonstrated(task, args):
        node = agent.root(question)
        for text, found in task.demonstrate(question, rng):
            tokens = script.encode(tokenizer, text)
            node = script.Node(node, tokens, [0.0] * len(tokens))
            if found:
                node.tokens += agent.observation(found)
        leaves.append(node)
    imitate(script, model, leaves, 32, args)
    return model, tokenizer


def treerl(script, args, task, device: torch.device):
    """On solutions: task.demonstrate(problem, rng)."""
    script.quiet_transformers()
    model, tokenizer = tiny_model(task.words, device, args.seed)
    solver, leaves = script.Solver(model, tokenizer, args, task), []
    for problem, rng in demonstrated(task, args):
        tokens = script.encode(tokenizer, task.demonstrate(problem, rng))
        tokens.append(tokenizer.eos_token_id)
        leaves.append(script.Node(solver.root(problem), tokens, [0.0] * len(tokens)))
    imitate(script, model, leaves, 32, args)
    return model, tokenizer


def shown_steps(script, model, tokenizer, args, world, count: int) -> list:
    """`count` steps, in random order, of episodes that env.demonstrate(rng) plays: nodes below
    their prompts. A chat model is shown how actions are marked."""
    rng = random.Random(f"{args.seed}/demonstrations")
    form = "<action>{}</action>" if tokenizer.chat_template else "{}"

    class Demonstrator(script.Player):
        def act(self, live, *_):
            nodes = [script.Node(self.prompt(task, k)) for task, k in live]
            for node, (task, k) in zip(nodes, live):
                text = form.format(task.envs[k].demonstrate(rng))
                node.tokens = [*self.encode(text), self.tokenizer.eos_token_id]
                node.logps = [0.0] * len(node.tokens)
            return nodes

    player, leaves = Demonstrator(model, tokenizer, args, world), []
    while len(leaves) < count:
        seeds = [rng.getrandbits(32) for _ in range(64)]
        tasks = player.play(seeds, 1, None, 1.0, Counter())
        leaves += [step.node for task in tasks for step in task.steps]
    return rng.sample(leaves, count)


def graph_gpo(script, args, world, device: torch.device):
    """On single steps: env.demonstrate(rng)."""
    script.quiet_transformers()
    model, tokenizer = tiny_model(world().words, device, args.seed)
    leaves = shown_steps(script, model, tokenizer, args, world, 128 * args.sft_steps)
    imitate(script, model, leaves, 128, args)
    return model, tokenizer
