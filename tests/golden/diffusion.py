"""Writes sd3-transformer/, sd3-pipeline/, vae/ and scheduler/ beside this file: tiny random checkpoints saved by diffusers, adapters
saved by diffusers and peft, and what the reference computes with them.

    python diffusion.py        (diffusers 0.42.1, peft, torch, safetensors)
"""

import copy
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

HERE = Path(__file__).parent
TARGETS = [
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
]


def randomise(model, generator):
    """Norm weights and biases start at one and zero: move them, so that a forgotten one shows."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def save(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().float().contiguous() for name, t in tensors.items()}, path)


def sort_metadata(path):
    """The library writes the entries of a file's metadata in any order: put them in theirs, for equal files."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def small_gradients(model, is_base):
    """Gradients of the weights themselves, as training from scratch needs them: the small ones reach everywhere."""
    return {
        f"grad.{name.replace('.base_layer', '')}": p.grad
        for name, p in model.named_parameters()
        if is_base(name) and p.grad is not None and p.numel() <= 600
    }


def transformer_case(name, seed, batch, height, width, tokens, rank, alpha, **config):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(**config)
    randomise(model, generator)
    out = HERE / "sd3-transformer" / name
    model.save_pretrained(out / "model")

    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights="gaussian")
    model.add_adapter(lora)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        if "lora_B" in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    metadata = model.peft_config["default"].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])
    StableDiffusion3Pipeline.save_lora_weights(
        out / "adapter",
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=metadata,
    )
    sort_metadata(out / "adapter" / "pytorch_lora_weights.safetensors")

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {
        "hidden_states": draw(batch, config["in_channels"], height, width),
        "timestep": 1000 * torch.rand(batch, generator=generator),
        "encoder_hidden_states": draw(batch, tokens, config["joint_attention_dim"]),
        "pooled_projections": draw(batch, config["pooled_projection_dim"]),
    }
    output = model(**inputs).sample
    cotangent = draw(*output.shape)
    (output * cotangent).sum().backward()
    reference = {f"input.{key}": value for key, value in inputs.items()}
    reference |= {"output": output, "cotangent": cotangent}
    base = small_gradients(model, lambda key: "lora_" not in key)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            reference[f"grad.transformer.{key.replace('.default', '')}"] = parameter.grad
    save(out / "reference.safetensors", reference)
    save(out / "base_gradients.safetensors", base)

    # ten guided steps, as the pipeline takes them
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    latents, negative = draw(*inputs["hidden_states"].shape), draw(*inputs["encoder_hidden_states"].shape)
    negative_pooled = draw(*inputs["pooled_projections"].shape)
    sampling = {"noise": latents, "negative_context": negative, "negative_pooled": negative_pooled}
    with torch.no_grad():
        for t in scheduler.timesteps:
            velocity = model(
                hidden_states=torch.cat([latents] * 2),
                timestep=t.expand(2 * batch),
                encoder_hidden_states=torch.cat([negative, inputs["encoder_hidden_states"]]),
                pooled_projections=torch.cat([negative_pooled, inputs["pooled_projections"]]),
            ).sample
            without, with_text = velocity.chunk(2)
            latents = scheduler.step(without + 4.5 * (with_text - without), t, latents).prev_sample
    save(out / "sampling.safetensors", sampling | {"latents": latents})


def vae_case(name, seed, batch, height, width, **config):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = AutoencoderKL(**config)
    randomise(model, generator)
    out = HERE / "vae" / name
    model.save_pretrained(out / "model")

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    factor = 2 ** (len(config["block_out_channels"]) - 1)
    sample = 2 * torch.rand(batch, 3, height * factor, width * factor, generator=generator) - 1
    latents = draw(batch, config["latent_channels"], height, width)

    for file, compute, key, value in [
        ("reference", lambda x: model.encode(x).latent_dist, "input.sample", sample),
        ("reference_decode", lambda x: model.decode(x).sample, "input.latents", latents),
    ]:
        model.zero_grad(set_to_none=True)
        output = compute(value)
        extra = {}
        if file == "reference":
            extra = {"logvar": output.logvar}
            output = output.mean
        cotangent = draw(*output.shape)
        (output * cotangent).sum().backward()
        save(out / f"{file}.safetensors", {key: value, "output": output, "cotangent": cotangent})
        save(out / f"base_gradients_{key[6:]}.safetensors", small_gradients(model, lambda key: True) | extra)


