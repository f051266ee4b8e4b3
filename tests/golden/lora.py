"""Writes lora/ beside this file: for SDXL, SD3.5 and FLUX.1 a tiny random model, one adapter in every layout, and what the
model computes with it.

    python lora.py        (diffusers 0.42.1, peft 0.21, torch, safetensors)

The adapter is drawn in the names of the models' authors, where queries, keys and values are one layer. What the model
computes with it is found without any reader of adapters: the checkpoint is turned into its authors' names, the products of
the factors are added, and diffusers' own conversion of single files turns it back. diffusers' and peft's readers must then
find the same in the other layouts.
"""

import json
import shutil
from pathlib import Path

import peft
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

from diffusion import sort_metadata

HERE = Path(__file__).parent / "lora"
RANK, ALPHA = 4, 6.0


def close(ours, theirs, tolerance=2e-6):
    found = ((ours - theirs).norm() / theirs.norm()).item()
    assert found < tolerance, found


def swapped(weight):
    """The last modulation's shift and scale, whose order is another in diffusers."""
    return torch.cat(list(reversed(weight.chunk(2))))


class Sdxl:
    name, component = "sdxl", "unet"
    # Layers of the adapter by the single file's names, and how many of diffusers' each holds.
    layers = [
        "input_blocks.1.0.in_layers.2", "input_blocks.2.0.emb_layers.1", "input_blocks.3.0.op",
        "input_blocks.4.0.skip_connection", "input_blocks.4.1.proj_in",
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q", "input_blocks.5.1.transformer_blocks.0.attn2.to_v",
        "middle_block.0.out_layers.3", "middle_block.1.transformer_blocks.0.ff.net.0.proj",
        "middle_block.1.transformer_blocks.0.attn1.to_out.0", "middle_block.2.in_layers.2",
        "output_blocks.0.1.transformer_blocks.0.ff.net.2", "output_blocks.2.1.proj_out", "output_blocks.2.2.conv",
        "output_blocks.3.0.skip_connection", "output_blocks.5.0.out_layers.3",
        "time_embed.0", "label_emb.0.2",
    ]

    def model(self):
        return UNet2DConditionModel(
            in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=2, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=4, sample_size=8,
            block_out_channels=[4, 8], down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], transformer_layers_per_block=1,
            attention_head_dim=[1, 2], cross_attention_dim=6, projection_class_embeddings_input_dim=6 + 24,
        )

    def inputs(self, draw):
        return {
            "sample": draw(2, 4, 8, 6), "timestep": torch.tensor([17.0, 801.0]), "encoder_hidden_states": draw(2, 3, 6),
            "text_embeds": draw(2, 6), "time_ids": torch.tensor([[8.0, 6, 0, 1, 8, 6], [9.0, 8, 1, 0, 8, 6]]),
        }

    def run(self, model, inputs):
        added = {key: inputs[key] for key in ["text_embeds", "time_ids"]}
        return model(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"], added_cond_kwargs=added).sample

    def pipeline(self, model):
        return StableDiffusionXLPipeline(
            vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=model,
            scheduler=EulerDiscreteScheduler(),
        )

    def ours(self, layer):
        """diffusers' path of the single file's layer: the blocks are counted, three to a level."""
        for theirs, own in [("time_embed.0", "time_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2")]:
            if layer == theirs:
                return [own]
        parts = layer.split(".")
        way, index, kind, rest = parts[0], int(parts[1]), parts[2], ".".join(parts[3:])
        rest = {
            "in_layers.2": "conv1", "out_layers.3": "conv2", "emb_layers.1": "time_emb_proj", "skip_connection": "conv_shortcut",
        }.get(rest, rest)
        if way == "middle_block":
            rest = {"in_layers.2": "conv1", "out_layers.3": "conv2"}.get(".".join(parts[2:]), ".".join(parts[2:]))
            return [f"mid_block.attentions.0.{rest}" if index == 1 else f"mid_block.resnets.{index // 2}.{rest}"]
        if way == "input_blocks":
            level, at = divmod(index - 1, 3)
            if rest == "op":
                return [f"down_blocks.{level}.downsamplers.0.conv"]
            return [f"down_blocks.{level}.{'attentions' if kind == '1' else 'resnets'}.{at}.{rest}"]
        level, at = divmod(index, 3)
        if rest == "conv":
            return [f"up_blocks.{level}.upsamplers.0.conv"]
        return [f"up_blocks.{level}.{'attentions' if kind == '1' else 'resnets'}.{at}.{rest}"]

    def changed(self, weights, changes):
        return {f"{self.ours(layer)[0]}.weight": change for layer, change in changes.items()}


class Sd3:
    name, component = "sd3", "transformer"
    layers = [
        "joint_blocks.0.x_block.attn.qkv", "joint_blocks.1.x_block.attn.qkv", "joint_blocks.0.context_block.attn.qkv",
        "joint_blocks.1.context_block.attn.qkv", "joint_blocks.0.x_block.attn2.qkv", "joint_blocks.0.x_block.attn2.proj",
        "joint_blocks.1.x_block.attn.proj", "joint_blocks.0.context_block.attn.proj", "joint_blocks.0.x_block.mlp.fc1",
        "joint_blocks.1.x_block.mlp.fc2", "joint_blocks.0.context_block.mlp.fc1", "joint_blocks.0.context_block.mlp.fc2",
        "joint_blocks.0.x_block.adaLN_modulation.1", "joint_blocks.0.context_block.adaLN_modulation.1",
        "joint_blocks.1.context_block.adaLN_modulation.1", "final_layer.adaLN_modulation.1", "final_layer.linear",
        "x_embedder.proj", "context_embedder", "t_embedder.mlp.2", "y_embedder.mlp.0",
    ]
    parts = {
        "x_block.attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "context_block.attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "x_block.attn2.qkv": ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
        "x_block.attn.proj": ["attn.to_out.0"], "context_block.attn.proj": ["attn.to_add_out"],
        "x_block.attn2.proj": ["attn2.to_out.0"],
        "x_block.mlp.fc1": ["ff.net.0.proj"], "x_block.mlp.fc2": ["ff.net.2"],
        "context_block.mlp.fc1": ["ff_context.net.0.proj"], "context_block.mlp.fc2": ["ff_context.net.2"],
        "x_block.adaLN_modulation.1": ["norm1.linear"], "context_block.adaLN_modulation.1": ["norm1_context.linear"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"], "final_layer.linear": ["proj_out"],
        "x_embedder.proj": ["pos_embed.proj"], "context_embedder": ["context_embedder"],
        "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
        "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
        "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"],
        "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    }

    def model(self):
        return SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4,
            num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=5,
            pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
        )

    def inputs(self, draw):
        return {
            "hidden_states": draw(2, 4, 8, 6), "timestep": torch.tensor([17.0, 801.0]),
            "encoder_hidden_states": draw(2, 3, 6), "pooled_projections": draw(2, 5),
        }

    def run(self, model, inputs):
        return model(**inputs).sample

    def pipeline(self, model):
        return StableDiffusion3Pipeline(
            transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
            text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
        )

    def ours(self, layer):
        if layer.startswith("joint_blocks."):
            _, number, rest = layer.split(".", 2)
            return [f"transformer_blocks.{number}.{part}" for part in self.parts[rest]]
        return self.parts[layer]

    def turned(self, layer):
        return layer in ["final_layer.adaLN_modulation.1", "joint_blocks.1.context_block.adaLN_modulation.1"]

    def theirs(self, weights):
        """The checkpoint as its authors have it."""
        out, rest = {}, dict(weights)
        every = [name for name in self.parts if "block." not in name]
        every += [f"joint_blocks.{i}.{name}" for i in range(2) for name in self.parts if "block." in name]
        for layer in every:
            for kind in ["weight", "bias"]:
                if all(f"{part}.{kind}" in rest for part in self.ours(layer)):
                    whole = torch.cat([rest.pop(f"{part}.{kind}") for part in self.ours(layer)])
                    out[f"{layer}.{kind}"] = swapped(whole) if self.turned(layer) else whole
        out["pos_embed"] = rest.pop("pos_embed.pos_embed")
        for key, value in rest.items():
            number, attention, norm = key.split(".")[1:4]
            block = "context_block" if "added" in norm else "x_block"
            out[f"joint_blocks.{number}.{block}.{attention}.ln_{norm[-1]}.weight"] = value
        return out

    def changed(self, weights, changes):
        """What the changes of the authors' layers are of diffusers', by diffusers' own conversion."""
        before = convert_sd3_transformer_checkpoint_to_diffusers(self.theirs(weights))
        for key, value in weights.items():
            assert torch.equal(before[key], value), key
        theirs = self.theirs(weights)
        for layer, change in changes.items():
            theirs[f"{layer}.weight"] = theirs[f"{layer}.weight"] + change
        after = convert_sd3_transformer_checkpoint_to_diffusers(theirs)
        return {key: after[key] - value for key, value in weights.items() if not torch.equal(after[key], value)}


class Flux:
    name, component = "flux", "transformer"
    layers = [
        "double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.qkv", "double_blocks.0.img_attn.proj",
        "double_blocks.0.txt_attn.proj", "double_blocks.0.img_mlp.0", "double_blocks.0.txt_mlp.2",
        "double_blocks.0.img_mod.lin", "double_blocks.0.txt_mod.lin", "single_blocks.0.linear1", "single_blocks.1.linear1",
        "single_blocks.0.linear2", "single_blocks.1.linear2", "single_blocks.1.modulation.lin", "img_in", "txt_in", "time_in.in_layer",
        "vector_in.out_layer", "guidance_in.in_layer", "final_layer.linear", "final_layer.adaLN_modulation.1",
    ]
    parts = {
        "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "img_attn.proj": ["attn.to_out.0"], "txt_attn.proj": ["attn.to_add_out"],
        "img_mlp.0": ["ff.net.0.proj"], "img_mlp.2": ["ff.net.2"],
        "txt_mlp.0": ["ff_context.net.0.proj"], "txt_mlp.2": ["ff_context.net.2"],
        "img_mod.lin": ["norm1.linear"], "txt_mod.lin": ["norm1_context.linear"],
        "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"], "linear2": ["proj_out"],
        "modulation.lin": ["norm.linear"],
        "img_in": ["x_embedder"], "txt_in": ["context_embedder"],
        "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
        "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
        "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
        "final_layer.linear": ["proj_out"], "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    }

    def model(self):
        return FluxTransformer2DModel(
            patch_size=1, in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=12, num_attention_heads=1,
            joint_attention_dim=6, pooled_projection_dim=5, guidance_embeds=True, axes_dims_rope=(4, 4, 4),
        )

    def inputs(self, draw):
        ids = torch.zeros(2, 3, 3)
        ids[..., 1] += torch.arange(2)[:, None]
        ids[..., 2] += torch.arange(3)[None]
        return {
            "hidden_states": draw(2, 6, 8), "timestep": torch.tensor([0.1, 0.9]), "guidance": torch.tensor([3.5, 1.0]),
            "encoder_hidden_states": draw(2, 3, 6), "pooled_projections": draw(2, 5), "txt_ids": torch.zeros(3, 3),
            "img_ids": ids.reshape(-1, 3),
        }

    def run(self, model, inputs):
        return model(**inputs).sample

    def pipeline(self, model):
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
            tokenizer_2=None, transformer=model,
        )

    def ours(self, layer):
        for theirs, own in [("double_blocks.", "transformer_blocks"), ("single_blocks.", "single_transformer_blocks")]:
            if layer.startswith(theirs):
                _, number, rest = layer.split(".", 2)
                return [f"{own}.{number}.{part}" for part in self.parts[rest]]
        return self.parts[layer]

    def turned(self, layer):
        return layer == "final_layer.adaLN_modulation.1"

    def changed(self, weights, changes):
        """diffusers' conversion of single files takes no other width than the published one: the rows in the authors' order,
        q, k, v and the MLP (`model.py` of black-forest-labs/flux, SingleStreamBlock)."""
        out = {}
        for layer, change in changes.items():
            change = swapped(change) if self.turned(layer) else change
            own = self.ours(layer)
            heights = [weights[f"{part}.weight"].shape[0] for part in own]
            out |= {f"{part}.weight": rows for part, rows in zip(own, change.split(heights))}
        return out


