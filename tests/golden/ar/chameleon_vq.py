"""Cases for chameleon-vq: LUMINA=path/to/Lumina-mGPT python tests/golden/ar/chameleon_vq.py

Both directions are checked with Meta's source, which Lumina-mGPT's repository holds, in Meta's layout (vqgan.yaml beside
vqgan.ckpt); encoding alone with transformers, in its own. The checkpoints hold half-precision numbers; in vqgan.ckpt the
large weights are windows of one shared storage, which keeps the file small. training.safetensors as in llamagen_vq.py, with the
quantisation's loss as Meta's source has it for beta = 0.25, that is 0.25 * vq_loss + commit_loss.
"""
import json
import os
import sys

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import ChameleonConfig, ChameleonForConditionalGeneration
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

sys.path.insert(0, os.path.join(os.environ["LUMINA"], "lumina_mgpt", "model", "chameleon_vae_ori"))
from common import case, randomise, save
from vqgan import VQModel


def share(model, generator):
    """Large weights become windows of one random storage, each from another place on."""
    large = [p for p in model.parameters() if p.numel() >= 2048]
    storage = torch.randn(max(p.numel() for p in large) + 16 * len(large), generator=generator).half()
    windows = {}
    for i, p in enumerate(large):
        windows[id(p)] = storage[16 * i : 16 * i + p.numel()].view(p.shape)
    return {key: windows.get(id(p), p.data.half()) for key, p in model.named_parameters()}


def meta(name, ddconfig, n_embed, embed_dim, image_shape, grid, watched):
    generator = torch.Generator().manual_seed(len(name))
    folder = case("chameleon-vq", name)
    (folder / "model").mkdir()
    ddconfig = dict(double_z=False, in_channels=3, out_ch=3, dropout=0.0) | ddconfig
    params = dict(ddconfig=ddconfig, embed_dim=embed_dim, n_embed=n_embed)
    document = {"model": {"base_learning_rate": 4.5e-6, "target": "taming.models.vqgan.VQModel", "params": params}}
    (folder / "model" / "vqgan.yaml").write_text(yaml.safe_dump(document))
    model = VQModel(**params)
    randomise(model, generator)
    # The shared storage has standard normal numbers; what follows undoes their size.
    state = share(model, generator)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("norm1.weight") or key.endswith("norm2.weight") or key.endswith("norm.weight"):
                state[key] = (state[key] * 0.06).half()
            p.copy_(state[key].float())
    state = {key: state[key] for key in model.state_dict()}
    torch.save({"state_dict": state, "global_step": 7}, folder / "model" / "vqgan.ckpt")

    image = torch.rand(image_shape, generator=generator) * 2 - 1
    tokens = torch.randint(n_embed, (image_shape[0] + 1, grid * grid), generator=generator)
    model.eval()
    with torch.no_grad():
        z = model.quant_conv(model.encoder(image))
        indices = model.encode(image)[2][2].view(image_shape[0], -1)
        codes = model.quantize.get_codebook_entry(tokens.flatten(), [len(tokens), grid, grid, embed_dim])
        decoded = model.decode(codes)
        assert len(indices.unique()) > 4, indices
        # transformers' encoder is the same one under the same names.
        other = ChameleonVQVAE(
            ChameleonVQVAEConfig(
                embed_dim=embed_dim, num_embeddings=n_embed, latent_channels=ddconfig["z_channels"],
                resolution=ddconfig["resolution"], base_channels=ddconfig["ch"], channel_multiplier=ddconfig["ch_mult"],
                num_res_blocks=ddconfig["num_res_blocks"], attn_resolutions=ddconfig["attn_resolutions"],
                attn_type=ddconfig.get("attn_type", "vanilla"),
            )
        )
        missing = other.load_state_dict(model.state_dict(), strict=False).missing_keys
        assert not missing, missing
        assert torch.equal(other.encode(image).image_tokens.view(image_shape[0], -1), indices)
    save(folder / "reference.safetensors", {"input.image": image, "output": indices})
    save(folder / "reference-decode.safetensors", {"input.tokens": tokens, "output": decoded})

    model.zero_grad()
    reconstruction, loss = model(image)
    cotangent = torch.randn(reconstruction.shape, generator=generator) / reconstruction.numel() ** 0.5
    ((reconstruction * cotangent).sum() + loss).backward()
    parameters = dict(model.named_parameters())
    save(
        folder / "training.safetensors",
        {
            "input.image": image,
            "output.z": z,
            "output.reconstruction": reconstruction,
            "output.loss": loss,
            "cotangent": cotangent,
        }
        | {f"grad.{key}": parameters[key].grad for key in watched},
    )


def transformers(name, vq_config, image_shape):
    generator = torch.Generator().manual_seed(len(name))
    folder = case("chameleon-vq", name)
    config = ChameleonConfig(
        vocab_size=12, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vq_config=vq_config, vocabulary_map={"<image>": 3},
    )
    model = ChameleonForConditionalGeneration(config).half()
    vq = model.model.vqmodel.float()
    randomise(vq, generator)
    vq.half()
    model.save_pretrained(folder / "model")
    (folder / "model" / "generation_config.json").unlink(missing_ok=True)
    vq.float().eval()
    image = torch.rand(image_shape, generator=generator) * 2 - 1
    with torch.no_grad():
        tokens = vq.encode(image).image_tokens.view(image_shape[0], -1)
    assert len(tokens.unique()) > 4
    save(folder / "reference.safetensors", {"input.image": image, "output": tokens})


WATCHED = [
    "quantize.embedding.weight", "quant_conv.weight", "post_quant_conv.bias", "encoder.conv_in.weight",
    "encoder.down.0.block.0.norm2.weight", "encoder.mid.block_2.conv1.bias", "decoder.conv_in.bias",
    "decoder.mid.block_1.norm1.bias", "decoder.up.0.block.1.conv2.bias", "decoder.conv_out.weight",
]
meta(
    "meta-attention-at-a-level",
    dict(ch=32, ch_mult=[1, 1], num_res_blocks=1, attn_resolutions=[8], resolution=16, z_channels=6),
    n_embed=90,
    embed_dim=5,
    image_shape=(2, 3, 14, 6),
    grid=5,
    watched=[
        *WATCHED, "encoder.down.0.downsample.conv.bias", "encoder.down.1.attn.0.q.bias", "encoder.mid.attn_1.norm.weight",
        "decoder.up.1.upsample.conv.bias", "decoder.up.1.attn.1.proj_out.weight",
    ],
)
meta(
    "meta-no-attention",
    dict(ch=32, ch_mult=[1, 1, 1], num_res_blocks=2, attn_resolutions=[], resolution=256, z_channels=9, attn_type="none"),
    n_embed=70,
    embed_dim=7,
    image_shape=(1, 3, 12, 20),
    grid=3,
    watched=WATCHED,
)
transformers(
    "transformers",
    dict(
        base_channels=32, channel_multiplier=[1], num_res_blocks=1, resolution=64,
        latent_channels=10, embed_dim=6, num_embeddings=80,
    ),
    image_shape=(2, 3, 9, 5),
)
