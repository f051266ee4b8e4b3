"""A checkpoint folder as LlamaGen publishes its text-to-image models, with tiny random weights, and what its own source
draws from it: LLAMAGEN=path/to/LlamaGen python tests/golden/ar/llamagen_published.py

There is no config beside the two .pt files; the T5 is a whole encoder-decoder in shards, as flan-t5-xl is. Its tokenizer
is the nano one, datasets/nano/checkpoints/llamagen/t5/tokenizer.json, which the test places beside it. drawn.safetensors
has for a caption the greedy tokens with guidance 7.5, without and with cfg_interval 20, and the means of the 16x16
pixels that each token covers in the images, in [0, 255].
"""
import contextlib
import os
import sys

import torch
from tokenizers import Tokenizer
from transformers import T5Config, T5ForConditionalGeneration

sys.path.insert(0, os.environ["LLAMAGEN"])
from autoregressive.models import generate as sampling
from autoregressive.models import gpt
from common import GOLDEN, case, randomise, save
from tokenizer.tokenizer_image import vq_model as vq

# What generate() asks of torch only concerns which CUDA kernel runs.
torch.backends.cuda.sdp_kernel = lambda **_: contextlib.nullcontext()

CAPTION = "a red dog on the beach"
generator = torch.Generator().manual_seed(11)
torch.manual_seed(11)
folder = case("llamagen-published", "xl-256")


def halved(module):
    """Weights that half precision holds exactly, and their state."""
    randomise(module, generator)
    module.half().float()
    return {k: v.half() for k, v in module.state_dict().items()}


tokenizer = Tokenizer.from_file(str(GOLDEN.parent.parent / "datasets/nano/checkpoints/llamagen/t5/tokenizer.json"))
config = T5Config(
    vocab_size=tokenizer.get_vocab_size(), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=1, num_heads=3,
    feed_forward_proj="gated-gelu", tie_word_embeddings=False,
)
t5 = T5ForConditionalGeneration(config)
halved(t5)
t5.eval().half().save_pretrained(folder / "t5", max_shard_size="15KB")
(folder / "t5" / "generation_config.json").unlink(missing_ok=True)
t5.float()

args = gpt.ModelArgs(
    model_type="t2i", dim=64, n_layer=2, n_head=1, vocab_size=96, cls_token_num=120, block_size=256,
    caption_dim=config.d_model,
)
model = gpt.Transformer(args)
randomise(model, generator)
with torch.no_grad():
    model.output.weight.mul_(3)
    # Enough depth in the residual stream that greedy tokens do not repeat for ever.
    for layer in model.layers:
        layer.attention.wo.weight.mul_(6)
        layer.feed_forward.w2.weight.mul_(2)
model.half().float()
state = {k: v.half() for k, v in model.state_dict().items()}
# As their training saves it.
torch.save({"model": state, "steps": 3, "args": None, "optimizer": {"state": {}}}, folder / "t2i_XL_stage1_256.pt")

args_vq = vq.ModelArgs(
    codebook_size=96, codebook_embed_dim=8, encoder_ch_mult=[1] * 5, decoder_ch_mult=[1] * 5, z_channels=16,
)
tokenizer_vq = vq.VQModel(args_vq)
tokenizer_vq.encoder = vq.Encoder(ch=32, ch_mult=args_vq.encoder_ch_mult, z_channels=args_vq.z_channels)
tokenizer_vq.decoder = vq.Decoder(ch=32, ch_mult=args_vq.decoder_ch_mult, z_channels=args_vq.z_channels)
torch.save({"model": halved(tokenizer_vq)}, folder / "vq_ds16_t2i.pt")

with torch.no_grad():
    ids = torch.tensor([tokenizer.encode(CAPTION).ids])
    features = t5.encoder(input_ids=ids).last_hidden_state
    captions = torch.zeros(1, 120, config.d_model)
    captions[:, 120 - ids.shape[1] :] = features
    mask = torch.zeros(1, 120)
    mask[:, 120 - ids.shape[1] :] = 1
    model.eval()
    tokenizer_vq.eval()
    drawn = {"ids": ids}
    for name, interval in [("tokens", -1), ("interval", 20)]:
        drawn[name] = sampling.generate(
            model, captions, 256, mask, 7.5, interval, temperature=1.0, top_k=1, sample_logits=False
        )
        image = tokenizer_vq.decode_code(drawn[name].flatten(), [1, 8, 16, 16])
        pixels = torch.clamp(127.5 * image + 128.0, 0, 255).to(torch.uint8).float()
        drawn["image." + name] = torch.nn.functional.avg_pool2d(pixels, 16)
save(folder / "drawn.safetensors", drawn)
