"""Writes sdxl-unet/, text-to-image/sdxl-*, sdxl-training/ and scheduler/discrete.safetensors beside this file: tiny
random checkpoints saved by diffusers, adapters saved by diffusers and peft, and what the reference computes with them.

    python sdxl.py        (diffusers 0.42.1, peft 0.21, transformers 5.24, torch, safetensors)
"""

import json
import shutil
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion import sort_metadata

HERE = Path(__file__).parent
TARGETS = ["to_k", "to_out.0", "to_q", "to_v"]


def case(component, name):
    folder = HERE / component / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def randomise(module, generator):
    """Weights large enough that every part of the model shows in its output."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim >= 2:
                p.copy_(noise * (p[0].numel() if "embedding" not in name or "linear" in name else 4) ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.2 * noise)
            else:
                p.copy_(0.3 * noise)


def save(path, tensors, metadata=None):
    save_file({k: v.detach().float().contiguous().clone() for k, v in tensors.items()}, path, metadata)
    if metadata:
        sort_metadata(path)


def unet(generator, half=False, **config):
    settings = dict(
        in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=2, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4,
    )
    model = UNet2DConditionModel(**(settings | config))
    randomise(model, generator)
    # What is written in half precision is what is computed with.
    return model.half().float() if half else model


def unet_inputs(draw, model, batch, height, width, tokens, generator):
    c = model.config
    sizes = torch.randint(1, 1025, (batch, 6), generator=generator).float()
    cross = c.cross_attention_dim
    return {
        "sample": draw(batch, c.in_channels, height, width),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator).float(),
        "encoder_hidden_states": draw(batch, tokens, cross if isinstance(cross, int) else cross[0]),
        "text_embeds": draw(batch, c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim),
        "time_ids": sizes,
    }


def run_unet(model, inputs):
    added = {key: inputs[key] for key in ["text_embeds", "time_ids"]}
    return model(
        inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"], added_cond_kwargs=added
    ).sample


def gradients(model, inputs, draw, name_of):
    output = run_unet(model, inputs)
    cotangent = draw(*output.shape)
    (output * cotangent).sum().backward()
    reference = {f"input.{key}": value for key, value in inputs.items()}
    reference |= {"output": output, "cotangent": cotangent}
    return reference | {
        f"grad.{name_of(key)}": p.grad for key, p in model.named_parameters() if "lora_" in key and p.grad is not None
    }


def add_lora(model, rank, alpha, generator):
    """diffusers' own way, with a B that is not zero."""
    torch.manual_seed(rank)
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights="gaussian")
    model.add_adapter(lora)
    for key, p in model.named_parameters():
        if "lora_B" in key:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)


def save_lora(model, folder):
    metadata = model.peft_config["default"].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])
    StableDiffusionXLPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(model), unet_lora_adapter_metadata=metadata,
    )
    sort_metadata(folder / "pytorch_lora_weights.safetensors")


def three_levels():
    """SDXL's layout: a level without transformers, then deeper ones. Half-precision files, diffusers' adapter."""
    generator = torch.Generator().manual_seed(31)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    out = case("sdxl-unet", "three-levels")
    model = unet(
        generator, half=True, sample_size=8, block_out_channels=(4, 6, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), attention_head_dim=(1, 3, 2), cross_attention_dim=10,
        projection_class_embeddings_input_dim=6 * 4 + 5,
    )
    model.half().save_pretrained(out / "model", variant="fp16")
    model = model.float()
    save_plain(out / "reference-even-sides.safetensors", model, unet_inputs(draw, model, 2, 8, 12, 5, generator))
    save_plain(out / "reference-one-pixel.safetensors", model, unet_inputs(draw, model, 1, 1, 3, 2, generator))
    add_lora(model, rank=2, alpha=5, generator=generator)
    save_lora(model, out / "adapter")
    # Odd sides: halving rounds them up, and the way back has to know.
    inputs = unet_inputs(draw, model, 2, 9, 7, 7, generator)
    name = lambda key: f"unet.{key.replace('.default', '')}"
    save(out / "reference.safetensors", gradients(model, inputs, draw, name))


def save_plain(path, model, inputs):
    with torch.no_grad():
        output = run_unet(model, inputs)
    save(path, {f"input.{key}": value for key, value in inputs.items()} | {"output": output})


