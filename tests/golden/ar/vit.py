"""Cases for dino, from transformers: python tests/golden/ar/vit.py"""
import torch
from common import case, names_in_file, randomise, save, training
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTModel


def make(name, batch, kind=ViTModel, rename=None, **config):
    """`rename` makes another layout of what transformers saved."""
    generator = torch.Generator().manual_seed(5)
    folder = case("dino", name)
    model = kind(ViTConfig(**config)).eval()
    randomise(model, generator)
    model.save_pretrained(folder / "model")
    vit = model if kind is ViTModel else model.vit
    names = names_in_file(model, folder)
    pixel_values = torch.randn(batch, 3, config["image_size"], config["image_size"], generator=generator)
    output = vit(pixel_values=pixel_values).last_hidden_state[:, 0]
    save(folder / "reference.safetensors", {"input.pixel_values": pixel_values, "output": output})
    if rename:
        stored = load_file(folder / "model" / "model.safetensors")
        save_file(rename(stored, model), folder / "model" / "model.safetensors")
    else:
        cotangent = torch.randn(output.shape, generator=generator)
        training(folder, model, {"pixel_values": pixel_values}, output, cotangent, names.__getitem__)


def in_memory(_, model):
    """The names that transformers 5 uses in memory."""
    assert "layers.0.attention.q_proj.weight" in model.state_dict()
    return {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith("pooler")}


def timm(stored, _):
    parts = {
        "embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm_before": "norm1",
        "layernorm_after": "norm2", "attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2", "layernorm": "norm", "encoder.layer": "blocks",
    }
    tensors = {}
    for key, value in stored.items():
        if "pooler" in key or "attention.attention" in key:
            continue
        for old, new in parts.items():
            key = key.replace(old, new)
        tensors[key] = value
    layers = {key.split(".")[2] for key in stored if key.startswith("encoder.layer.")}
    for i in layers:
        for kind in ["weight", "bias"]:
            of = [stored[f"encoder.layer.{i}.attention.attention.{n}.{kind}"] for n in ["query", "key", "value"]]
            tensors[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(of)
    return tensors


SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=30, patch_size=8)
make("hub-with-pooler", 2, **SMALL)
make(
    "classifier", 3, ViTForImageClassification, hidden_size=18, num_hidden_layers=3, num_attention_heads=3,
    intermediate_size=20, image_size=15, patch_size=5, layer_norm_eps=1e-6,
)
make("transformers-5-names", 2, rename=in_memory, **SMALL)
make("timm-names", 2, rename=timm, **SMALL)