def made(family, seed=7):
    """The model, its inputs, the adapter by its authors' layers as (A, B), and what it changes in diffusers' weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = family.model().eval()
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = noise * parameter[0].numel() ** -0.5
        else:
            parameter.data += 0.2 * noise

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    factors, changes = {}, {}
    for layer in family.layers:
        shapes = [weights[f"{part}.weight"].shape for part in family.ours(layer)]
        rows, rest = sum(shape[0] for shape in shapes), shapes[0][1:]
        a = draw(RANK, *rest) * rest.numel() ** -0.5
        b = 0.4 * draw(rows, RANK)
        b = b.reshape(rows, RANK, *[1] * (len(rest) - 1))
        factors[layer] = (a, b)
        changes[layer] = (b.flatten(1) @ a.flatten(1)).reshape(rows, *rest) * (ALPHA / RANK)
    return model, family.inputs(draw), factors, family.changed(weights, changes)


def own_layers(family, factors):
    """The factors of each of diffusers' layers: A in common, and the rows of B."""
    out = {}
    for layer, (a, b) in factors.items():
        own = family.ours(layer)
        if hasattr(family, "turned") and family.turned(layer):
            b = swapped(b)
        heights = [b.shape[0]]
        if len(own) > 1:
            heights = [a.shape[1]] * 3
            heights += [b.shape[0] - sum(heights)] if len(own) == 4 else []
        for part, rows in zip(own, b.split(heights)):
            out[part] = (a, rows)
    return out


