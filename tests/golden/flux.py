"""Writes flux-transformer/ beside this file: tiny random checkpoints saved by diffusers, adapters saved by diffusers,
and what the reference computes with them, gradients of the adapters included.

    python flux.py        (diffusers, peft, torch, safetensors)
"""

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusion import HERE, randomise, save, sort_metadata

TARGETS = [
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
]
SINGLE = ["proj_mlp", "proj_out", "x_embedder", "context_embedder", "norm.linear", "attn.to_q", "attn.to_v"]


def image_ids(height, width):
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None, :]
    return ids.reshape(-1, 3)


def case(name, seed, batch, height, width, tokens, rank, alpha, targets, **config):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(**config)
    randomise(model, generator)
    out = HERE / "flux-transformer" / name
    model.save_pretrained(out / "model")

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {
        "hidden_states": draw(batch, height * width, config["in_channels"]),
        "timestep": torch.rand(batch, generator=generator),
        "encoder_hidden_states": draw(batch, tokens, config["joint_attention_dim"]),
        "pooled_projections": draw(batch, config["pooled_projection_dim"]),
        "txt_ids": torch.zeros(tokens, 3),
        "img_ids": image_ids(height, width),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = 1 + 3 * torch.rand(batch, generator=generator)
    plain = model(**inputs).sample
    named = {f"input.{key}": value for key, value in inputs.items()}
    save(out / "reference-plain.safetensors", named | {"output": plain})

    model.requires_grad_(False)
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian")
    model.add_adapter(lora)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    metadata = model.peft_config["default"].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])
    FluxPipeline.save_lora_weights(
        out / "adapter-adapted",
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=metadata,
    )
    sort_metadata(out / "adapter-adapted" / "pytorch_lora_weights.safetensors")
    output = model(**inputs).sample
    cotangent = draw(*output.shape)
    (output * cotangent).sum().backward()
    reference = named | {"output": output, "cotangent": cotangent}
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            reference[f"grad.transformer.{key.replace('.default', '')}"] = parameter.grad
    save(out / "reference-adapted.safetensors", reference)


if __name__ == "__main__":
    case(
        "dev", 1, batch=2, height=3, width=5, tokens=7, rank=3, alpha=5.0, targets=TARGETS,
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    case(
        "without-guidance", 2, batch=3, height=4, width=2, tokens=5, rank=2, alpha=2.0, targets=SINGLE,
        patch_size=1, in_channels=8, out_channels=12, num_layers=1, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=3, joint_attention_dim=6, pooled_projection_dim=9, guidance_embeds=False,
        axes_dims_rope=(2, 4, 2),
    )