def unlike_the_published():
    """What the published config does not do: two layers, a depth for each transformer, ways in and out that are
    convolutions, another order and shift of the sines, another halving, another activation. Shards, peft's adapter on
    layers of every kind."""
    generator = torch.Generator().manual_seed(32)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    out = case("sdxl-unet", "unlike-the-published")
    model = unet(
        generator, sample_size=[6, 10], block_out_channels=(6, 8), layers_per_block=[1, 2], in_channels=3,
        out_channels=5, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=[[2], [1, 2]], reverse_transformer_layers_per_block=[[1, 0, 2], 1],
        attention_head_dim=2, cross_attention_dim=7, use_linear_projection=False, flip_sin_to_cos=False, freq_shift=1,
        downsample_padding=0, act_fn="gelu", norm_eps=1e-3, time_embedding_dim=9, conv_in_kernel=5, conv_out_kernel=1,
        addition_time_embed_dim=5, projection_class_embeddings_input_dim=6 * 5 + 4,
    )
    model.save_pretrained(out / "model", max_shard_size="60KB")
    assert (out / "model/diffusion_pytorch_model.safetensors.index.json").exists()
    targets = [
        "to_q", "to_out.0", "attn2.to_k", "ff.net.0.proj", "ff.net.2", "proj_in", "time_emb_proj", "linear_1", "conv1",
        "conv_shortcut", "conv_in", "downsamplers.0.conv", "upsamplers.0.conv",
    ]
    torch.manual_seed(3)
    config = LoraConfig(
        target_modules=targets, r=1, lora_alpha=3, rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 7},
    )
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for key, p in tuned.named_parameters():
            if "lora_B" in key:
                p.copy_(0.2 * draw(*p.shape))
    tuned.save_pretrained(out / "adapter")
    (out / "adapter/README.md").unlink()
    # Nothing of the machine, and sets in order.
    written = json.loads((out / "adapter/adapter_config.json").read_text())
    written |= {"base_model_name_or_path": None, "target_modules": sorted(targets)}
    (out / "adapter/adapter_config.json").write_text(json.dumps(written, indent=2) + "\n")
    inputs = unet_inputs(draw, model, 2, 7, 10, 4, generator)
    save(out / "reference.safetensors", gradients(tuned, inputs, draw, lambda key: key))