def tokenizer(specials, single, pad, length):
    words = [*specials, "a", "photo", "of", "sks", "dog", "on", "the", "beach", "cat", "!"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    used = [(word, vocabulary[word]) for word in single.split() if word in vocabulary]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, model_max_length=length), vocabulary


def pipeline_case():
    """The whole model with every text encoder: prompts to conditioning to images."""
    generator = torch.Generator().manual_seed(6)
    torch.manual_seed(6)
    start, end = "<|startoftext|>", "<|endoftext|>"
    parts = {}
    # the first pads with its end token, the second with "!", and finds the end of a text at the largest id
    for suffix, width, pad, specials in [("", 16, end, [start, end]), ("_2", 8, "!", [start])]:
        made, vocabulary = tokenizer([*specials], f"{start} $A {end}" if not suffix else f"{start} $A", pad, 12)
        parts[f"tokenizer{suffix}"] = made
        parts[f"text_encoder{suffix}"] = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=20, hidden_size=width, intermediate_size=24, projection_dim=width - 2,
                num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12,
                hidden_act="gelu" if suffix else "quick_gelu",
                eos_token_id=2 if suffix else vocabulary[end],
            )
        )
    parts["tokenizer_3"], _ = tokenizer(["<pad>", "</s>"], "$A </s>", "<pad>", 256)
    parts["text_encoder_3"] = T5EncoderModel(
        T5Config(vocab_size=20, d_model=28, d_kv=6, d_ff=20, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    )
    parts["transformer"] = SD3Transformer2DModel(
        sample_size=6, patch_size=2, in_channels=3, out_channels=3, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=28, caption_projection_dim=16, pooled_projection_dim=20,
        pos_embed_max_size=6,
    )
    parts["vae"] = AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, norm_num_groups=2, shift_factor=0.1,
        scaling_factor=1.3, use_quant_conv=False, use_post_quant_conv=False,
    )
    for name, part in parts.items():
        if not name.startswith("tokenizer"):
            randomise(part.eval(), generator)
    pipeline = StableDiffusion3Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    out = HERE / "sd3-pipeline" / "tiny"
    pipeline.save_pretrained(out)

    prompts = ["a photo of sks dog", "a cat on the beach a cat on the beach a cat on the beach"]
    noise = torch.randn(2, 3, 6, 4, generator=generator)
    tensors = {"noise": noise}
    for name in ["with_t5", "without_t5"]:
        with torch.no_grad():
            context, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
            images = pipeline(
                prompts, height=12, width=8, num_inference_steps=4, guidance_scale=3.0, latents=noise.clone(),
                output_type="pt", max_sequence_length=256,
            ).images
        tensors |= {f"{name}.context": context[:, :40], f"{name}.rest": context[:, 40:].mean(1)}
        tensors |= {f"{name}.pooled": pooled, f"{name}.images": images * 2 - 1}
        pipeline.text_encoder_3 = None
    save(out / "reference.safetensors", tensors)


def text_to_image_case():
    """The whole of what pipeline_case saved, as `proxytune verify text-to-image` takes it."""
    out = HERE / "sd3-pipeline" / "tiny"
    pipeline = StableDiffusion3Pipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    for name, settings in [
        ("negative", {"negative_prompt": ["a cat", "the beach"], "max_sequence_length": 40, "guidance_scale": 4.0}),
        ("empty", {"guidance_scale": 7.0, "max_sequence_length": 256}),
    ]:
        settings |= {
            "prompt": ["a photo of sks dog", "a cat on the beach"], "height": 16, "width": 12,
            "num_inference_steps": 20,
        }
        latents = torch.randn(2, 3, 8, 6, generator=generator)
        with torch.no_grad():
            ended = pipeline(latents=latents.clone(), output_type="latent", **settings).images
            images = pipeline(latents=latents.clone(), output_type="pt", **settings).images
        tensors = {"input.latents": latents, "output.latents": ended, "output.image": images}
        path = out / f"reference-{name}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, {k: json.dumps(v) for k, v in settings.items()})
        sort_metadata(path)


