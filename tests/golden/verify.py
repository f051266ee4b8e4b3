"""More cases for `proxytune verify`, from the reference libraries: LLAMAGEN=path/to/LlamaGen python tests/golden/verify.py

Adapters on the checkpoints that the other programs here made, which must have run before, and small checkpoints in
further layouts. A case is tests/golden/COMPONENT/CASE/: model/, reference*.safetensors, and for each reference-NAME
with gradients adapter-NAME/.
"""
import json
import os
import shutil
import sys
from pathlib import Path

import peft
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import save_file
from transformers import (
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTForImageClassification,
    ViTModel,
)

sys.path.insert(0, os.environ["LLAMAGEN"])
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "ar"))
from autoregressive.models import gpt
from common import case, left_padded, randomise
from tokenizer.tokenizer_image import vq_model as vq

generator = torch.Generator().manual_seed(11)


def draw(*shape):
    return torch.randn(*shape, generator=generator)


def draw_ids(bound, *shape):
    return torch.randint(bound, shape, generator=generator)


def adapted(model, folder, name, targets, **config):
    """The model with an adapter whose B is not zero, saved as peft saves it."""
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **config))
    with torch.no_grad():
        for key, p in tuned.named_parameters():
            if "lora_B" in key:
                p.copy_(0.2 * draw(*p.shape))
    out = folder / f"adapter-{name}"
    shutil.rmtree(out, ignore_errors=True)
    tuned.save_pretrained(out)
    (out / "README.md").unlink()
    # Nothing of the machine, and sets in order.
    written = json.loads((out / "adapter_config.json").read_text())
    written |= {"base_model_name_or_path": None, "target_modules": sorted(targets)}
    (out / "adapter_config.json").write_text(json.dumps(written, indent=2) + "\n")
    return tuned


def save(folder, name, inputs, outputs, tuned=None, cotangents=()):
    """`outputs` and `cotangents` by name, the empty one for `output` itself."""
    key = lambda kind, name: f"{kind}.{name}" if name else kind
    tensors = {f"input.{k}": v for k, v in inputs.items()} | {key("output", k): v for k, v in outputs.items()}
    if tuned is not None:
        total = 0
        for k in cotangents:
            cotangent = draw(*outputs[k].shape)
            tensors[key("cotangent", k)] = cotangent
            total = total + (outputs[k] * cotangent).sum()
        total.backward()
        for k, p in tuned.named_parameters():
            if "lora_" in k and p.grad is not None:
                tensors[f"grad.{k}"] = p.grad
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, folder / f"reference-{name}.safetensors")


def of_llamagen_gpt(case_name, name, targets, given, lengths, **config):
    folder = HERE / "llamagen-gpt" / case_name
    args = gpt.ModelArgs(**json.loads((folder / "model/config.json").read_text()))
    model = gpt.Transformer(args)
    state = torch.load(folder / "model/model.pt")["model"]
    model.cls_embedding.uncond_embedding = torch.nn.Parameter(state["cls_embedding.uncond_embedding"], False)
    model.load_state_dict(state)
    tuned = adapted(model, folder, name, targets, **config).train()
    b = len(lengths)
    caption_mask = left_padded(lengths, args.cls_token_num).bool()
    inputs = {
        "caption_embeddings": draw(b, args.cls_token_num, args.caption_dim),
        "caption_mask": caption_mask,
        "tokens": draw_ids(args.vocab_size, b, given).int(),
    }
    n = args.cls_token_num + given
    mask = torch.tril(torch.ones(n, n, dtype=torch.bool))[None].repeat(b, 1, 1)
    mask[:, :, : args.cls_token_num] &= caption_mask[:, None]
    mask |= torch.eye(n, dtype=torch.bool)
    logits = tuned(idx=inputs["tokens"], cond_idx=inputs["caption_embeddings"], mask=mask[:, None])[0]
    save(folder, name, inputs, {"": logits}, tuned, [""])


def of_llamagen_vq():
    folder = HERE / "llamagen-vq" / "unnormalised-codes"
    config = json.loads((folder / "model/config.json").read_text())
    ch = config.pop("ch")
    args = vq.ModelArgs(**config)
    model = vq.VQModel(args)
    model.encoder = vq.Encoder(ch=ch, ch_mult=args.encoder_ch_mult, z_channels=args.z_channels)
    model.decoder = vq.Decoder(ch=ch, ch_mult=args.decoder_ch_mult, z_channels=args.z_channels)
    model.load_state_dict({k: v.float() for k, v in torch.load(folder / "model/model.pt")["model"].items()})
    model.eval()
    image = torch.rand(2, 3, 15, 11, generator=generator) * 2 - 1
    with torch.no_grad():
        save(folder, "odd-sides", {"image": image}, {"": model.encode(image)[2][2].view(2, -1)})
    targets = ["post_quant_conv", "decoder.conv_in", "decoder.mid.1.q", "decoder.conv_blocks.0.upsample.conv"]
    tuned = adapted(model, folder, "convolutions", targets, r=2, lora_alpha=3)
    tokens = draw_ids(args.codebook_size, 1, 4)
    image = model.decode_code(tokens.flatten(), [1, args.codebook_embed_dim, 2, 2])
    save(folder, "convolutions", {"tokens": tokens}, {"": image}, tuned, [""])


