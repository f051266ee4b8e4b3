"""Cases for chameleon, from transformers' ChameleonForConditionalGeneration: python tests/golden/ar/chameleon.py

Logits are taken from lm_head itself, because the model's own forward hides those of image tokens. Half of the cases are
saved as Lumina-mGPT's checkpoints are: one row of query and key norm for several heads, configs of transformers 4, no
image tokenizer, shards.

training.safetensors has the gradients for every weight. loss.safetensors has `tokens` (b, n) padded with -1, `labelled`
(b), and what Lumina-mGPT's training makes of them: `output` and some of its grad.NAME. greedy.safetensors has prompts (`prompt.I`)
and the codes of an 8x8 image that greedy decoding draws for each, `plain` without guidance and `guided` with scale 3.
"""
import json

import peft
import torch
from common import case, randomise, save, training
from safetensors.torch import load_file, save_file
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

CODES = 40
SIDE = 8
UNIT = 2  # codes along one side of a unit of height and width


def vocabulary(generator, size):
    """Every name at an id of its own, in no order."""
    names = ["<s>", "<pad>", "</s>", "<image>", "<eoss>", "<racm3:break>", "<reserved08706>", "<reserved08799>"]
    names += [f"<reserved{8800 + n:05}>" for n in range(1, 7)]
    names += [f"IMGIMG{''.join(chr(ord('A') + int(d)) for d in str(code))}Z" for code in range(CODES)]
    ids = torch.randperm(size, generator=generator)[: len(names)].tolist()
    return dict(zip(names, ids))


def logits(model, ids):
    return model.lm_head(model.model(input_ids=ids, use_cache=False).last_hidden_state)


def answer(vocab, codes):
    code_ids = [vocab[f"IMGIMG{''.join(chr(ord('A') + int(d)) for d in str(code))}Z"] for code in range(CODES)]
    unit = vocab[f"<reserved{8800 + SIDE // UNIT:05}>"]
    tokens = [vocab["<racm3:break>"], unit, unit]
    for row in range(SIDE):
        tokens += [code_ids[c] for c in codes[row * SIDE : (row + 1) * SIDE]] + [vocab["<reserved08799>"]]
    return tokens + [vocab["<eoss>"], vocab["<reserved08706>"]]


@torch.no_grad()
def greedy(model, vocab, prompt, scale):
    """As Lumina-mGPT samples: guidance on raw logits, then the constraints of an image, everything computed anew."""
    code_ids = [vocab[f"IMGIMG{''.join(chr(ord('A') + int(d)) for d in str(code))}Z"] for code in range(CODES)]
    image = answer(vocab, [0] * SIDE * SIDE)[:3]
    codes = []
    while len(codes) < SIDE * SIDE:
        scores = logits(model, torch.tensor([prompt + image]))[0, -1]
        if scale != 1:
            unconditional = logits(model, torch.tensor([image]))[0, -1]
            scores = scale * (scores - unconditional) + unconditional
        if (len(image) - 3 + 1) % (SIDE + 1) == 0:
            image.append(vocab["<reserved08799>"])
            continue
        code = scores[code_ids].argmax().item()
        top = scores[code_ids].topk(2).values
        assert top[0] - top[1] > 1e-4, "a tie: choose another seed"
        codes.append(code)
        image.append(code_ids[code])
    return codes