def guided_in(pipeline, start, stop, guidance_scale, num_inference_steps):
    """Arguments with which `pipeline` guides a part of its steps alone, as `ClassifierFreeGuidance(start=, stop=)` of diffusers'
    modular pipelines does: steps int(start * n) to int(stop * n) - 1. A scale just above 1 keeps both predictions and takes
    the one with the text."""
    guided = range(int(start * num_inference_steps), int(stop * num_inference_steps))

    def scale(step):
        return guidance_scale if step in guided else 1 + 1e-12

    def set_next(pipeline, step, _timestep, _tensors):
        pipeline._guidance_scale = scale(step + 1)
        return {}

    return dict(guidance_scale=scale(0), num_inference_steps=num_inference_steps, callback_on_step_end=set_next)


def guidance_interval_case(folder, pipeline, channels):
    """A part of the steps guided, as `proxytune verify text-to-image` takes it."""
    out = HERE / folder
    pipeline = pipeline.from_pretrained(out, **({"variant": "fp16"} if "sdxl" in folder else {}))
    pipeline.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(2, channels, 8, 12, generator=torch.Generator().manual_seed(8))
    settings = dict(prompt=["a dog in the sks", "a cat"], negative_prompt=["a cat", "the beach"], height=16, width=24)
    told = dict(guidance_scale=4.0, num_inference_steps=12, guidance_start=0.2, guidance_stop=0.7)
    part = guided_in(pipeline, told["guidance_start"], told["guidance_stop"], 4.0, 12)
    if "sd3" in folder:
        settings["max_sequence_length"] = 40
    with torch.no_grad():
        ended = pipeline(latents=latents.clone(), output_type="latent", **settings, **part).images
        image = pipeline(latents=latents.clone(), output_type="pt", **settings, **part).images
    path = out / "reference-interval.safetensors"
    if "sdxl" in folder:
        path = out.parent / path.name
    metadata = {key: json.dumps(value) for key, value in (settings | told).items()}
    tensors = {"input.latents": latents, "output.latents": ended, "output.image": image}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    sort_metadata(path)