def lora_config(own):
    whole = "|".join(layer.replace(".", r"\.") for layer in sorted(own))
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=f"^(?:{whole})$")


def kohya(factors):
    out = {}
    for layer, (a, b) in factors.items():
        name = "lora_unet_" + layer.replace(".", "_")
        out[f"{name}.lora_down.weight"], out[f"{name}.lora_up.weight"] = a, b
        out[f"{name}.alpha"] = torch.tensor(ALPHA)
    return out


def comfyui(factors):
    """ComfyUI's own: the authors' names with dots."""
    out = {}
    for layer, (a, b) in factors.items():
        name = f"diffusion_model.{layer}"
        out[f"{name}.lora_A.weight"], out[f"{name}.lora_B.weight"] = a, b
        out[f"{name}.alpha"] = torch.tensor(ALPHA)
    return out


def save(path, tensors, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().float().contiguous().clone() for key, value in tensors.items()}
    save_file(tensors, path, {"format": "pt"} | (metadata or {}))
    sort_metadata(path)


def save_diffusers(path, family, own, alpha=ALPHA):
    """As `save_lora_weights` does, with the adapter's configuration in the header."""
    tensors = {}
    for layer, (a, b) in own.items():
        tensors[f"{family.component}.{layer}.lora_A.weight"] = a
        tensors[f"{family.component}.{layer}.lora_B.weight"] = b
    config = {f"{family.component}.{key}": value for key, value in {
        "r": RANK, "lora_alpha": alpha, "target_modules": sorted(own), "peft_type": "LORA",
    }.items()}
    save(path, tensors, {"lora_adapter_metadata": json.dumps(config, sort_keys=True)})


