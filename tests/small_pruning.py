"""What the tests of structured pruning share: a model whose blocks do something, samples, and what may die in it."""

from pathlib import Path

import numpy as np
import torch

from packlight.families.whisper import tiny
from packlight.loading import load
from packlight.model import Model
from packlight.serve import Served

ENCODER, DECODER = "model.encoder.layers", "model.decoder.layers"


def fresh(folder: Path, heads: int = 4) -> Model:
    """A random model with more heads, with weights large enough that its blocks do something."""
    model = load(str(folder))
    values = {"vocab_size": 153, "encoder_attention_heads": heads, "decoder_attention_heads": heads}
    made = tiny(seed=1, max_source_positions=100, **values)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(2)
        for name, p in made.named_parameters():
            if p.dim() == 2 and "layers" in name:
                p.normal_(std=0.5 if "encoder_attn" in name else 0.15, generator=draw)
            elif name.endswith("bias"):
                p.normal_(std=0.3, generator=draw)
    made.generation_config = model.module.generation_config
    model.module = made
    return model


def batches(count: int = 3, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    prompt = torch.tensor([[151, 152]])
    return [
        {
            "input_features": torch.randn(1, 80, 200, generator=draw),
            "decoder_input_ids": torch.cat([prompt, torch.randint(0, 150, (1, 30), generator=draw)], 1),
            "first": torch.tensor(1),
        }
        for _ in range(count)
    ]


def logits(model: Model, given: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.family.run(model.module, b) for b in given])


def divergence(model: Model, original: torch.Tensor, given: list[dict[str, torch.Tensor]]) -> float:
    now, then = torch.log_softmax(logits(model, given), -1), torch.log_softmax(original, -1)
    return float((then.exp() * (then - now)).sum(-1).mean())


def kill_heads_(module: torch.nn.Module, path: str, dead: tuple[int, ...], size: int = 16) -> None:
    """Heads whose output nobody reads."""
    with torch.no_grad():
        for h in dead:
            module.get_submodule(f"{path}.out_proj").weight[:, h * size : (h + 1) * size] = 0


def kill_units_(module: torch.nn.Module, path: str, dead: range) -> None:
    with torch.no_grad():
        module.get_submodule(f"{path}.fc2").weight[:, dead.start : dead.stop] = 0


def long_batches() -> list[dict[str, torch.Tensor]]:
    return [{**b, "input_features": torch.randn(1, 80, 3000)} for b in batches(2)]


def largest_difference(model: Model, served: Served) -> float:
    """Between the first outputs of a bundle's graphs and of PyTorch's, on the graphs' example inputs."""
    found = []
    for graph in model.family.graphs(model.module):
        with torch.no_grad():
            theirs = graph.module(*graph.args)[0]
        feed = {n: a.numpy() for n, a in zip(graph.inputs, graph.args, strict=True)}
        ours = served.parts[graph.name].run(feed)[graph.outputs[0]].numpy()
        found.append(float(np.abs(ours - theirs.numpy()).max()))
    return max(found)