def texts(vocabulary, lengths):
    """Start, words, end, and ends as padding."""
    ids = torch.full((len(lengths), max(lengths) + 2), vocabulary - 1)
    for row, length in zip(ids, lengths):
        row[0] = vocabulary - 2
        row[1 : length + 1] = 3 + draw_ids(vocabulary - 5, length)
    return ids


def of_clip():
    folder = HERE / "clip" / "first-end-of-text"
    model = CLIPModel.from_pretrained(folder / "model")
    targets = ["q_proj", "out_proj", "fc2", "text_projection", "visual_projection", "patch_embedding"]
    tuned = adapted(
        model, folder, "both-towers", targets, r=2, lora_alpha=5,
        rank_pattern={"text_projection": 3}, alpha_pattern={r".*layers\.1\.self_attn\.q_proj": 1},
    ).eval()
    inputs = {"input_ids": texts(40, [6, 2]), "pixel_values": draw(1, 3, 30, 30)}
    output = tuned(**inputs)
    outputs = {"text_embeds": output.text_embeds, "image_embeds": output.image_embeds}
    save(folder, "both-towers", inputs, outputs, tuned, list(outputs))


def of_clip_text():
    folder = HERE / "clip-text" / "projected"
    model = CLIPTextModelWithProjection.from_pretrained(folder / "model")
    tuned = adapted(model, folder, "both-outputs", ["k_proj", "v_proj", "fc1"], r=1, lora_alpha=2).eval()
    inputs = {"input_ids": texts(40, [1, 8, 4])}
    output = tuned(**inputs, output_hidden_states=True)
    outputs = {"": output.hidden_states[-2], "pooled": output.text_embeds}
    save(folder, "both-outputs", inputs, outputs, tuned, list(outputs))

    # Files that call their tensors text_model.X, adapted by a library that calls them X.
    folder = HERE / "clip-text" / "plain-prefixed"
    model = CLIPTextModel.from_pretrained(folder / "model")
    tuned = adapted(model, folder, "renamed", ["q_proj", "out_proj"], r=3, lora_alpha=3).eval()
    assert any(".model.encoder.layers.0." in key for key, _ in tuned.named_parameters())
    output = tuned(**inputs, output_hidden_states=True)
    save(folder, "renamed", inputs, {"": output.hidden_states[-2]}, tuned, [""])

    folder = case("clip-text", "half-precision-shards")
    config = CLIPTextConfig(
        vocab_size=30, hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=3,
        max_position_embeddings=10, hidden_act="gelu", eos_token_id=2,
    )
    model = CLIPTextModel(config).eval()
    randomise(model, generator)
    model.half().save_pretrained(folder / "model", max_shard_size="2KB")
    assert (folder / "model/model.safetensors.index.json").exists()
    inputs = {"input_ids": texts(30, [3, 5]).int()}
    output = model.float()(**inputs, output_hidden_states=True)
    save(folder, "text", inputs, {"": output.hidden_states[-2], "pooled": output.pooler_output})


def of_t5():
    folder = HERE / "t5" / "gated-gelu"
    model = T5EncoderModel.from_pretrained(folder / "model")
    targets = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
    tuned = adapted(model, folder, "rank-stabilised", targets, r=2, lora_alpha=3, use_rslora=True).eval()
    mask = (torch.arange(9)[None] < torch.tensor([9, 4])[:, None]).long()
    inputs = {"input_ids": 2 + draw_ids(38, 2, 9), "attention_mask": mask}
    save(folder, "rank-stabilised", inputs, {"": tuned(**inputs).last_hidden_state}, tuned, [""])

    folder = case("t5", "with-decoder")
    config = T5Config(
        vocab_size=25, d_model=10, d_kv=4, d_ff=14, num_layers=2, num_heads=3, feed_forward_proj="gated-silu",
        relative_attention_num_buckets=8, relative_attention_max_distance=10, dropout_rate=0.0,
    )
    model = T5ForConditionalGeneration(config).eval()
    randomise(model, generator)
    model.bfloat16().save_pretrained(folder / "model")
    mask = (torch.arange(23)[None] < torch.tensor([23, 11])[:, None]).long()
    inputs = {"input_ids": draw_ids(25, 2, 23), "attention_mask": mask}
    output = model.float().encoder(**inputs).last_hidden_state
    save(folder, "encoder", inputs, {"": output})
    # bf16 all through, to be compared with --dtype bf16
    output = model.bfloat16().encoder(**inputs).last_hidden_state
    save(folder, "bf16", inputs, {"": output})


