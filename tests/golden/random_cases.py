"""Random tiny models, as their reference libraries compute them, against `proxytune verify`:

LLAMAGEN=path/to/LlamaGen python tests/golden/random_cases.py COMPONENT[,COMPONENT] FIRST LAST
    [--program PATH] [--keep DIR]

For each seed from FIRST to LAST: a configuration is drawn, the library saves the model with a LoRA adapter, its inputs,
outputs and gradients are recorded, and one line says whether proxytune computes the same. The configuration of a case
that differs follows its line; --keep leaves the cases in DIR, as COMPONENT-SEED. Exit code 1 if any differs.
The component chameleon-vq also needs the package einops.
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import peft
import torch
import yaml
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import save_file
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, os.environ["LLAMAGEN"])
sys.path.insert(0, str(Path(__file__).resolve().parent / "ar"))
from autoregressive.models import gpt
from common import left_padded, randomise
from tokenizer.tokenizer_image import vq_model as vq


class Case:
    """The random choices of one seed, the folder they are saved in and what `proxytune verify` said."""

    def __init__(self, component, seed, folder, program):
        self.component, self.folder, self.program = component, folder, program
        self.model = folder / "model"
        self.random = random.Random(f"{component} {seed}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(32))
        torch.manual_seed(self.random.getrandbits(32))
        self.config = {}
        self.equal, self.outputs, self.gradients, self.errors = True, [], [], []

    def choose(self, *values):
        return self.random.choice(values)

    def chance(self, probability):
        return self.random.random() < probability

    def between(self, low, high):
        return self.random.randint(low, high)

    def some(self, values, least):
        return self.random.sample(values, self.between(least, len(values)))

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def ids(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.generator)

    def tune(self, model, targets):
        """The model with an adapter whose B is not zero."""
        r = self.choose(1, 2, 3, 4, 5, 8, 9, 17)
        config = {"r": r, "lora_alpha": self.choose(*[a for a in (1, 2, 3, 5, 7, 12, 16, 20) if a != r and a < 4 * r])}
        config |= {"target_modules": targets, "use_rslora": self.chance(0.2)}
        if self.chance(0.3):
            config["rank_pattern"] = {self.choose(*targets): self.choose(1, 2, 6)}
        if self.chance(0.3):
            config["alpha_pattern"] = {self.choose(*targets): self.choose(1, 3, 4)}
        self.config["adapter"] = config
        tuned = peft.get_peft_model(model, peft.LoraConfig(**config))
        with torch.no_grad():
            for key, p in tuned.named_parameters():
                if "lora_B" in key:
                    p.copy_(0.15 * self.draw(*p.shape))
        tuned.save_pretrained(self.folder / "adapter", save_embedding_layers=False)
        return tuned

    def compare(self, inputs, outputs, tuned=None, name="reference", watched=1):
        """Records outputs, with `tuned` gradients too, and verifies them. Cotangents are zero where `watched` is."""
        tensors = {f"input.{k}": v for k, v in inputs.items()}
        tensors |= {f"output.{k}".rstrip("."): v for k, v in outputs.items()}
        if tuned is not None:
            cotangents = {k: self.draw(*v.shape) * watched for k, v in outputs.items()}
            tensors |= {f"cotangent.{k}".rstrip("."): v for k, v in cotangents.items()}
            tuned.zero_grad()
            sum((outputs[k] * cotangents[k]).sum() for k in outputs).backward()
            for key, p in tuned.named_parameters():
                if "lora_" in key and p.grad is not None:
                    tensors[f"grad.{key}"] = p.grad
        self.config[name] = {k: list(v.shape) for k, v in inputs.items()}
        file = self.folder / f"{name}.safetensors"
        save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, file)
        self.verify(file, tuned is not None)

    def verify(self, file, adapter):
        command = [self.program, "verify", self.component, "--model", self.model, "--reference", file, "--json"]
        if adapter:
            command += ["--adapter", self.folder / "adapter"]
        done = subprocess.run(command, capture_output=True, text=True)
        self.equal &= done.returncode == 0
        if done.returncode in (0, 1):
            report = json.loads(done.stdout)
            self.outputs += report["outputs"]
            self.gradients += report["gradients"]
        else:
            self.errors.append(next(iter(done.stderr.splitlines()), f"exit code {done.returncode}"))

    def line(self, seed):
        parts = [f"{'equal' if self.equal else 'different'} {self.component} {seed}"]
        for found in (self.outputs, self.gradients):
            if found:
                worst = max(found, key=lambda f: (not f["passed"], error(f)))
                parts.append(f"{worst['name']} {error(worst):.1e}")
        return " | ".join(parts + self.errors)


def error(found):
    """JSON has no infinity."""
    return math.inf if found["error"] is None else found["error"]


def shift(case, model):
    """Biases and norms away from 0 and 1."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * case.draw(*p.shape))