def scheduler_case():
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for shift in [1.0, 3.0, 2.5]:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        tensors[f"training.{shift}"] = scheduler.sigmas.clone()
        for steps in [1, 4, 28]:
            fresh = copy.deepcopy(scheduler)
            fresh.set_timesteps(steps)
            tensors[f"sigmas.{shift}.{steps}"] = fresh.sigmas
            tensors[f"timesteps.{shift}.{steps}"] = fresh.timesteps
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    sample, velocity = (torch.randn(2, 4, 3, 5, generator=generator) for _ in range(2))
    scheduler.set_begin_index(11)
    stepped = scheduler.step(velocity, scheduler.timesteps[11], sample).prev_sample
    tensors |= {"step.sample": sample, "step.velocity": velocity, "step.output": stepped}

    # the loss of train_dreambooth_lora_sd3.py, its lines written out
    training = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise, velocity = (torch.randn(3, 4, 6, 5, generator=generator) for _ in range(3))
    indices = torch.tensor([0, 431, 998])
    sigmas = training.sigmas[indices].reshape(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    weighting = compute_loss_weighting_for_sd3("logit_normal", sigmas=sigmas)

    def mean(difference):
        return torch.mean((weighting.float() * difference.float() ** 2).reshape(3, -1), 1).mean()

    tensors |= {
        "loss.latents": latents,
        "loss.noise": noise,
        "loss.velocity": velocity,
        "loss.indices": indices,
        "loss.timesteps": training.timesteps[indices],
        "loss.noisy": noisy,
        "loss.preconditioned": mean(velocity * (-sigmas) + noisy - latents).reshape(1),
        "loss.velocity_target": mean(velocity - (noise - latents)).reshape(1),
    }
    save(HERE / "scheduler" / "flow_match.safetensors", tensors)


def noise_levels_case():
    """What diffusers draws noise levels by, beside what it was drawn from, and what their losses weigh."""
    count, tensors = 64, {}

    def drawn(name, **settings):
        generator = torch.Generator().manual_seed(6)
        settings = dict(logit_mean=0.0, logit_std=1.0, mode_scale=1.29) | settings
        u = compute_density_for_timestep_sampling(
            settings.pop("scheme"), batch_size=count, device="cpu", generator=generator, **settings
        )
        tensors[f"u.{name}"] = u
        tensors[f"indices.{name}"] = (u * 1000).long()

    tensors["normal"] = torch.normal(0.0, 1.0, (count,), generator=torch.Generator().manual_seed(6))
    tensors["even"] = torch.rand(count, generator=torch.Generator().manual_seed(6))
    drawn("logit_normal", scheme="logit_normal")
    drawn("logit_normal.moved", scheme="logit_normal", logit_mean=-0.5, logit_std=1.7)
    drawn("mode", scheme="mode")
    drawn("mode.ends", scheme="mode", mode_scale=-0.6)
    for scheme in ["none", "cosmap", "sigma_sqrt"]:
        drawn(scheme, scheme=scheme)
    training = FlowMatchEulerDiscreteScheduler(shift=3.0)
    indices = torch.tensor([0, 17, 431, 800, 999])
    sigmas = training.sigmas[indices]
    tensors |= {"indices": indices, "sigmas": sigmas}
    for scheme in ["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"]:
        tensors[f"weights.{scheme}"] = compute_loss_weighting_for_sd3(scheme, sigmas=sigmas).float()
    # The loss of train_dreambooth_lora_sd3.py, its lines written out.
    generator = torch.Generator().manual_seed(7)
    latents, noise, velocity = (torch.randn(5, 2, 3, 4, generator=generator) for _ in range(3))
    tensors |= {"latents": latents, "noise": noise, "velocity": velocity}
    sigmas = sigmas.reshape(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    for form, difference in [
        ("preconditioned", velocity * (-sigmas) + noisy - latents),
        ("velocity", velocity - (noise - latents)),
    ]:
        for scheme in ["cosmap", "sigma_sqrt"]:
            weighting = compute_loss_weighting_for_sd3(scheme, sigmas=sigmas)
            each = torch.mean((weighting.float() * difference.float() ** 2).reshape(5, -1), 1)
            tensors[f"loss.{scheme}.{form}"] = each.mean().reshape(1)
    save(HERE / "scheduler" / "noise_levels.safetensors", tensors)


if __name__ == "__main__":
    transformer_case(
        "sd3", 1, batch=2, height=8, width=8, tokens=7, rank=4, alpha=6,
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=20, caption_projection_dim=32, pooled_projection_dim=12,
        pos_embed_max_size=8,
    )
    transformer_case(
        "sd35", 2, batch=3, height=10, width=6, tokens=4, rank=2, alpha=5,
        sample_size=8, patch_size=2, in_channels=6, out_channels=6, num_layers=2, attention_head_dim=8,
        num_attention_heads=3, joint_attention_dim=16, caption_projection_dim=24, pooled_projection_dim=10,
        pos_embed_max_size=9, qk_norm="rms_norm", dual_attention_layers=(0,),
    )
    vae_case(
        "kl-f2", 3, batch=3, height=5, width=3, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3, norm_num_groups=4, shift_factor=0.06, scaling_factor=1.5,
        use_quant_conv=False, use_post_quant_conv=False,
    )
    vae_case(
        "kl-f4-quant", 4, batch=1, height=3, width=5, block_out_channels=(8, 8, 12), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4, norm_num_groups=4,
    )
    scheduler_case()
    noise_levels_case()
    pipeline_case()
    text_to_image_case()
    guidance_interval_case("sd3-pipeline/tiny", StableDiffusion3Pipeline, 3)
    # What sdxl.py has saved.
    guidance_interval_case("text-to-image/sdxl-euler/model", StableDiffusionXLPipeline, 4)
