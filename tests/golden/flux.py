"""Writes flux-transformer/, text-to-image/flux and flux-training/ beside this file: tiny random checkpoints saved by
diffusers, adapters saved by diffusers, and what the reference computes with them, gradients of the adapters included.

    python flux.py        (diffusers 0.42.1, peft 0.21, transformers 5.24, torch, safetensors)
"""

import json
import shutil

import sdxl
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast

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


def t5_tokenizer(folder):
    """A sentencepiece model as T5 has it, of few pieces."""
    pieces = ["a", "the", "photo", "of", "sks", "dog", "cat", "in", "on", "beach", "s", "d", "o", "g", "c", "t", "h", "e"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [("\u2581" + piece, -2.0 - len(piece) / 10) for piece in pieces[:10]] + [("\u2581", -3.0)]
    vocabulary += [(piece, -4.0) for piece in pieces] + [(mark, -5.0) for mark in "!.,"]
    made = Tokenizer(models.Unigram(list(dict(vocabulary).items()), unk_id=2))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_ids=0, model_max_length=512)
    T5TokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    return T5TokenizerFast.from_pretrained(folder)


def pipeline(seed, name, guidance_embeds, **schedule):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    out = sdxl.case("text-to-image", name)
    clip_tokenizer = sdxl.tokenizer(out / "tokenizers" / "clip", "<|endoftext|>")
    tokenizer_2 = t5_tokenizer(out / "tokenizers" / "t5")
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=531, hidden_size=6, intermediate_size=10, projection_dim=5, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=12, hidden_act="quick_gelu", eos_token_id=530, bos_token_id=529,
        )
    ).eval()
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2), d_model=10, d_kv=4, d_ff=12, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu", dropout_rate=0.0,
        )
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=(4, 6), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=2, norm_num_groups=2, scaling_factor=0.3611,
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=10, pooled_projection_dim=6, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 4, 2),
    ).eval()
    for part in [clip, t5, vae, transformer]:
        sdxl.randomise(part, generator)
    scheduler = FlowMatchEulerDiscreteScheduler(**schedule)
    made = FluxPipeline(
        scheduler=scheduler, vae=vae, text_encoder=clip, tokenizer=clip_tokenizer, text_encoder_2=t5,
        tokenizer_2=tokenizer_2, transformer=transformer,
    )
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(out / "model")
    shutil.rmtree(out / "model/tokenizer")
    shutil.move(out / "tokenizers/clip", out / "model/tokenizer")
    shutil.rmtree(out / "tokenizers")
    return made, out, generator


def text_to_image(made, out, generator, name, **settings):
    h, w = settings["height"] // 4, settings["width"] // 4
    latents = torch.randn(len(settings["prompt"]), h * w, 8, generator=generator)
    with torch.no_grad():
        ended = made(latents=latents.clone(), output_type="latent", **settings).images
        image = made(latents=latents.clone(), output_type="pt", **settings).images
    tensors = {"input.latents": latents, "output.latents": ended, "output.image": image}
    sdxl.save(out / f"reference-{name}.safetensors", tensors, {key: json.dumps(value) for key, value in settings.items()})


def training_step(made, generator):
    """One step of train_dreambooth_lora_flux.py with guidance_scale=1 and weighting_scheme="none", its lines written out,
    without class images and with them."""
    out = sdxl.case("flux-training", "dev")
    model = made.transformer
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights="gaussian"))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    metadata = model.peft_config["default"].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])
    FluxPipeline.save_lora_weights(
        out / "adapter", transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=metadata,
    )
    sort_metadata(out / "adapter" / "pytorch_lora_weights.safetensors")
    learnt = [p for key, p in model.named_parameters() if "lora_" in key]
    start = [p.detach().clone() for p in learnt]
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    pixels = torch.rand(4, 3, 16, 24, generator=generator) * 2 - 1
    posterior_noise, noise = draw(4, 2, 8, 12), draw(4, 2, 8, 12)
    indices = torch.tensor([3, 400, 999, 710])
    tensors = {"pixels": pixels, "posterior_noise": posterior_noise, "noise": noise, "indices": indices}
    schedule, vae = made.scheduler, made.vae
    sigmas = (torch.arange(1000, 0, -1) / 1000).to(torch.float32)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * posterior_noise
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        context, pooled, text_ids = made.encode_prompt(["a sks dog", "a dog"], None, max_sequence_length=512)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
    for name, batch in [("alone", 2), ("with_prior", 4)]:
        with torch.no_grad():
            for p, value in zip(learnt, start):
                p.copy_(value)
        optimizer = torch.optim.AdamW(learnt, lr=1e-2, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
        whose = torch.tensor([0, 0, 1, 1])[:batch]
        sigma = sigmas[indices[:batch]].reshape(-1, 1, 1, 1)
        noisy = (1.0 - sigma) * latents[:batch] + sigma * noise[:batch]
        packed = FluxPipeline._pack_latents(noisy, batch, 2, 8, 12)
        output = model(
            hidden_states=packed, timestep=sigma.flatten(), guidance=torch.ones(batch), pooled_projections=pooled[whose],
            encoder_hidden_states=context[whose], txt_ids=text_ids, img_ids=image_ids, return_dict=False,
        )[0]
        output = FluxPipeline._unpack_latents(output, height=16, width=24, vae_scale_factor=2)
        target = noise[:batch] - latents[:batch]
        mean = lambda rows: ((output[rows] - target[rows]) ** 2).reshape(2, -1).mean(1).mean()
        loss = mean(slice(0, 2))
        if batch == 4:
            loss = loss + 0.7 * mean(slice(2, 4))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        tensors[f"{name}.loss"] = loss.reshape(1)
        for key, p in model.named_parameters():
            if "lora_" in key:
                tensors[f"{name}.{key.replace('.default', '')}"] = p.detach().clone()
    sdxl.save(out / "step.safetensors", tensors)


def pipeline_cases():
    made, out, generator = pipeline(61, "flux", True, shift=3.0, use_dynamic_shifting=True)
    prompts = ["a photo of sks dog", "the cat!! on a beach, a dog. a dog"]
    size = dict(height=16, width=24, num_inference_steps=20)
    text_to_image(made, out, generator, "default", prompt=prompts, guidance_scale=3.5, **size)
    text_to_image(made, out, generator, "short", prompt=prompts, guidance_scale=1.0, max_sequence_length=8, **size)
    training_step(made, generator)
    # As schnell: few steps at levels that no size moves, and no guidance at all.
    made, out, generator = pipeline(62, "flux-schnell", False, shift=1.0)
    settings = dict(height=16, width=24, guidance_scale=0.0, max_sequence_length=256)
    text_to_image(made, out, generator, "four-steps", prompt=prompts, num_inference_steps=4, **settings)
    text_to_image(made, out, generator, "one-step", prompt=prompts, num_inference_steps=1, **settings)


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
    pipeline_cases()
