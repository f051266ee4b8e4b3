"""Cases for `proxytune verify adamw` and `proxytune verify prodigy`, from torch and prodigyopt: python tests/golden/optimizers.py

A case is tests/golden/OPTIMIZER/CASE/: model/config.json has the class and its arguments (what is left out has the
class's default) with `max_grad_norm`, to which gradients are clipped before each step; reference.safetensors has
`input.parameters.NAME` before the first step, `input.gradients.NAME` of every step before clipping, `input.learning_rate`
of every step, and `output.NAME`, the parameters after every step.
"""
import json
import math
from pathlib import Path

import torch
from prodigyopt import Prodigy
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
STEPS = 50
CLASSES = {"AdamW": torch.optim.AdamW, "Prodigy": Prodigy}

constant = lambda rate: lambda step: rate
warming = lambda rate, steps: lambda step: rate * min(1.0, step / steps)
cosine = lambda rate, warmup: lambda step: rate * (
    step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))
)

# The arguments of diffusers' train_dreambooth_lora_*.py are those of its command line's defaults.
CASES = {
    ("AdamW", "torch-defaults"): ({}, constant(1e-2), None),
    ("AdamW", "diffusers"): (dict(betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8), constant(4e-4), 1.0),
    ("AdamW", "warm-up-and-cosine"): (dict(betas=(0.9, 0.95), weight_decay=0.05, eps=1e-6), cosine(3e-2, 5), 0.5),
    ("Prodigy", "library-defaults"): ({}, constant(1.0), None),
    ("Prodigy", "diffusers"): (
        dict(betas=(0.9, 0.999), beta3=None, weight_decay=1e-4, eps=1e-8, decouple=True, use_bias_correction=True,
             safeguard_warmup=True),
        constant(1.0),
        1.0,
    ),
    ("Prodigy", "coupled-decay-and-warm-up"): (
        dict(betas=(0.8, 0.99), beta3=0.97, weight_decay=0.02, eps=1e-7, decouple=False, use_bias_correction=True,
             safeguard_warmup=False, d0=1e-5, d_coef=2.0, growth_rate=1.5),
        warming(0.7, 4),
        2.0,
    ),
}


def parameters(generator):
    """An adapter's pair, whose B starts at zero, a kernel and a bias."""
    shapes = {"lora_A.weight": (3, 5), "lora_B.weight": (4, 3), "kernel": (2, 3, 2, 2), "bias": (7,)}
    draw = lambda shape: torch.randn(*shape, generator=generator)
    values = {name: draw(shape) for name, shape in shapes.items()}
    values["lora_B.weight"].zero_()
    return values


def make(kind, case, arguments, rate, limit):
    generator = torch.Generator().manual_seed(5)
    start, wanted = parameters(generator), parameters(generator)
    trained = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = CLASSES[kind](trained.values(), lr=rate(0) or 1.0, **arguments)
    rates, gradients, after = [], {name: [] for name in start}, {name: [] for name in start}
    for step in range(STEPS):
        rates.append(rate(step))
        for name, parameter in trained.items():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            # of (p − wanted)⁴ / 4 + (p − wanted)² / 2, so that sizes vary over the steps
            apart = parameter.detach() - wanted[name]
            parameter.grad = apart**3 + apart + noise
            gradients[name].append(parameter.grad.clone())
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), limit)
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        optimizer.step()
        for name, parameter in trained.items():
            after[name].append(parameter.detach().clone())
    folder = HERE / kind.lower() / case
    (folder / "model").mkdir(parents=True, exist_ok=True)
    config = {"_class_name": kind} | arguments | {"max_grad_norm": limit}
    (folder / "model/config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {f"input.parameters.{name}": value for name, value in start.items()}
    tensors |= {f"input.gradients.{name}": torch.stack(values) for name, values in gradients.items()}
    tensors |= {f"output.{name}": torch.stack(values) for name, values in after.items()}
    tensors["input.learning_rate"] = torch.tensor(rates, dtype=torch.float64)
    save_file(tensors, folder / "reference.safetensors")
    moved = max(float((values[-1] - start[name]).abs().max()) for name, values in after.items())
    print(kind, case, f"moved by up to {moved:.2e}", optimizer.param_groups[0].get("d", ""))


for (kind, case), settings in CASES.items():
    make(kind, case, *settings)