def divisors(n):
    return [k for k in range(1, n + 1) if n % k == 0]


def llamagen_gpt(case):
    heads, width, grid = case.between(1, 6), case.choose(4, 8, 12, 20, 28, 36, 44), case.choose(*range(1, 10), 11)
    if case.chance(0.15):
        width = case.choose(52, 68)
    if case.chance(0.15):
        grid = 17
    captions = case.choose(1, 2, 3, 5, 7, 9, 17, 33, 40, 77, 120)
    args = gpt.ModelArgs(
        model_type="t2i", dim=heads * width, n_layer=case.between(1, 4), n_head=heads,
        n_kv_head=case.choose(*divisors(heads), None), multiple_of=case.choose(1, 3, 7, 13, 16, 50, 65),
        ffn_dim_multiplier=case.choose(None, None, 0.7, 1.3), rope_base=case.choose(10000, 10000, 500),
        norm_eps=case.choose(1e-5, 1e-6), vocab_size=case.choose(2, 17, 33, 50, 65, 130, 257), cls_token_num=captions,
        block_size=grid * grid, caption_dim=case.choose(1, 3, 7, 17, 33, 50, 65), token_dropout_p=0.0,
        resid_dropout_p=0.0, ffn_dropout_p=0.0, class_dropout_prob=0.0,
    )
    case.config = dataclasses.asdict(args)
    model = gpt.Transformer(args).train()
    randomise(model, case.generator)
    state = model.state_dict()
    null = "cls_embedding.uncond_embedding"
    state[null] = state[null][: case.choose(captions, 120)].clone()
    case.model.mkdir()
    torch.save({"model": state}, case.model / "model.pt")
    (case.model / "config.json").write_text(json.dumps(case.config))

    batch, codes = case.between(1, 5), grid * grid
    given = case.choose(codes - 1, codes - 1, case.between(0, codes - 1))
    most = case.choose(captions, captions, max(1, captions // 2), 1)
    low = case.choose(0, 1, 1, most)
    lengths = [case.between(low, most) for _ in range(batch)]
    case.config |= {"caption_lengths": lengths, "given": given}
    caption_mask = left_padded(lengths, captions).to(case.choose(torch.float32, torch.bool, torch.int64))
    n = captions + given
    mask = torch.tril(torch.ones(n, n, dtype=torch.bool))[None].repeat(batch, 1, 1)
    mask[:, :, :captions] &= caption_mask.bool()[:, None]
    mask |= torch.eye(n, dtype=torch.bool)
    inputs = {
        "caption_embeddings": case.draw(batch, captions, args.caption_dim),
        "caption_mask": caption_mask,
        "tokens": case.ids(0, args.vocab_size, batch, given),
    }
    names = ["wqkv", "wo", "w1", "w2", "w3", "output", "cap_proj.fc1", "cap_proj.fc2"]
    tuned = case.tune(model, case.some(names, 2))
    logits = tuned(idx=inputs["tokens"], cond_idx=inputs["caption_embeddings"], mask=mask[:, None])[0]
    case.compare(inputs, {"": logits}, tuned)


def sd3(case):
    heads, width = case.between(1, 5), case.choose(4, 8, 12, 20, 36)
    if case.chance(0.15):
        heads, width = 4, case.choose(52, 68)
    patch, largest, layers = case.choose(1, 2, 2, 3), case.choose(9, 12, 20), case.between(1, 4)
    channels = case.choose(1, 3, 4, 6, 16)
    config = dict(
        sample_size=case.choose(4, 8, 9, 12) * patch, patch_size=patch, in_channels=channels,
        out_channels=case.choose(channels, 3), num_layers=layers, attention_head_dim=width, num_attention_heads=heads,
        joint_attention_dim=case.choose(3, 17, 33, 50, 65, 130), caption_projection_dim=heads * width,
        pooled_projection_dim=case.choose(1, 5, 17, 33, 65), pos_embed_max_size=largest,
    )
    if case.chance(0.6):
        config["qk_norm"] = case.choose("rms_norm", "rms_norm", "layer_norm")
        config["dual_attention_layers"] = sorted(case.some(range(layers), 1))
    case.config = dict(config)
    model = SD3Transformer2DModel(**config)
    shift(case, model)
    model.save_pretrained(case.model)
    batch = case.between(1, 3)
    height = case.between(patch, min(largest * patch, 18))
    width = case.between(2 * patch, min(largest * patch, 18))
    if largest == 20 and case.chance(0.15):
        height = width = 17 * patch
    inputs = {
        "hidden_states": case.draw(batch, channels, height, width),
        "timestep": case.choose(1000 * torch.rand(batch, generator=case.generator), case.ids(0, 1000, batch)),
        "encoder_hidden_states": case.draw(batch, case.choose(1, 3, 7, 17, 33, 77), config["joint_attention_dim"]),
        "pooled_projections": case.draw(batch, config["pooled_projection_dim"]),
    }
    names = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "norm_out.linear"]
    names += ["context_embedder", "linear_1", "pos_embed.proj", "proj_out"]
    if layers > 1:
        names += ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.0.proj", "ff_context.net.2"]
    tuned = case.tune(model, case.some(names, 3))
    case.compare(inputs, {"": tuned(**inputs).sample}, tuned)


def chameleon(case):
    # Of a head of two numbers its norm leaves little more than their order.
    heads, width, n = case.between(1, 6), case.choose(4, 6, 10, 18, 22, 34), case.choose(2, 5, 9, 17, 33, 65)
    if case.chance(0.15):
        width = 66
    if case.chance(0.15):
        n = 300
    words, tied = case.choose(17, 33, 50, 65, 130, 301), case.chance(0.3)
    config = dict(
        vocab_size=words, hidden_size=heads * width, intermediate_size=case.choose(7, 17, 33, 50, 65, 130, 260),
        num_hidden_layers=case.between(1, 4), num_attention_heads=heads,
        num_key_value_heads=case.choose(*divisors(heads)), max_position_embeddings=case.choose(50, 400),
        swin_norm=case.chance(0.4), attention_bias=case.chance(0.4),
        mlp_bias=case.chance(0.4), tie_word_embeddings=tied, hidden_act=case.choose("silu", "silu", "gelu"),
        rms_norm_eps=case.choose(1e-5, 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": case.choose(10000.0, 500.0)},
    )
    case.config = dict(config)
    vq_config = dict(
        base_channels=32, channel_multiplier=[1], num_res_blocks=1, num_embeddings=4, embed_dim=2, latent_channels=2
    )
    model = ChameleonForConditionalGeneration(
        ChameleonConfig(vocabulary_map={"<image>": words - 1}, vq_config=vq_config, **config)
    ).eval()
    # The transformer alone.
    del model.model.vqmodel
    randomise(model, case.generator)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.mul_(0.3).add_(1)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(case.model)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"] + ["lm_head"] * (not tied)
    tuned = case.tune(model, case.some(names, 2))
    ids = case.ids(0, words, case.between(1, 4), n)
    # transformers masks the logits of image tokens, which proxytune does not.
    inner = tuned.base_model.model
    logits = inner.lm_head(inner.model(input_ids=ids, use_cache=False).last_hidden_state)
    case.compare({"input_ids": ids}, {"": logits}, tuned)


def vae(case):
    levels, groups = case.between(1, 3), case.choose(1, 2, 3, 4)
    factors = (17, 25, 33) if case.chance(0.15) else (2, 3, 4, 5, 7, 9)
    channels = tuple(groups * case.choose(*factors) for _ in range(levels))
    quant, attention = case.chance(0.5), case.chance(0.7)
    config = dict(
        block_out_channels=channels, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, layers_per_block=case.between(1, 2),
        latent_channels=case.choose(1, 2, 3, 4, 16), norm_num_groups=groups,
        act_fn=case.choose("silu", "silu", "mish", "gelu"), mid_block_add_attention=attention, use_quant_conv=quant,
        use_post_quant_conv=quant,
    )
    case.config = dict(config)
    model = AutoencoderKL(**config).eval()
    shift(case, model)
    model.save_pretrained(case.model)
    names = ["conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
    names += ["to_q", "to_k", "to_v", "to_out.0", "quant_conv", "post_quant_conv"]
    modules = [name for name, _ in model.named_modules()]
    targets = case.some([t for t in names if any(f".{m}".endswith(f".{t}") for m in modules)], 2)
    # Both directions have gradients.
    if not {"conv1", "conv2", "conv_in", "conv_out"} & set(targets):
        targets.append("conv_in")
    tuned = case.tune(model, targets)
    least = max(3, 2**levels)
    height, width = case.between(least, 21), case.between(least, 21)
    if case.chance(0.15):
        height, width = 37, 50
    inner = tuned.base_model.model
    image = case.draw(case.between(1, 3), 3, height, width)
    case.compare({"sample": image}, {"": inner.encode(image).latent_dist.mean}, tuned, "encoder")
    latents = case.draw(case.between(1, 3), config["latent_channels"], case.between(2, 9), case.between(2, 9))
    case.compare({"latents": latents}, {"": inner.decode(latents).sample}, tuned, "decoder")


def both_directions(case, model, levels, codes, width, targets=()):
    """An image to tokens, and tokens to an image, the latter with an adapter if there are targets."""
    least, most = 4 * 2 ** (levels - 1), 6 * 2 ** (levels - 1) + 3
    batch = case.between(1, 3)
    shape = (batch, 3, case.between(least, most), case.between(least, most))
    image = 2 * torch.rand(*shape, generator=case.generator) - 1
    case.compare({"image": image}, {"": model.encode(image)[2][2].view(batch, -1)}, name="encode")
    batch, grid = case.between(1, 3), case.between(3, 8)
    tokens = case.ids(0, codes, batch, grid * grid)
    tuned = case.tune(model, case.some(targets, 2)) if targets else None
    decoded = model.decode_code(tokens.flatten(), [batch, width, grid, grid])
    case.compare({"tokens": tokens}, {"": decoded}, tuned, "decode")


def llamagen_vq(case):
    levels, ch = case.between(1, 3), case.choose(64, 64, 96)
    args = vq.ModelArgs(
        codebook_size=case.choose(17, 50, 65, 130, 333), codebook_embed_dim=case.choose(3, 5, 8, 9),
        codebook_l2_norm=case.chance(0.6), codebook_show_usage=False,
        encoder_ch_mult=[case.choose(1, 1, 2) for _ in range(levels)],
        decoder_ch_mult=[case.choose(1, 1, 2) for _ in range(levels)], z_channels=case.choose(5, 17, 33, 50),
    )
    case.config = dataclasses.asdict(args) | {"ch": ch}
    model = vq.VQModel(args)
    model.encoder = vq.Encoder(ch=ch, ch_mult=args.encoder_ch_mult, z_channels=args.z_channels)
    model.decoder = vq.Decoder(ch=ch, ch_mult=args.decoder_ch_mult, z_channels=args.z_channels)
    model.eval()
    randomise(model, case.generator)
    case.model.mkdir()
    torch.save({"model": model.state_dict()}, case.model / "model.pt")
    (case.model / "config.json").write_text(json.dumps(case.config))
    names = ["post_quant_conv", "decoder.conv_in", "decoder.conv_out", "decoder.mid.0.conv1", "decoder.mid.1.q"]
    names += ["decoder.mid.1.proj_out", "decoder.conv_blocks.0.res.1.conv2"]
    if levels > 1:
        names.append("decoder.conv_blocks.0.upsample.conv")
    both_directions(case, model, levels, args.codebook_size, args.codebook_embed_dim, names)


def chameleon_vq(case):
    from tokenizer.vqgan.model import VQModel

    levels, resolution = case.between(1, 3), case.choose(8, 16, 32)
    ddconfig = dict(
        double_z=False, in_channels=3, out_ch=3, dropout=0.0, ch=case.choose(64, 96),
        ch_mult=[case.choose(1, 1, 2) for _ in range(levels)], num_res_blocks=case.between(1, 2),
        attn_resolutions=case.choose([], [resolution // 2 ** (levels - 1)]), resolution=resolution,
        z_channels=case.choose(5, 17, 33),
    )
    params = dict(ddconfig=ddconfig, embed_dim=case.choose(3, 5, 7), n_embed=case.choose(17, 65, 130))
    case.config = dict(params)
    # It prints.
    with contextlib.redirect_stdout(None):
        model = VQModel(**params).eval()
    randomise(model, case.generator)
    case.model.mkdir()
    document = {"model": {"base_learning_rate": 1e-6, "target": "taming.models.vqgan.VQModel", "params": params}}
    (case.model / "vqgan.yaml").write_text(yaml.safe_dump(document))
    torch.save({"state_dict": model.state_dict()}, case.model / "vqgan.ckpt")
    both_directions(case, model, levels, params["n_embed"], params["embed_dim"])


def transformer_sizes(case):
    heads, width = case.between(1, 4), case.choose(3, 5, 8, 9, 17, 33)
    if case.chance(0.15):
        heads, width = 5, case.choose(50, 65, 72)
    return dict(
        hidden_size=heads * width, num_attention_heads=heads, num_hidden_layers=case.between(1, 3),
        intermediate_size=case.choose(7, 17, 33, 50, 65, 130, 260), hidden_act=case.choose("quick_gelu", "gelu"),
    )


def texts(case, words, longest):
    """Padded with the last word, which ends them; in some texts it, or any other, may also come earlier."""
    lengths = [case.between(1, longest) for _ in range(case.between(1, 4))]
    low, high = case.choose((3, words - 2), (0, words))
    ids = torch.full((len(lengths), max(lengths) + 2), words - 1)
    for row, length in zip(ids, lengths):
        row[0] = words - 2
        row[1 : length + 1] = case.ids(low, high, length)
    return ids


def clip(case):
    words, patch = case.choose(17, 40, 65), case.choose(3, 5, 8, 9)
    text = transformer_sizes(case)
    text |= dict(vocab_size=words, max_position_embeddings=20, bos_token_id=words - 2)
    text["eos_token_id"] = case.choose(2, words - 1)
    vision = transformer_sizes(case)
    vision |= dict(image_size=patch * case.between(1, 6) + case.between(0, patch - 1), patch_size=patch)
    # Embeddings have length 1, so one number would have no gradient at all, and two of them little.
    config = dict(text_config=text, vision_config=vision, projection_dim=case.choose(3, 7, 17, 33))
    case.config = dict(config)
    model = CLIPModel(CLIPConfig(**config)).eval()
    randomise(model, case.generator)
    model.save_pretrained(case.model)
    names = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    names += ["text_projection", "visual_projection", "patch_embedding"]
    tuned = case.tune(model, case.some(names, 3))
    size = vision["image_size"]
    inputs = {"input_ids": texts(case, words, 18), "pixel_values": case.draw(case.between(1, 3), 3, size, size)}
    output = tuned(**inputs)
    case.compare(inputs, {"text_embeds": output.text_embeds, "image_embeds": output.image_embeds}, tuned)


def clip_text(case):
    words, projects = case.choose(17, 40, 65), case.chance(0.6)
    config = transformer_sizes(case) | dict(
        vocab_size=words, max_position_embeddings=80, bos_token_id=words - 2, eos_token_id=case.choose(2, words - 1),
        projection_dim=case.choose(1, 7, 17, 33), num_hidden_layers=case.between(2, 4),
    )
    case.config = config | {"projects": projects}
    kind = CLIPTextModelWithProjection if projects else CLIPTextModel
    model = kind(CLIPTextConfig(**config)).eval()
    randomise(model, case.generator)
    model.save_pretrained(case.model)
    names = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"] + ["text_projection"] * projects
    tuned = case.tune(model, case.some(names, 2))
    inputs = {"input_ids": texts(case, words, case.choose(8, 31, 78))}
    output = tuned(**inputs, output_hidden_states=True)
    pooled = output.text_embeds if projects else output.pooler_output
    case.compare(inputs, {"": output.hidden_states[-2], "pooled": pooled}, tuned)


def t5(case):
    inner = case.choose("gated-gelu", "gated-gelu", "gated-silu", "relu")
    config = dict(
        vocab_size=case.choose(17, 33, 65), d_model=case.choose(5, 9, 17, 33, 50, 65, 130, 200),
        d_kv=case.choose(1, 3, 8, 9, 17, 33), d_ff=case.choose(7, 17, 33, 65, 130, 260), num_layers=case.between(1, 4),
        num_heads=case.between(1, 6), feed_forward_proj=inner, relative_attention_num_buckets=case.choose(8, 12, 32),
        relative_attention_max_distance=case.choose(20, 128), dropout_rate=0.0,
    )
    case.config = dict(config)
    model = T5EncoderModel(T5Config(**config)).eval()
    randomise(model, case.generator)
    model.save_pretrained(case.model)
    # Of a single position the queries and keys have no gradients.
    longest = 300 if case.chance(0.15) else case.choose(2, 5, 17, 33, 65)
    lengths = [case.between(2, longest) for _ in range(case.between(1, 4))]
    n = max(lengths)
    mask = (torch.arange(n)[None] < torch.tensor(lengths)[:, None]).long()
    if case.chance(0.3):
        mask = (torch.rand(len(lengths), n, generator=case.generator) < 0.7).long()
        mask[:, [0, -1]] = 1
    names = ["q", "k", "v", "o", "wo"] + (["wi"] if inner == "relu" else ["wi_0", "wi_1"])
    tuned = case.tune(model, case.some(names, 2))
    inputs = {"input_ids": case.ids(2, config["vocab_size"], len(lengths), n), "attention_mask": mask}
    case.compare(inputs, {"": tuned(**inputs).last_hidden_state}, tuned, watched=mask[:, :, None])


def dino(case):
    patch = case.choose(3, 5, 8, 9)
    config = transformer_sizes(case) | dict(
        hidden_act=case.choose("gelu", "gelu", "relu"), image_size=patch * case.between(1, 9), patch_size=patch,
        layer_norm_eps=case.choose(1e-6, 1e-12), qkv_bias=case.choose(True, True, False),
    )
    case.config = dict(config)
    model = ViTModel(ViTConfig(**config), add_pooling_layer=False).eval()
    randomise(model, case.generator)
    model.save_pretrained(case.model)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    tuned = case.tune(model, case.some(names, 2))
    pixels = case.draw(case.between(1, 4), 3, config["image_size"], config["image_size"])
    case.compare({"pixel_values": pixels}, {"": tuned(pixel_values=pixels).last_hidden_state[:, 0]}, tuned)


COMPONENTS = {
    "llamagen-gpt": llamagen_gpt,
    "llamagen-vq": llamagen_vq,
    "chameleon": chameleon,
    "chameleon-vq": chameleon_vq,
    "clip": clip,
    "clip-text": clip_text,
    "t5": t5,
    "dino": dino,
    "sd3-transformer": sd3,
    "vae": vae,
}


def check(component, seed, parent, program):
    """Whether the case, which lies in a folder under `parent`, is equal."""
    folder = Path(parent) / f"{component}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    case = Case(component, seed, folder, program)
    COMPONENTS[component](case)
    print(case.line(seed), flush=True)
    if not case.equal:
        print(json.dumps(case.config), flush=True)
    return case.equal


def main():
    parser = argparse.ArgumentParser(description="Random tiny models against `proxytune verify`.")
    parser.add_argument("components", metavar="COMPONENT[,COMPONENT]", help=", ".join(COMPONENTS))
    parser.add_argument("first", metavar="FIRST", type=int, help="the first seed")
    parser.add_argument("last", metavar="LAST", type=int, help="the last seed")
    parser.add_argument("--program", metavar="PATH", default="proxytune", help="default: proxytune, from PATH")
    parser.add_argument("--keep", metavar="DIR", help="leave the cases there")
    args = parser.parse_args()
    components = args.components.split(",")
    for component in components:
        if component not in COMPONENTS:
            parser.error(f"no component {component}; there are {', '.join(COMPONENTS)}")
    if shutil.which(args.program) is None:
        parser.error(f"no program {args.program}")
    disable_progress_bar()
    seeds = range(args.first, args.last + 1)
    equal = dict.fromkeys(components, 0)
    for component in components:
        for seed in seeds:
            with tempfile.TemporaryDirectory() as temporary:
                equal[component] += check(component, seed, args.keep or temporary, args.program)
    print(", ".join(f"{component} {n} of {len(seeds)} equal" for component, n in equal.items()))
    sys.exit(any(n < len(seeds) for n in equal.values()))


if __name__ == "__main__":
    main()
