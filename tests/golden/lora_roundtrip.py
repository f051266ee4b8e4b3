"""Adapters through `proxytune convert` and back, loaded for real by diffusers' `load_lora_weights` and by peft, on the tiny
random models of lora.py and on one block of FLUX.1 at its published width:

    python tests/golden/lora_roundtrip.py --program target/release/proxytune

Each line says from whom through which layouts an adapter went, who loaded what came out, by how much the model's output
differs from its output with the adapter as it was (relative L2), and how much the adapter changes the output at all. Exit
code 1 if any differs by more than 1e-5.

diffusers reads no file of SD3 in kohya's names. There the reader is the reference of lora.py: the products of the factors
are added to the checkpoint in its authors' names, which diffusers' conversion of single files turns back.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
import peft
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file

from lora import ALPHA, Flux, Sd3, Sdxl, added, kohya, made, own_layers, save, save_diffusers, save_peft

LIMIT = 1e-5
diffusers.utils.logging.set_verbosity_error()


class WideFlux(Flux):
    """One single block as wide as the published model: diffusers cuts up kohya's `linear1` at that width alone."""

    name = "flux, 3072 wide"
    layers = ["single_blocks.0.linear1", "single_blocks.0.linear2", "single_blocks.0.modulation.lin"]

    def model(self):
        return FluxTransformer2DModel(
            patch_size=1, in_channels=8, num_layers=0, num_single_layers=1, attention_head_dim=128, num_attention_heads=24,
            joint_attention_dim=6, pooled_projection_dim=5, guidance_embeds=True,
        )


class NarrowFlux(Flux):
    """Without `linear1`."""

    name = "flux, double blocks"
    layers = [layer for layer in Flux.layers if "linear1" not in layer and layer not in [
        # diffusers reads them without the prefix that it looks for afterwards, and so not at all.
        "img_in", "txt_in", "time_in.in_layer", "vector_in.out_layer", "guidance_in.in_layer", "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ]]


@torch.no_grad()
def output(family, model, inputs):
    return family.run(model, inputs)


def by_diffusers(family, file, inputs):
    pipeline = family.pipeline(made(family)[0])
    pipeline.load_lora_weights(file)
    return output(family, getattr(pipeline, family.component), inputs)


def by_peft(family, folder, inputs):
    return output(family, peft.PeftModel.from_pretrained(made(family)[0], folder), inputs)


def by_weights(family, file, inputs):
    """Without a reader of adapters."""
    tensors = load_file(file)
    weights = made(family)[0].state_dict()
    every = family.theirs(weights) if family.name == "sd3" else None
    changes = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_down.weight"):
            continue
        name = key.removesuffix(".lora_down.weight")
        b, alpha = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.alpha"]
        flat = name.removeprefix("lora_unet_")
        known = [k.removesuffix(".weight") for k in every] if every else family.layers
        layer = next(layer for layer in known if layer.replace(".", "_") == flat)
        change = (b.flatten(1) @ a.flatten(1)) * (alpha / a.shape[0])
        changes[layer] = change.reshape(b.shape[0], *a.shape[1:])
    return output(family, added(family, family.changed(weights, changes)), inputs)


def own_factors(family, factors):
    """As diffusers trains them: A of every layer its own."""
    generator = torch.Generator().manual_seed(11)
    own = own_layers(family, factors)
    return {layer: (torch.randn(a.shape, generator=generator) * a[0].numel() ** -0.5, b) for layer, (a, b) in own.items()}


class Trip:
    def __init__(self, family, program, folder):
        self.family, self.program, self.folder = family, program, folder
        self.model, self.inputs, self.factors, _ = made(family)
        self.plain = output(family, self.model, self.inputs)
        self.worst = 0.0

    def convert(self, source, *layouts):
        """Through the layouts, one after the other."""
        for layout in layouts:
            end = "" if layout == "peft" else ".safetensors"
            target = self.folder / f"{source.stem}-{layout}{end}"
            command = [self.program, "convert", source, target, "--to", layout, "--model", self.folder / "model"]
            if not target.exists():
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            source = target
        return source

    def compare(self, what, by, ours, theirs):
        error = ((ours - theirs).norm() / theirs.norm()).item()
        change = ((theirs - self.plain).norm() / self.plain.norm()).item()
        self.worst = max(self.worst, error)
        print(f"{self.family.name:20} {what:50} {by:10} {error:8.1e} {change:8.2f}", flush=True)


def model_folder(family, model, folder):
    """A pipeline's folder, as far as proxytune looks at it."""
    kinds = {"sdxl": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(f'{{"_class_name": "{kinds.get(family.name, "FluxPipeline")}"}}\n')
    model.save_pretrained(folder / family.component)


def trip(family, program, folder):
    trip = Trip(family, program, folder)
    model_folder(family, trip.model, folder / "model")
    kohya_reader = (by_weights, "weights") if family.name == "sd3" else (by_diffusers, "diffusers")
    # A of queries, keys and values in common, and their own.
    for kind, own in [("shared", own_layers(family, trip.factors)), ("own", own_factors(family, trip.factors))]:
        source = folder / f"{kind}.safetensors"
        save_diffusers(source, family, own)
        before = by_diffusers(family, source, trip.inputs)
        for layouts in [["diffusers"], ["kohya", "diffusers"], ["peft", "diffusers"], ["kohya", "peft", "diffusers"]]:
            after = by_diffusers(family, trip.convert(source, *layouts), trip.inputs)
            trip.compare(f"{kind}: diffusers > {' > '.join(layouts)}", "diffusers", after, before)
        reader, name = kohya_reader
        after = reader(family, trip.convert(source, "kohya"), trip.inputs)
        trip.compare(f"{kind}: diffusers > kohya", name, after, before)
        after = by_peft(family, trip.convert(source, "peft"), trip.inputs)
        trip.compare(f"{kind}: diffusers > peft", "peft", after, before)
        source = folder / f"{kind}-by-peft"
        save_peft(source, family, made(family)[0], own)
        after = by_diffusers(family, trip.convert(source, "diffusers"), trip.inputs)
        trip.compare(f"{kind}: peft > diffusers", "diffusers", after, before)
    source = folder / "theirs.safetensors"
    save(source, kohya(trip.factors))
    reader, name = kohya_reader
    before = reader(family, source, trip.inputs)
    for layouts in [["kohya"], ["diffusers", "kohya"], ["peft", "kohya"]]:
        after = reader(family, trip.convert(source, *layouts), trip.inputs)
        trip.compare(f"kohya > {' > '.join(layouts)}", name, after, before)
    after = by_diffusers(family, trip.convert(source, "diffusers"), trip.inputs)
    trip.compare("kohya > diffusers", "diffusers", after, before)
    return trip.worst


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", default="target/release/proxytune")
    program = Path(parser.parse_args().program).resolve()
    print(f"diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}; rank 4, alpha {ALPHA:g}")
    print(f"{'model':20} {'adapter':50} {'read by':10} {'error':>8} {'change':>8}")
    worst = 0.0
    for family in [Sdxl(), Sd3(), NarrowFlux(), WideFlux()]:
        with tempfile.TemporaryDirectory() as folder:
            worst = max(worst, trip(family, program, Path(folder)))
    print(f"the worst differs by {worst:.1e}; {'equal' if worst <= LIMIT else 'different'} within {LIMIT:g}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