def tokenizer(folder, pad):
    """The files of a published CLIP tokenizer, and what transformers makes of them."""
    folder.mkdir(parents=True)
    for name in ["vocab.json", "merges.txt"]:
        shutil.copy(HERE / "clip-tokenizer/plain" / name, folder)
    config = {
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad,
        "model_max_length": 12, "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def pipeline(name, seed, scheduler, zeros, heads):
    """A whole SDXL in `folder`/model, with the tokenizers as they are published."""
    generator = torch.Generator().manual_seed(seed)
    out = case("text-to-image", name)
    start, end = 529, 530
    tokenizers = [tokenizer(out / "tokenizers" / str(i), pad) for i, pad in enumerate(["<|endoftext|>", "!"])]
    texts = [
        kind(
            CLIPTextConfig(
                vocab_size=531, hidden_size=width, intermediate_size=10, projection_dim=5, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=12, hidden_act=act, eos_token_id=eos, bos_token_id=start,
            )
        ).eval()
        for kind, width, act, eos in [
            (CLIPTextModel, 4, "quick_gelu", end), (CLIPTextModelWithProjection, 6, "gelu", 2),
        ]
    ]
    vae = AutoencoderKL(
        block_out_channels=(4, 6), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=2, scaling_factor=0.13025,
    ).eval()
    denoiser = unet(
        generator, half=True, sample_size=8, block_out_channels=(4, 8), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        attention_head_dim=heads, cross_attention_dim=10, projection_class_embeddings_input_dim=6 * 4 + 5,
    ).eval()
    for part in [*texts, vae]:
        randomise(part, generator)
    parts = dict(zip(["tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"], tokenizers + texts))
    made = StableDiffusionXLPipeline(
        vae=vae, unet=denoiser, scheduler=scheduler, force_zeros_for_empty_prompt=zeros, add_watermarker=False, **parts,
    )
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(out / "model")
    denoiser.half().save_pretrained(out / "model/unet", variant="fp16")
    denoiser.float()
    (out / "model/unet/diffusion_pytorch_model.safetensors").unlink()
    for i, suffix in enumerate(["", "_2"]):
        shutil.rmtree(out / f"model/tokenizer{suffix}")
        shutil.move(out / f"tokenizers/{i}", out / f"model/tokenizer{suffix}")
    (out / "tokenizers").rmdir()
    return made, out, generator


def text_to_image(made, out, generator, name, scheduler=None, **settings):
    """One reference; `scheduler` stands in a copy of the folder's index where it is not the folder's own."""
    if scheduler is not None:
        made.scheduler = scheduler
    h, w = settings["height"], settings["width"]
    latents = torch.randn(len(settings["prompt"]), 4, h // 2, w // 2, generator=generator)
    with torch.no_grad():
        ended = made(latents=latents.clone(), output_type="latent", **settings).images
        image = made(latents=latents.clone(), output_type="pt", **settings).images
    tensors = {"input.latents": latents, "output.latents": ended, "output.image": image}
    save(out / f"reference-{name}.safetensors", tensors, {key: json.dumps(value) for key, value in settings.items()})


def training_step(made, generator):
    """One step of train_dreambooth_lora_sdxl.py, its lines written out, without class images and with them."""
    out = case("sdxl-training", "epsilon")
    model = made.unet
    add_lora(model, rank=3, alpha=6, generator=generator)
    save_lora(model, out / "adapter")
    learnt = [p for key, p in model.named_parameters() if "lora_" in key]
    start = [p.detach().clone() for p in learnt]
    prompts = ["a sks dog", "a dog"]
    pixels = torch.rand(4, 3, 16, 24, generator=generator) * 2 - 1
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    posterior_noise, noise = draw(4, 4, 8, 12), draw(4, 4, 8, 12)
    timesteps = torch.tensor([3, 400, 999, 710])
    originals, crops = [(900, 601), (16, 24), (512, 512), (31, 77)], [(5, 0), (0, 0), (2, 9), (0, 1)]
    tensors = {
        "pixels": pixels, "posterior_noise": posterior_noise, "noise": noise, "timesteps": timesteps,
        "originals": torch.tensor(originals), "crops": torch.tensor(crops),
    }
    schedule = DDPMScheduler.from_config(made.scheduler.config)
    with torch.no_grad():
        posterior = made.vae.encode(pixels).latent_dist
        latents = (posterior.mean + posterior.std * posterior_noise) * made.vae.config.scaling_factor
        context, _, pooled, _ = made.encode_prompt(prompts, do_classifier_free_guidance=False)
    time_ids = torch.tensor([[*original, *crop, 16, 24] for original, crop in zip(originals, crops)]).float()
    for name, batch in [("alone", 2), ("with_prior", 4)]:
        with torch.no_grad():
            for p, value in zip(learnt, start):
                p.copy_(value)
        optimizer = torch.optim.AdamW(learnt, lr=1e-2, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
        # Instances before class images, and so their prompts.
        whose = torch.tensor([0, 0, 1, 1])[:batch]
        noisy = schedule.add_noise(latents[:batch], noise[:batch], timesteps[:batch])
        added = {"text_embeds": pooled[whose], "time_ids": time_ids[:batch]}
        output = model(noisy, timesteps[:batch], context[whose], added_cond_kwargs=added).sample
        loss = F.mse_loss(output[:2].float(), noise[:2].float(), reduction="mean")
        if batch == 4:
            loss = loss + 0.7 * F.mse_loss(output[2:].float(), noise[2:4].float(), reduction="mean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        tensors[f"{name}.loss"] = loss.reshape(1)
        for key, p in model.named_parameters():
            if "lora_" in key:
                tensors[f"{name}.{key.replace('.default', '')}"] = p.detach().clone()
    save(out / "step.safetensors", tensors)


def text_to_image_cases():
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    prompts = ["a dog in the sks", "the cat!! a CAT's 12 dogs... in å¼ a dog in the sks, a dog"]
    euler = EulerDiscreteScheduler(timestep_spacing="leading", **betas)
    made, out, generator = pipeline("sdxl-euler", 41, euler, zeros=True, heads=(1, 2))
    size = dict(height=16, width=24, num_inference_steps=20)
    text_to_image(made, out, generator, "zeros", prompt=prompts, guidance_scale=5.0, **size)
    text_to_image(
        made, out, generator, "negative", prompt=prompts, negative_prompt=["a cat", ""], guidance_scale=7.5, **size
    )
    text_to_image(made, out, generator, "unguided", prompt=prompts[:1], guidance_scale=1.0, **size | {"height": 8})
    training_step(made, generator)
    dpm = DPMSolverMultistepScheduler(use_karras_sigmas=True, prediction_type="v_prediction", **betas)
    made, out, generator = pipeline("sdxl-dpm", 42, dpm, zeros=False, heads=(2, 4))
    text_to_image(made, out, generator, "empty", prompt=prompts, guidance_scale=4.0, **size)
    text_to_image(
        made, out, generator, "negative", prompt=prompts, negative_prompt=["the dog", "a cat"], guidance_scale=5.0,
        **size
    )
    text_to_image(
        made, out, generator, "few-steps", prompt=prompts, guidance_scale=3.0, height=24, width=8, num_inference_steps=6
    )


def schedulers():
    """Levels of every kind, and what each sampler makes of a model that is a function."""
    tensors = {}
    sdxl = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    kinds = {"EulerDiscreteScheduler": EulerDiscreteScheduler, "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler}
    settings = {
        "leading": ("EulerDiscreteScheduler", sdxl | dict(timestep_spacing="leading", steps_offset=1)),
        "linspace": ("EulerDiscreteScheduler", sdxl),
        "trailing-v-zero-snr": (
            "EulerDiscreteScheduler",
            sdxl | dict(timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True),
        ),
        "karras": ("EulerDiscreteScheduler", sdxl | dict(use_karras_sigmas=True, prediction_type="sample")),
        "log-linear": ("EulerDiscreteScheduler", dict(interpolation_type="log_linear", final_sigmas_type="sigma_min")),
        "cosine": ("EulerDiscreteScheduler", dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=300)),
        "dpm-karras": ("DPMSolverMultistepScheduler", sdxl | dict(use_karras_sigmas=True)),
        "dpm-linspace-v": ("DPMSolverMultistepScheduler", sdxl | dict(prediction_type="v_prediction")),
        "dpm-leading": (
            "DPMSolverMultistepScheduler",
            sdxl | dict(timestep_spacing="leading", steps_offset=1, final_sigmas_type="sigma_min"),
        ),
        "dpm-trailing-clipped": (
            "DPMSolverMultistepScheduler",
            dict(
                beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", lambda_min_clipped=-5.1,
                euler_at_final=True, prediction_type="sample",
            ),
        ),
        "dpm-first-order": ("DPMSolverMultistepScheduler", sdxl | dict(solver_order=1)),
    }
    generator = torch.Generator().manual_seed(51)
    noise = torch.randn(2, 1, 3, 4, generator=generator)
    tensors["noise"] = noise
    metadata = {}
    for name, (kind, config) in settings.items():
        scheduler = kinds[kind](**config)
        metadata[name] = json.dumps({"_class_name": kind} | config)
        tensors[f"{name}.alphas_cumprod"] = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
        for steps in [1, 7, 20]:
            scheduler.set_timesteps(steps)
            tensors[f"{name}.{steps}.timesteps"] = scheduler.timesteps
            tensors[f"{name}.{steps}.sigmas"] = scheduler.sigmas
            scheduler.set_begin_index(0)
            sample = noise * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                output = torch.tanh(scheduler.scale_model_input(sample, t)) * (0.5 + t / 2000)
                sample = scheduler.step(output, t, sample).prev_sample
            tensors[f"{name}.{steps}.sample"] = sample
    # Tables are long and smooth: every 37th.
    tensors = {k: v[::37] if k.endswith("alphas_cumprod") else v for k, v in tensors.items()}

    # The loss of train_dreambooth_lora_sdxl.py, its lines written out.
    latents, output = torch.randn(2, 3, 4, 3, 2, generator=generator)
    grain = torch.randn(3, 4, 3, 2, generator=generator)
    timesteps = torch.tensor([0, 431, 999])
    tensors |= {"loss.latents": latents, "loss.noise": grain, "loss.output": output, "loss.timesteps": timesteps}
    for prediction in ["epsilon", "v_prediction", "sample"]:
        scheduler = DDPMScheduler(prediction_type=prediction, **sdxl)
        noisy = scheduler.add_noise(latents, grain, timesteps)
        target = {"epsilon": grain, "sample": latents}.get(prediction)
        if target is None:
            target = scheduler.get_velocity(latents, grain, timesteps)
        tensors["loss.noisy"] = noisy
        loss = F.mse_loss(output, target, reduction="mean")
        snr = compute_snr(scheduler, timesteps)
        weights = torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / snr
        weights = weights + 1 if prediction == "v_prediction" else weights
        each = F.mse_loss(output, target, reduction="none")
        weighted = (each.mean(dim=list(range(1, len(each.shape)))) * weights).mean()
        tensors |= {f"loss.{prediction}": loss.reshape(1), f"loss.{prediction}.snr": weighted.reshape(1)}
    save(HERE / "scheduler/discrete.safetensors", tensors, metadata)


if __name__ == "__main__":
    three_levels()
    unlike_the_published()
    text_to_image_cases()
    schedulers()
