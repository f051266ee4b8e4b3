"""Checkpoints of full size with random weights, laid out as they are published, to measure time and memory with:

LLAMAGEN=path/to/LlamaGen python tests/golden/full_size.py llamagen-xl-256 datasets/checkpoints/llamagen-xl-256   (7 GB)
LUMINA=path/to/Lumina-mGPT python tests/golden/full_size.py lumina-mgpt-7b datasets/checkpoints/lumina-7b         (14 GB)

The first has the encoder of a flan-t5-xl beside GPT-XL and VQ-16. The second draws 64x64 pixels, 16 codes, unless its
config.json says another image_size. What they draw is noise. Of texts they know nano's words.
"""
import json
import math
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

NANO = Path(__file__).parents[2] / "datasets/nano/checkpoints/llamagen/t5/tokenizer.json"


def llamagen(folder):
    sys.path.insert(0, os.environ["LLAMAGEN"])
    from autoregressive.models.gpt import GPT_XL
    from tokenizer.tokenizer_image.vq_model import VQ_16
    from transformers import T5Config, T5EncoderModel

    torch.set_default_dtype(torch.bfloat16)
    gpt = GPT_XL(model_type="t2i", block_size=256, vocab_size=16384, cls_token_num=120, caption_dim=2048)
    torch.nn.init.normal_(gpt.output.weight, std=0.02)
    torch.save({"model": gpt.state_dict()}, folder / "t2i_XL_stage1_256.pt")
    torch.set_default_dtype(torch.float32)
    torch.save({"model": VQ_16(codebook_size=16384, codebook_embed_dim=8).state_dict()}, folder / "vq_ds16_t2i.pt")
    torch.set_default_dtype(torch.bfloat16)
    t5 = T5EncoderModel(T5Config(
        vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    ))
    t5.save_pretrained(folder / "t5")
    shutil.copy(NANO, folder / "t5" / "tokenizer.json")


def lumina(folder):
    import yaml
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    sys.path.insert(0, os.path.join(os.environ["LUMINA"], "lumina_mgpt", "model", "chameleon_vae_ori"))
    from vqgan import VQModel

    width, inner, layers, words, codes = 4096, 11008, 32, 65536, 8192
    names = ["<s>", "<pad>", "</s>", "<image>", "<eoss>", "<racm3:break>", "<reserved08706>", "<reserved08799>"]
    names += [f"<reserved{8800 + n:05}>" for n in range(1, 65)]
    names += [f"IMGIMG{''.join(chr(ord('A') + int(d)) for d in str(code))}Z" for code in range(codes)]
    first = words - len(names)
    config = {
        "architectures": ["ChameleonForConditionalGeneration"], "model_type": "chameleon", "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": words, "max_position_embeddings": 10240, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "swin_norm": False,
        "tie_word_embeddings": False, "image_size": 64,
        "vocabulary_map": {name: first + i for i, name in enumerate(names)},
    }
    texts = json.loads(NANO.read_text())["model"]["vocab"]
    texts = [entry[0] for entry in texts] if isinstance(texts, list) else list(texts)
    texts = [word.removeprefix("\u2581") for word in texts if word not in names]
    text = Tokenizer(WordLevel({word: i for i, word in enumerate(dict.fromkeys(texts))} | config["vocabulary_map"], "<unk>"))
    text.pre_tokenizer = Whitespace()
    text.add_special_tokens(names)
    (folder / "config.json").write_text(json.dumps(config))
    index, shard = {}, 0

    def write(tensors):
        nonlocal shard
        shard += 1
        name = f"model-{shard:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, folder / name)
        index.update({key: name for key in tensors})

    def weight(outputs, inputs):
        return (torch.randn(outputs, inputs) / math.sqrt(inputs)).bfloat16()

    ones, zeros = torch.ones(width).bfloat16(), torch.zeros(32, 128).bfloat16()
    for layer in range(layers):
        at = f"model.layers.{layer}."
        tensors = {f"{at}self_attn.{p}_proj.weight": weight(width, width) for p in "qkvo"}
        for norm in ("q_norm", "k_norm"):
            tensors[f"{at}self_attn.{norm}.weight"], tensors[f"{at}self_attn.{norm}.bias"] = zeros + 1, zeros.clone()
        tensors[f"{at}mlp.gate_proj.weight"] = weight(inner, width)
        tensors[f"{at}mlp.up_proj.weight"] = weight(inner, width)
        tensors[f"{at}mlp.down_proj.weight"] = weight(width, inner)
        tensors[f"{at}input_layernorm.weight"] = ones.clone()
        tensors[f"{at}post_attention_layernorm.weight"] = ones.clone()
        write(tensors)
    write({"model.embed_tokens.weight": weight(words, width), "lm_head.weight": weight(words, width), "model.norm.weight": ones.clone()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    params = dict(
        ddconfig=dict(
            double_z=False, z_channels=256, resolution=512, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 1, 2, 2, 4],
            num_res_blocks=2, attn_resolutions=[], dropout=0.0,
        ),
        embed_dim=256, n_embed=codes,
    )
    (tokenizer / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    torch.save({"state_dict": VQModel(**params).state_dict()}, tokenizer / "vqgan.ckpt")
    text.save(str(tokenizer / "text_tokenizer.json"))


torch.manual_seed(0)
folder = Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
{"llamagen-xl-256": llamagen, "lumina-mgpt-7b": lumina}[sys.argv[1]](folder)
