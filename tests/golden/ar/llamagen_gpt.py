"""Cases for llamagen-gpt, from LlamaGen's own source: LLAMAGEN=path/to/LlamaGen python tests/golden/ar/llamagen_gpt.py

greedy.safetensors holds what the reference's generate() draws with top_k 1: `tokens` without guidance, `guided` with
scale 3, `interval` with scale 3 for the first ten steps after the first.
"""
import contextlib
import dataclasses
import json
import os
import sys

import peft
import torch

sys.path.insert(0, os.environ["LLAMAGEN"])
from autoregressive.models import generate as sampling
from autoregressive.models import gpt
from common import case, left_padded, randomise, save, training

# What generate() asks of torch only concerns which CUDA kernel runs.
torch.backends.cuda.sdp_kernel = lambda **_: contextlib.nullcontext()

NO_DROPOUT = dict(token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0, class_dropout_prob=0.0)


def make(name, config, rank, alpha, lengths, given, null_rows):
    generator = torch.Generator().manual_seed(len(name) + rank)
    torch.manual_seed(rank)
    folder = case("llamagen-gpt", name)
    args = gpt.ModelArgs(model_type="t2i", **NO_DROPOUT, **config)
    model = gpt.Transformer(args)
    randomise(model, generator)
    with torch.no_grad():
        model.output.weight.mul_(3)
    # The reference always stores 120 rows for the null condition; shorter captions meet its first ones.
    null = model.cls_embedding.uncond_embedding
    model.cls_embedding.uncond_embedding = torch.nn.Parameter(null[:null_rows], requires_grad=False)
    (folder / "model").mkdir()
    torch.save({"model": model.state_dict(), "steps": 3}, folder / "model" / "model.pt")
    (folder / "model" / "config.json").write_text(json.dumps(dataclasses.asdict(args), indent=2) + "\n")
    model.cls_embedding.uncond_embedding = torch.nn.Parameter(null[: args.cls_token_num], requires_grad=False)

    b = len(lengths)
    captions = torch.randn(b, args.cls_token_num, args.caption_dim, generator=generator)
    caption_mask = left_padded(lengths, args.cls_token_num)
    tokens = torch.randint(args.vocab_size, (b, given), generator=generator)
    inputs = {"caption_embeddings": captions, "caption_mask": caption_mask, "tokens": tokens}

    # As in the reference's data set: causal, padding hidden, diagonal open.
    n = args.cls_token_num + given
    mask = torch.tril(torch.ones(n, n))[None].repeat(b, 1, 1)
    mask[:, :, : args.cls_token_num] *= caption_mask[:, None]
    eye = torch.eye(n)
    mask = (mask * (1 - eye) + eye).bool()[:, None]

    def logits(module):
        return module(idx=tokens, cond_idx=captions, mask=mask)[0]

    model.train()
    cotangent = torch.randn(b, given + 1, args.vocab_size, generator=generator)
    training(folder, model, inputs, logits(model), cotangent)

    # The reference's cache has room for n_head heads; with fewer key heads it needs the smaller one.
    cache = gpt.KVCache
    heads = args.n_kv_head or args.n_head
    gpt.KVCache = lambda size, length, _, width, dtype: cache(size, length, heads, width, dtype)
    model.eval()
    greedy = {"caption_embeddings": captions, "caption_mask": caption_mask}
    for key, scale, interval in [("tokens", 1.0, -1), ("guided", 3.0, -1), ("interval", 3.0, 10)]:
        greedy[key] = sampling.generate(
            model, captions, 64, caption_mask, scale, interval, temperature=1.0, top_k=1, sample_logits=False
        )
    gpt.KVCache = cache
    for layer in model.layers:
        layer.attention.kv_cache = None
    save(folder / "greedy.safetensors", greedy)

    targets = ["wqkv", "wo", "w1", "w2", "w3"]
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    with torch.no_grad():
        for key, p in tuned.named_parameters():
            if "lora_B" in key:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    tuned.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    tuned.train()
    output = logits(tuned)
    (output * cotangent).sum().backward()
    reference = {f"input.{k}": v for k, v in inputs.items()} | {"output": output, "cotangent": cotangent}
    for key, p in tuned.named_parameters():
        if p.requires_grad:
            reference["grad." + key.replace(".default", "")] = p.grad
    save(folder / "reference.safetensors", reference)


make(
    "two-layers",
    dict(dim=32, n_layer=2, n_head=4, multiple_of=16, vocab_size=48, cls_token_num=5, block_size=64, caption_dim=12),
    rank=3,
    alpha=5,
    lengths=[5, 2],
    given=13,
    null_rows=120,
)
make(
    "grouped-heads",
    dict(
        dim=24, n_layer=3, n_head=3, n_kv_head=1, multiple_of=10, ffn_dim_multiplier=0.9, rope_base=5000, norm_eps=1e-6,
        vocab_size=40, cls_token_num=7, block_size=81, caption_dim=10,
    ),
    rank=2,
    alpha=4,
    lengths=[1, 7, 4],
    given=80,
    null_rows=7,
)