def save_peft(folder, family, model, own):
    """peft's own writer."""
    tuned = peft.get_peft_model(model, lora_config(own))
    for layer, (a, b) in own.items():
        module = tuned.base_model.model.get_submodule(layer)
        module.lora_A["default"].weight.data = a.clone()
        module.lora_B["default"].weight.data = b.clone()
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink()
    written = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=2) + "\n")
    return tuned


def added(family, change):
    """The model with `change` added to its weights."""
    model, *_ = made(family)
    weights = model.state_dict()
    model.load_state_dict({key: value + change[key] if key in change else value for key, value in weights.items()})
    return model


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    for family in [Sdxl(), Sd3(), Flux()]:
        folder = HERE / family.name
        model, inputs, factors, change = made(family)
        model.save_pretrained(folder / "model")
        with torch.no_grad():
            plain = family.run(model, inputs)
            output = family.run(added(family, change), inputs)
        assert ((output - plain).norm() / plain.norm()).item() > 0.05
        own = own_layers(family, factors)
        save_diffusers(folder / "diffusers.safetensors", family, own)
        save(folder / "kohya.safetensors", kohya(factors))
        save(folder / "comfyui.safetensors", comfyui(factors))
        with torch.no_grad():
            close(family.run(save_peft(folder / "peft", family, model, own), inputs), output)
            pipeline = family.pipeline(made(family)[0])
            pipeline.load_lora_weights(folder / "diffusers.safetensors")
            close(family.run(getattr(pipeline, family.component), inputs), output)
            if family.name == "sdxl":
                pipeline = family.pipeline(made(family)[0])
                pipeline.load_lora_weights(folder / "kohya.safetensors")
                close(family.run(pipeline.unet, inputs), output)
        reference = {f"input.{key}": value for key, value in inputs.items()} | {"output": output}
        save(folder / "reference.safetensors", reference)
        print(family.name, len(own), "layers")


if __name__ == "__main__":
    main()
