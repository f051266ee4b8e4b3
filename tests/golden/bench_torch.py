"""Torch's side of `proxytune bench table --torch PYTHON`.

    python tests/golden/bench_torch.py --serve THREADS

reads lines `COUNT NAME`, does the row NAME that often, and answers with the seconds for one time. Without `--serve`
it prints every row once. Needs torch, diffusers and peft; the nano rows read the configs in `datasets/nano/checkpoints`.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

NANO = "datasets/nano/checkpoints"


def config(path):
    with open(f"{NANO}/{path}/config.json") as file:
        return json.load(file)


def lora(model, targets, rank=16):
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), model)


class Learning:
    """AdamW with clipping, as the trainers of diffusers do a step."""

    def __init__(self, model):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3)

    def step(self, loss):
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, c // 64, 64)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, c))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


def operations():
    rows = {}
    for width, layers, b, n in [(256, 4, 8, 96), (768, 4, 4, 376)]:
        model = nn.Sequential(*[Block(width) for _ in range(layers)])
        x = torch.randn(b, n, width)

        def step(model=model, x=x):
            for parameter in model.parameters():
                parameter.grad = None
            model(x).square().mean().backward()

        rows[f"training step, {width} wide, {layers} layers, {b}x{n} tokens"] = step
    left, right = torch.randn(2048, 1280), torch.randn(1280, 1280)
    rows["matrix product 2048x1280x1280"] = lambda: F.linear(left, right)
    values = torch.randn(2048, 1024)
    rows["GELU of 2 M values"] = lambda: F.gelu(values, approximate="tanh")
    rows["softmax of 2 M values"] = lambda: F.softmax(values, -1)
    pixels, kernel = torch.randn(4, 128, 32, 32), torch.randn(128, 128, 3, 3)
    rows["3x3 convolution 4x128x32x32"] = lambda: F.conv2d(pixels, kernel, padding=1)
    return rows


def supervisor():
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    settings = SD3Transformer2DModel.load_config(f"{NANO}/sd3/transformer")
    clip = config("sd3/text_encoder")
    latents = (settings["in_channels"], settings["sample_size"], settings["sample_size"])

    def prompts(b):
        context = torch.randn(b, clip["max_position_embeddings"], settings["joint_attention_dim"])
        return {
            "encoder_hidden_states": context,
            "pooled_projections": torch.randn(b, settings["pooled_projection_dim"]),
        }

    trained = lora(SD3Transformer2DModel.from_config(settings), ["to_q", "to_k", "to_v", "to_out.0"])
    learning = Learning(trained)
    images, given = torch.randn(4, *latents), prompts(4)

    def step():
        noise, sigma = torch.randn_like(images), torch.sigmoid(torch.randn(4))
        s = sigma.view(-1, 1, 1, 1)
        drawn = trained(hidden_states=(1 - s) * images + s * noise, timestep=1000 * sigma, **given).sample
        learning.step((drawn - (noise - images)).square().mean())

    model = SD3Transformer2DModel.from_config(settings).eval()
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(f"{NANO}/sd3/vae")).eval()
    both = prompts(32)

    @torch.no_grad()
    def proxies():
        x, sigmas = torch.randn(16, *latents), torch.linspace(1, 0, 13)
        for now, then in zip(sigmas[:-1], sigmas[1:]):
            drawn = model(hidden_states=torch.cat([x, x]), timestep=1000 * now.expand(32), **both).sample
            given, null = drawn.chunk(2)
            x = x + (then - now) * (null + 2.0 * (given - null))
        vae.decode(x / vae.config.scaling_factor).sample.clamp(-1, 1)

    return {"nano supervisor step, 4 images": step, "nano proxies, 16 at once": proxies}


class GptBlock(nn.Module):
    """A layer of LlamaGen's GPT, with a key and value cache of fixed size for sampling."""

    def __init__(self, c):
        super().__init__()
        d, self.heads = c["dim"], c["n_head"]
        hidden = -(-int(8 * d / 3) // c["multiple_of"]) * c["multiple_of"]
        self.attention_norm, self.ffn_norm = nn.RMSNorm(d, c["norm_eps"]), nn.RMSNorm(d, c["norm_eps"])
        self.wqkv, self.wo = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.w1, self.w3 = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False)
        self.w2 = nn.Linear(hidden, d, bias=False)

    def forward(self, x, rope, mask, cache=None, start=0):
        b, n, d = x.shape
        q, k, v = self.wqkv(self.attention_norm(x)).view(b, n, 3, self.heads, -1).unbind(2)
        q, k = (rotate(part, rope).transpose(1, 2) for part in (q, k))
        v = v.transpose(1, 2)
        if cache is not None:
            cache[0][:, :, start : start + n], cache[1][:, :, start : start + n] = k, v
            k, v = cache[0][:, :, : start + n], cache[1][:, :, : start + n]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.wo(y.transpose(1, 2).reshape(b, n, d))
        normed = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(normed)) * self.w3(normed))


def rotate(x, rope):
    pairs = x.unflatten(-1, (-1, 2))
    cos, sin = (part[None, :, None] for part in rope.unbind(-1))
    first, second = pairs.unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)


