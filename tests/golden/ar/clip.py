"""Cases for clip and clip-text, from transformers: python tests/golden/ar/clip.py"""
import json

import torch
from common import GOLDEN, case, names_in_file, randomise, save, training
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


def texts(generator, vocab, end, rows):
    """Start, words, end, and ends as padding, as CLIP's own tokenizer pads."""
    n = max(rows) + 2
    ids = torch.full((len(rows), n), end)
    for i, words in enumerate(rows):
        ids[i, 0] = vocab - 2
        ids[i, 1 : words + 1] = torch.randint(3, vocab - 2, (words,), generator=generator)
    return ids


def make_clip(name, end, text, vision, projection):
    generator = torch.Generator().manual_seed(len(name))
    folder = case("clip", name)
    text = dict(text, eos_token_id=end)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)).eval()
    randomise(model, generator)
    model.save_pretrained(folder / "model")
    written = json.loads((folder / "model" / "config.json").read_text())
    assert written["text_config"]["eos_token_id"] == end
    vocab, size = text["vocab_size"], vision["image_size"]
    input_ids = texts(generator, vocab, vocab - 1, [4, 1, 7])
    pixel_values = torch.randn(2, 3, size, size, generator=generator)
    output = model(input_ids=input_ids, pixel_values=pixel_values)
    save(folder / "reference-text.safetensors", {"input.input_ids": input_ids, "output": output.text_embeds})
    save(folder / "reference-image.safetensors", {"input.pixel_values": pixel_values, "output": output.image_embeds})
    # logits_per_image = exp(logit_scale) * image_embeds . text_embeds
    cotangent = torch.randn(output.logits_per_image.shape, generator=generator)
    inputs = {"input_ids": input_ids, "pixel_values": pixel_values}
    training(folder, model, inputs, output.logits_per_image, cotangent)


def make_text(name, kind, end, last, **config):
    generator = torch.Generator().manual_seed(len(name))
    folder = case("clip-text", name)
    model = kind(CLIPTextConfig(eos_token_id=end, **config)).eval()
    randomise(model, generator)
    model.save_pretrained(folder / "model")
    input_ids = texts(generator, config["vocab_size"], last, [3, 9])
    output = model(input_ids=input_ids, output_hidden_states=True)
    pooled = output.text_embeds if kind is CLIPTextModelWithProjection else output.pooler_output
    reference = {
        "input.input_ids": input_ids,
        "output": output.hidden_states[-2],
        "output.pooled": pooled,
    }
    save(folder / "reference.safetensors", reference)
    names = names_in_file(model, folder)
    cotangent = torch.randn(pooled.shape, generator=generator)
    training(folder, model, {"input_ids": input_ids}, pooled, cotangent, names.__getitem__)


make_clip(
    "first-end-of-text", 39,
    dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
         max_position_embeddings=12),
    dict(hidden_size=20, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4, image_size=30, patch_size=8),
    projection=10,
)
make_clip(
    "largest-id", 2,
    dict(vocab_size=51, hidden_size=18, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3,
         max_position_embeddings=9, hidden_act="gelu", layer_norm_eps=1e-4),
    dict(hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=21, patch_size=7,
         hidden_act="gelu"),
    projection=7,
)
SMALL = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_attention_heads=2, max_position_embeddings=11)
make_text("projected", CLIPTextModelWithProjection, 39, 39, num_hidden_layers=2, projection_dim=6, **SMALL)
make_text("plain", CLIPTextModel, 2, 39, num_hidden_layers=3, hidden_act="gelu", **SMALL)

# transformers before version 5 put text_model. in front of a CLIPTextModel's names: the same case in that layout.
plain, prefixed = GOLDEN / "clip-text" / "plain", case("clip-text", "plain-prefixed")
(prefixed / "model").mkdir()
for file in ["model/config.json", "reference.safetensors"]:
    (prefixed / file).write_bytes((plain / file).read_bytes())
stored = load_file(plain / "model" / "model.safetensors")
assert "embeddings.token_embedding.weight" in stored
save_file({f"text_model.{k}": v for k, v in stored.items()}, prefixed / "model" / "model.safetensors")

# As the hub has CLIP ViT-B/32: torch's own format, with the buffers of older versions.
original, torch_format = GOLDEN / "clip" / "largest-id" / "model", case("clip", "largest-id-torch")
state = load_file(original / "model.safetensors")
state["text_model.embeddings.position_ids"] = torch.arange(9)[None]
torch.save(state, torch_format / "pytorch_model.bin")
