"""Cases for `proxytune verify` with settings that published checkpoints do not have and the reference libraries compute all
the same: LLAMAGEN=path/to/LlamaGen python tests/golden/settings.py

A case is tests/golden/COMPONENT/CASE/: model/, reference-NAME.safetensors and, where that has gradients, adapter-NAME/.
"""
import dataclasses
import json
import os
import sys
from pathlib import Path

import peft
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ViTConfig, ViTModel

sys.path.insert(0, os.environ["LLAMAGEN"])
sys.path.insert(0, str(Path(__file__).resolve().parent / "ar"))
from autoregressive.models import gpt
from common import case, left_padded, randomise

generator = torch.Generator().manual_seed(21)


def draw(*shape):
    return torch.randn(*shape, generator=generator)


def save(folder, name, inputs, output, tuned=None):
    """Without `tuned` the output alone; with it a cotangent and the gradients of the adapter, which is saved too."""
    tensors = {f"input.{k}": v for k, v in inputs.items()} | {"output": output}
    if tuned is not None:
        tensors["cotangent"] = draw(*output.shape)
        (output * tensors["cotangent"]).sum().backward()
        tensors |= {f"grad.{k}": p.grad for k, p in tuned.named_parameters() if "lora_" in k}
        out = folder / f"adapter-{name}"
        tuned.save_pretrained(out)
        (out / "README.md").unlink()
        # Nothing of the machine, and sets in order.
        written = json.loads((out / "adapter_config.json").read_text())
        written |= {"base_model_name_or_path": None, "target_modules": sorted(written["target_modules"])}
        (out / "adapter_config.json").write_text(json.dumps(written, indent=2) + "\n")
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, folder / f"reference-{name}.safetensors")


def tune(model, targets, **config):
    """The model with an adapter whose B is not zero."""
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **config))
    with torch.no_grad():
        for key, p in tuned.named_parameters():
            if "lora_B" in key:
                p.copy_(0.2 * draw(*p.shape))
    return tuned


def long_captions():
    """More caption positions than the 120 rows that the null condition always has."""
    folder = case("llamagen-gpt", "long-captions")
    args = gpt.ModelArgs(
        model_type="t2i", dim=8, n_layer=1, n_head=2, multiple_of=4, vocab_size=7, cls_token_num=123, block_size=9,
        caption_dim=2, token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0, class_dropout_prob=0.0,
    )
    model = gpt.Transformer(args).train()
    randomise(model, generator)
    (folder / "model").mkdir()
    torch.save({"model": model.state_dict()}, folder / "model" / "model.pt")
    (folder / "model" / "config.json").write_text(json.dumps(dataclasses.asdict(args), indent=2) + "\n")
    tokens = torch.randint(7, (2, 5), generator=generator)
    caption_mask = left_padded([123, 40], 123)
    n = 123 + 5
    mask = torch.tril(torch.ones(n, n))[None].repeat(2, 1, 1)
    mask[:, :, :123] *= caption_mask[:, None]
    mask = (mask * (1 - torch.eye(n)) + torch.eye(n)).bool()[:, None]
    inputs = {"caption_embeddings": draw(2, 123, 2), "caption_mask": caption_mask, "tokens": tokens}
    save(folder, "logits", inputs, model(idx=tokens, cond_idx=inputs["caption_embeddings"], mask=mask)[0])


def chameleon():
    """Another activation, and a sequence beyond the model's positions."""
    folder = case("chameleon", "gelu-beyond-its-positions")
    config = ChameleonConfig(
        vocab_size=30, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, hidden_act="gelu", max_position_embeddings=10,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0}, vocabulary_map={"<image>": 29},
        vq_config={"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "num_embeddings": 4,
                   "embed_dim": 2, "latent_channels": 2},
    )
    model = ChameleonForConditionalGeneration(config).eval()
    randomise(model, generator)
    model.save_pretrained(folder / "model")
    # The transformer alone.
    file = folder / "model" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "vqmodel" not in k}, file)
    # transformers masks the logits of image tokens, which proxytune does not.
    tuned = tune(model, ["v_proj", "gate_proj", "lm_head"], r=2, lora_alpha=3)
    ids = torch.randint(29, (1, 14), generator=generator)
    hidden = tuned.base_model.model.model(input_ids=ids).last_hidden_state
    save(folder, "logits", {"input_ids": ids}, tuned.base_model.model.lm_head(hidden), tuned)


def vit():
    """Images and patches that are no squares."""
    folder = case("dino", "oblong")
    model = ViTModel(
        ViTConfig(
            hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=[10, 16],
            patch_size=[5, 3], hidden_act="relu",
        ),
        add_pooling_layer=False,
    ).eval()
    randomise(model, generator)
    model.save_pretrained(folder / "model")
    tuned = tune(model, ["q_proj", "fc1"], r=2, lora_alpha=3)
    pixels = draw(2, 3, 10, 16)
    save(folder, "renamed", {"pixel_values": pixels}, tuned(pixel_values=pixels).last_hidden_state[:, 0], tuned)


def sd3():
    """The other norms of queries and keys."""
    for name, qk_norm in [("layer-norm", "layer_norm"), ("norm-without-weights", "fp32_layer_norm")]:
        folder = case("sd3-transformer", name)
        model = SD3Transformer2DModel(
            sample_size=4, patch_size=1, in_channels=2, out_channels=2, num_layers=2, attention_head_dim=4,
            num_attention_heads=1, joint_attention_dim=3, caption_projection_dim=4, pooled_projection_dim=3,
            pos_embed_max_size=4, qk_norm=qk_norm, dual_attention_layers=(0,),
        )
        randomise(model, generator)
        model.save_pretrained(folder / "model")
        inputs = {
            "hidden_states": draw(2, 2, 3, 4),
            "timestep": torch.tensor([20.0, 900.0]),
            "encoder_hidden_states": draw(2, 3, 3),
            "pooled_projections": draw(2, 3),
        }
        tuned = tune(model, ["to_q", "add_k_proj"], r=1, lora_alpha=2)
        save(folder, "adapted", inputs, tuned(**inputs).sample, tuned)


def vae():
    """Another activation in the residual blocks, which is not that of the last norms."""
    folder = case("vae", "mish")
    model = AutoencoderKL(
        block_out_channels=(2, 4), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=2, norm_num_groups=2, mid_block_add_attention=False,
        act_fn="mish",
    )
    randomise(model, generator)
    model.save_pretrained(folder / "model")
    image, latents = 3 * draw(1, 3, 4, 6), 3 * draw(1, 2, 2, 3)
    with torch.no_grad():
        save(folder, "decoder", {"latents": latents}, model.decode(latents).sample)
    tuned = tune(model, ["encoder.down_blocks.1.resnets.0.conv1", "encoder.conv_in"], r=1, lora_alpha=2)
    save(folder, "encoder", {"sample": image}, tuned.base_model.model.encode(image).latent_dist.mean, tuned)


long_captions()
chameleon()
vit()
sd3()
vae()