class Gpt(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed = nn.Embedding(c["vocab_size"], c["dim"])
        self.fc1 = nn.Linear(c["caption_dim"], c["dim"], bias=False)
        self.fc2 = nn.Linear(c["dim"], c["dim"], bias=False)
        self.layers = nn.ModuleList(GptBlock(c) for _ in range(c["n_layer"]))
        self.norm = nn.RMSNorm(c["dim"], c["norm_eps"])
        self.output = nn.Linear(c["dim"], c["vocab_size"], bias=False)
        self.total = c["cls_token_num"] + c["block_size"]
        self.rope = torch.randn(self.total, c["dim"] // c["n_head"] // 2, 2)
        mask = torch.ones(self.total, self.total).tril()
        mask[:, : c["cls_token_num"] // 2] = 0
        self.mask = (mask + torch.eye(self.total) > 0)[None, None]

    def captions(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

    def forward(self, x, caches=None, start=0):
        end = start + x.shape[1]
        for i, layer in enumerate(self.layers):
            cache = None if caches is None else caches[i]
            x = layer(x, self.rope[start:end], self.mask[:, :, start:end, :end], cache, start)
        return self.output(self.norm(x))


def student():
    c = config("llamagen")
    trained = lora(Gpt(c), ["wqkv", "wo", "w1", "w2", "w3"])
    learning = Learning(trained)
    captions, tokens = torch.randn(8, c["cls_token_num"], c["caption_dim"]), torch.randint(0, 512, (8, c["block_size"]))

    def step():
        x = torch.cat([trained.captions(captions), trained.embed(tokens[:, :-1])], 1)
        logits = trained(x)[:, c["cls_token_num"] - 1 :]
        learning.step(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()))

    model, decoder = Gpt(c).eval(), Decoder(config("llamagen/vq")).eval()
    given = torch.randn(20, c["cls_token_num"], c["caption_dim"])

    @torch.no_grad()
    def images():
        shape = (20, c["n_head"], model.total, c["dim"] // c["n_head"])
        caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in model.layers]
        logits, drawn, start = model(model.captions(given), caches)[:, -1], [], c["cls_token_num"]
        for i in range(c["block_size"]):
            conditional, null = logits.chunk(2)
            guided = null + 2.0 * (conditional - null)
            least = guided.topk(100).values[:, -1:]
            chances = guided.masked_fill(guided < least, -float("inf")).softmax(-1)
            drawn.append(torch.multinomial(chances, 1))
            if i + 1 < c["block_size"]:
                x = model.embed(torch.cat([drawn[-1], drawn[-1]]))
                logits = model(x, caches, start)[:, -1]
                start += 1
        decoder(torch.cat(drawn, 1)).clamp(-1, 1)

    return {"nano student step, 8 images": step, "nano student's images, 10 at once": images}


class Residual(nn.Module):
    def __init__(self, before, after, groups):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, before), nn.GroupNorm(groups, after)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.short = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.short(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    def __init__(self, d, groups):
        super().__init__()
        self.norm, self.qkv, self.out = nn.GroupNorm(groups, d), nn.Conv2d(d, 3 * d, 1), nn.Conv2d(d, d, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


class Decoder(nn.Module):
    """LlamaGen's VQ decoder."""

    def __init__(self, c):
        super().__init__()
        groups = c.get("norm_num_groups", 32)
        widths = [c["ch"] * factor for factor in reversed(c["decoder_ch_mult"])]
        self.codes = nn.Embedding(c["codebook_size"], c["codebook_embed_dim"])
        d = widths[0]
        layers = [nn.Conv2d(c["codebook_embed_dim"], c["z_channels"], 1), nn.Conv2d(c["z_channels"], d, 3, padding=1)]
        layers += [Residual(d, d, groups), Attention(d, groups), Residual(d, d, groups)]
        for i, width in enumerate(widths):
            for _ in range(3):
                layers += [Residual(d, width, groups)] + ([Attention(width, groups)] if i == 0 else [])
                d = width
            if i + 1 < len(widths):
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(d, d, 3, padding=1)]
        layers += [nn.GroupNorm(groups, d), nn.SiLU(), nn.Conv2d(d, 3, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, tokens):
        b, n = tokens.shape
        side = int(n**0.5)
        return self.layers(self.codes(tokens).transpose(1, 2).reshape(b, -1, side, side))


def seconds(body, count):
    start = time.perf_counter()
    for _ in range(count):
        body()
    return (time.perf_counter() - start) / count


def main():
    serving = "--serve" in sys.argv
    torch.set_num_threads(int(sys.argv[sys.argv.index("--serve") + 1]) if serving else 2)
    torch.manual_seed(0)
    rows = operations() | supervisor() | student()
    if not serving:
        for name, body in rows.items():
            body()
            print(f"{1e3 * min(seconds(body, 1) for _ in range(9)):9.2f} ms  {name}", flush=True)
        return
    for line in sys.stdin:
        count, name = line.rstrip("\n").split(" ", 1)
        print(seconds(rows[name], int(count)), flush=True)


main()
