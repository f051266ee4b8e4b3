"""What the programs of this folder share. Each makes the cases of one component under tests/golden/COMPONENT/CASE/:

model/                  a tiny random checkpoint in the layout in which the component is published
adapter/                a LoRA adapter that peft saved, where the component is tuned
reference*.safetensors  input.NAME, output or output.NAME, and with an adapter cotangent and grad.KEY
training.safetensors    input.NAME, cotangent, and grad.NAME for every weight of the checkpoint

Run with Python 3.12 or newer, torch 2.15, transformers 5.23, peft 0.21, safetensors 0.8 (other versions should do):
    python tests/golden/ar/t5.py
"""
import pathlib
import shutil

import torch
from safetensors.torch import load_file, save_file

GOLDEN = pathlib.Path(__file__).resolve().parent.parent


def case(component, name):
    """An empty folder for the case."""
    folder = GOLDEN / component / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def randomise(module, generator):
    """Weights large enough that every part of the model shows in its output."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim >= 2:
                fan_in = p[0].numel() if "embed" not in name else 4
                p.copy_(noise * fan_in**-0.5)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.2 * noise)
            else:
                p.copy_(0.3 * noise)


def save(path, tensors):
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, path)


def training(folder, module, inputs, output, cotangent, rename=lambda name: name):
    """The gradients of sum(output * cotangent) for all weights that have one, under their names in the file."""
    module.zero_grad()
    (output * cotangent).sum().backward()
    tensors = {f"input.{k}": v for k, v in inputs.items()} | {"cotangent": cotangent}
    for name, p in module.named_parameters():
        if p.grad is not None:
            tensors[f"grad.{rename(name)}"] = p.grad
    save(folder / "training.safetensors", tensors)


def names_in_file(module, folder):
    """In-memory name -> name in the file that save_pretrained wrote, by value."""
    stored = load_file(folder / "model" / "model.safetensors")
    found = {}
    for name, p in module.state_dict().items():
        same = [k for k, v in stored.items() if v.shape == p.shape and torch.equal(v, p)]
        assert len(same) <= 1, (name, same)
        if same:
            found[name] = same[0]
    return found


def left_padded(lengths, width):
    """A mask (b, width) with the given numbers of ones at the right end."""
    return (torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]).float()
