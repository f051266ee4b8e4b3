"""Cases for llamagen-vq, from LlamaGen's own source: LLAMAGEN=path/to/LlamaGen python tests/golden/ar/llamagen_vq.py

The checkpoints hold half-precision numbers. training.safetensors has input.image, output.z (before quantisation),
output.reconstruction, output.vq_loss, output.commit_loss, the cotangent of the reconstruction, and the gradients of
sum(reconstruction * cotangent) + vq_loss + commit_loss for some of the weights.
"""
import dataclasses
import json
import os
import sys

import torch

sys.path.insert(0, os.environ["LLAMAGEN"])
from common import case, randomise, save
from tokenizer.tokenizer_image import vq_model as vq


def make(name, config, ch, image_shape, grid, watched):
    generator = torch.Generator().manual_seed(len(name))
    folder = case("llamagen-vq", name)
    args = vq.ModelArgs(**config)
    model = vq.VQModel(args)
    model.encoder = vq.Encoder(ch=ch, ch_mult=args.encoder_ch_mult, z_channels=args.z_channels)
    model.decoder = vq.Decoder(ch=ch, ch_mult=args.decoder_ch_mult, z_channels=args.z_channels)
    randomise(model, generator)
    model.half().float()
    (folder / "model").mkdir()
    state = {k: v.half() for k, v in model.state_dict().items()}
    torch.save({"model": state, "optimizer": {}}, folder / "model" / "model.pt")
    (folder / "model" / "config.json").write_text(json.dumps(dataclasses.asdict(args) | {"ch": ch}, indent=2) + "\n")

    image = torch.rand(image_shape, generator=generator) * 2 - 1
    tokens = torch.randint(args.codebook_size, (image_shape[0] + 1, grid * grid), generator=generator)
    model.eval()
    with torch.no_grad():
        z = model.quant_conv(model.encoder(image))
        indices = model.encode(image)[2][2].view(image_shape[0], -1)
        decoded = model.decode_code(tokens.flatten(), [len(tokens), args.codebook_embed_dim, grid, grid])
    save(folder / "reference.safetensors", {"input.image": image, "output": indices})
    save(folder / "reference-decode.safetensors", {"input.tokens": tokens, "output": decoded})

    model.train()
    reconstruction, (vq_loss, commit_loss, _, _) = model(image)
    cotangent = torch.randn(reconstruction.shape, generator=generator) / reconstruction.numel() ** 0.5
    ((reconstruction * cotangent).sum() + vq_loss + commit_loss).backward()
    parameters = dict(model.named_parameters())
    save(
        folder / "training.safetensors",
        {
            "input.image": image,
            "output.z": z,
            "output.reconstruction": reconstruction,
            "output.vq_loss": vq_loss,
            "output.commit_loss": commit_loss,
            "cotangent": cotangent,
        }
        | {f"grad.{key}": parameters[key].grad for key in watched},
    )


WATCHED = [
    "quantize.embedding.weight", "quant_conv.weight", "post_quant_conv.bias", "encoder.conv_in.weight",
    "encoder.mid.1.q.weight", "encoder.conv_blocks.0.res.1.norm2.weight", "decoder.conv_in.bias",
    "decoder.conv_blocks.0.attn.2.proj_out.weight", "decoder.mid.0.norm1.bias", "decoder.conv_out.weight",
]
make(
    "one-level",
    dict(codebook_size=90, codebook_show_usage=False, encoder_ch_mult=[1], decoder_ch_mult=[1], z_channels=12),
    ch=32,
    image_shape=(2, 3, 9, 5),
    grid=5,
    watched=WATCHED,
)
make(
    "unnormalised-codes",
    dict(
        codebook_size=70, codebook_embed_dim=5, codebook_l2_norm=False, codebook_show_usage=False, commit_loss_beta=0.4,
        encoder_ch_mult=[1, 1], decoder_ch_mult=[2, 1], z_channels=10,
    ),
    ch=32,
    image_shape=(1, 3, 14, 22),
    grid=3,
    watched=[
        *WATCHED, "encoder.conv_blocks.0.downsample.conv.bias", "encoder.conv_blocks.1.attn.1.norm.weight",
        "decoder.conv_blocks.0.upsample.conv.bias", "decoder.conv_blocks.1.res.0.nin_shortcut.weight",
    ],
)