def make(name, config, rank, alpha, targets, shape, norm_rows=None, rewrite=None, seed=0):
    generator = torch.Generator().manual_seed(seed + len(name) + rank)
    torch.manual_seed(rank)
    folder = case("chameleon", name)
    vocab = vocabulary(generator, config["vocab_size"])
    model = ChameleonForConditionalGeneration(ChameleonConfig(vocabulary_map=vocab, **config))
    del model.model.vqmodel
    randomise(model, generator)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                heads = norm.weight.shape[0]
                rows = norm_rows or heads
                for p in (norm.weight, norm.bias):
                    p.copy_(p[:rows].repeat_interleave(heads // rows, 0) + (1 if p is norm.weight else 0))
        model.lm_head.weight.mul_(2)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
    model.eval()
    model.save_pretrained(folder / "model")
    (folder / "model" / "generation_config.json").unlink(missing_ok=True)
    path = folder / "model" / "model.safetensors"
    stored = load_file(path)
    for key in stored:
        if norm_rows and ("q_norm" in key or "k_norm" in key):
            stored[key] = stored[key][:: stored[key].shape[0] // norm_rows].contiguous()
    text = json.loads((folder / "model" / "config.json").read_text())
    if rewrite:
        stored, text = rewrite(stored, text, folder / "model")
    if stored:
        save_file(stored, path, metadata={"format": "pt"})
    (folder / "model" / "config.json").write_text(json.dumps(text, indent=1) + "\n")

    ids = torch.randint(config["vocab_size"], shape, generator=generator)
    inputs = {"input_ids": ids}
    cotangent = torch.randn(*shape, config["vocab_size"], generator=generator)
    own = (lambda key: key.removeprefix("model.")) if rewrite is bare else (lambda key: key)
    training(folder, model, inputs, logits(model, ids), cotangent, own)
    mend(folder / "training.safetensors", norm_rows)

    answers = [answer(vocab, torch.randint(CODES, (SIDE * SIDE,), generator=generator).tolist()) for _ in range(2)]
    prompt = torch.randint(config["vocab_size"], (7,), generator=generator).tolist()
    sequences = [prompt + answers[0], answers[1]]
    labelled = torch.tensor([len(prompt), 1])
    width = max(map(len, sequences))
    tokens = torch.tensor([s + [-1] * (width - len(s)) for s in sequences])
    labels = tokens.clone()
    labels[labels < 0] = -100
    for row, first in enumerate(labelled.tolist()):
        labels[row, :first] = -100
    model.zero_grad()
    shifted = logits(model, tokens.clamp(min=0))[:, :-1]
    wanted = labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(shifted.flatten(0, 1), wanted.flatten(), ignore_index=-100)
    loss = loss + 1e-5 * torch.logsumexp(shifted, -1).pow(2)[wanted >= 0].mean()
    loss.backward()
    watched = [model.lm_head, model.model.embed_tokens, model.model.layers[0].self_attn.q_proj]
    grads = {f"grad.{own(key)}": p.grad for key, p in model.named_parameters() if any(p is m.weight for m in watched)}
    save(folder / "loss.safetensors", {"tokens": tokens, "labelled": labelled, "output": loss} | grads)

    prompts = [torch.randint(config["vocab_size"], (n,), generator=generator).tolist() for n in (5, 9, 6)]
    drawn = {f"prompt.{i}": torch.tensor(p) for i, p in enumerate(prompts)}
    for key, scale in [("plain", 1.0), ("guided", 3.0)]:
        drawn[key] = torch.tensor([greedy(model, vocab, p, scale) for p in prompts])
    save(folder / "greedy.safetensors", drawn)

    tuned = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    with torch.no_grad():
        for key, p in tuned.named_parameters():
            if "lora_B" in key:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    tuned.save_pretrained(folder / "adapter", save_embedding_layers=False)
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    output = logits(tuned.base_model.model, ids)
    (output * cotangent).sum().backward()
    reference = {f"input.{k}": v for k, v in inputs.items()} | {"output": output, "cotangent": cotangent}
    for key, p in tuned.named_parameters():
        if p.requires_grad:
            reference["grad." + key.replace(".default", "")] = p.grad
    save(folder / "reference.safetensors", reference)


def mend(path, norm_rows):
    """Gradients of norms whose rows were made one: the sum over the heads that share a row."""
    tensors = load_file(path)
    for key in tensors:
        if norm_rows and ("q_norm" in key or "k_norm" in key):
            grad = tensors[key]
            tensors[key] = grad.reshape(norm_rows, -1, grad.shape[-1]).sum(1)
    save_file(tensors, path)


def lumina(stored, text, folder):
    """Two shards, and a config of transformers 4."""
    shards = {}
    for i, key in enumerate(sorted(stored)):
        shards.setdefault(f"model-{1 + i % 2:05}-of-00002.safetensors", {})[key] = stored[key]
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: shard for shard, tensors in shards.items() for key in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "model.safetensors").unlink()
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    return {}, text | {"rope_scaling": None, "mask_image_logits": False, "dropout": 0.05, "z_loss_weight": 1e-5}


def bare(stored, text, _):
    """Names without the leading "model."."""
    return {key.removeprefix("model."): tensor for key, tensor in stored.items()}, text


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
make(
    "own-norm-for-each-head",
    dict(
        vocab_size=66, hidden_size=18, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=120,
    ),
    rank=3, alpha=5, targets=[*ALL, "lm_head"], shape=(2, 11),
)
make(
    "lumina-mgpt",
    dict(
        vocab_size=71, hidden_size=16, intermediate_size=22, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=128, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        num_key_value_heads=2,
    ),
    rank=2, alpha=7, targets=ALL, shape=(1, 17), norm_rows=1, rewrite=lumina, seed=1,
)
make(
    "swin-norm-grouped-heads",
    dict(
        vocab_size=63, hidden_size=24, intermediate_size=18, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=90, swin_norm=True, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=True,
    ),
    rank=4, alpha=4, targets=["q_proj", "v_proj", "down_proj"], shape=(3, 5), norm_rows=2, rewrite=bare,
)