def of_dino():
    for name, kind, side in [("hub-with-pooler", ViTModel, 30), ("classifier", ViTForImageClassification, 15)]:
        folder = HERE / "dino" / name
        model = kind.from_pretrained(folder / "model")
        targets = [
            key for key, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and "pooler" not in key and "classifier" not in key
        ][::2]
        tuned = adapted(model, folder, "renamed", targets, r=2, lora_alpha=7).eval()
        vit = tuned.base_model.model if kind is ViTModel else tuned.base_model.model.vit
        inputs = {"pixel_values": draw(2, 3, side, side)}
        save(folder, "renamed", inputs, {"": vit(**inputs).last_hidden_state[:, 0]}, tuned, [""])


def of_sd3():
    folder = HERE / "sd3-transformer" / "sd35"
    model = SD3Transformer2DModel.from_pretrained(folder / "model")
    targets = [
        "to_q", "to_out.0", "add_v_proj", "to_add_out", "ff.net.0.proj", "ff_context.net.2", "norm1.linear",
        "norm_out.linear", "context_embedder", "linear_1", "pos_embed.proj",
    ]
    tuned = adapted(
        model, folder, "every-kind", targets, r=1, lora_alpha=2, rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 7}
    )
    inputs = {
        "hidden_states": draw(2, 6, 9, 15),
        "timestep": torch.tensor([3, 999]),
        "encoder_hidden_states": draw(2, 3, 16),
        "pooled_projections": draw(2, 10),
    }
    save(folder, "every-kind", inputs, {"": tuned(**inputs).sample}, tuned, [""])

    folder = case("sd3-transformer", "single-pixel-patches")
    model = SD3Transformer2DModel(
        sample_size=5, patch_size=1, in_channels=3, out_channels=3, num_layers=3, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=5,
        pos_embed_max_size=6, qk_norm="rms_norm", dual_attention_layers=(0, 1),
    )
    randomise(model, generator)
    model.save_pretrained(folder / "model" / "transformer")
    inputs = {
        "hidden_states": draw(1, 3, 5, 3),
        "timestep": torch.tensor([417.5]),
        "encoder_hidden_states": draw(1, 4, 6),
        "pooled_projections": draw(1, 5),
    }
    save(folder, "inside-a-pipeline", inputs, {"": model(**inputs).sample})


def of_vae():
    folder = HERE / "vae" / "kl-f4-quant"
    model = AutoencoderKL.from_pretrained(folder / "model")
    with torch.no_grad():
        image = draw(1, 3, 13, 10)
        save(folder, "odd-sides", {"sample": image}, {"": model.encode(image).latent_dist.mean})
    targets = ["to_q", "to_v", "to_out.0", "quant_conv", "post_quant_conv", "downsamplers.0.conv", "conv_shortcut"]
    adapted(model, folder, "convolutions", targets, r=2, lora_alpha=1)
    for name, key, inputs, run in [
        ("convolutions-encoder", "sample", draw(1, 3, 12, 8), lambda x: model.encode(x).latent_dist.mean),
        ("convolutions-decoder", "latents", draw(1, 4, 3, 2), lambda x: model.decode(x).sample),
    ]:
        model.zero_grad()
        save(folder, name, {key: inputs}, {"": run(inputs)}, model, [""])
    # one adapter for both directions
    for name in ["convolutions-encoder", "convolutions-decoder"]:
        shutil.rmtree(folder / f"adapter-{name}", ignore_errors=True)
        shutil.copytree(folder / "adapter-convolutions", folder / f"adapter-{name}")
    shutil.rmtree(folder / "adapter-convolutions")

    folder = case("vae", "one-level-no-attention")
    model = AutoencoderKL(
        block_out_channels=(6,), layers_per_block=1, latent_channels=2, norm_num_groups=3, mid_block_add_attention=False,
    )
    randomise(model, generator)
    model.eval().save_pretrained(folder / "model")
    with torch.no_grad():
        image, latents = draw(2, 3, 7, 5), draw(1, 2, 3, 5)
        save(folder, "encoder", {"sample": image}, {"": model.encode(image).latent_dist.mean})
        save(folder, "decoder", {"latents": latents}, {"": model.decode(latents).sample})


of_llamagen_gpt(
    "two-layers", "patterns", ["wqkv", "w2", "output", "cap_proj.fc1"], 5, [3, 5, 1], r=2, lora_alpha=3,
    rank_pattern={"layers.1.attention.wqkv": 4}, alpha_pattern={r"layers\.\d+\.feed_forward\.w2": 9, "output": 1},
)
of_llamagen_gpt("grouped-heads", "no-tokens", ["wqkv", "wo"], 0, [7, 2], r=3, lora_alpha=3)
of_llamagen_vq()
of_clip()
of_clip_text()
of_t5()
of_dino()
of_sd3()
of_vae()
