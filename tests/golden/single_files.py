"""Single files as Stability AI, Black Forest Labs, ComfyUI and llama.cpp name their tensors, made of the small pipelines
in diffusers' layout that the other programs here made: python tests/golden/single_files.py

Writes tests/golden/single-file/. The names are written here the other way round than proxytune reads them; diffusers' own
conversions must give back the tensors of the pipelines.
"""
import inspect
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
OUT = HERE / "single-file"


def weights(folder):
    (file,) = [*folder.glob("model.safetensors"), *folder.glob("diffusion_pytorch_model*.safetensors")]
    return {k: v.float() for k, v in load_file(file).items()}


def renamed(tensors, rules):
    """Every name with the first rule that fits it, a regular expression and its replacement."""
    out = {}
    for name, value in tensors.items():
        for pattern, to in rules:
            new, count = re.subn(f"^{pattern}$", to, name)
            if count:
                out[new] = value
                break
        else:
            out[name] = value
    return out


def fuse(tensors, pattern, parts, to):
    """Tensors whose names differ in `parts` alone become one, row after row."""
    out, groups = {}, {}
    alternatives = "|".join(re.escape(part) for part in parts)
    for name, value in tensors.items():
        found = re.match(pattern.replace("PART", f"(?P<part>{alternatives})") + "$", name)
        if not found:
            out[name] = value
            continue
        key = found.expand(to)
        groups.setdefault(key, {})[found["part"]] = value
    for key, group in groups.items():
        out[key] = torch.cat([group[part] for part in parts])
    return out


def swap(value):
    scale, shift = value.chunk(2)
    return torch.cat([shift, scale])


def flux(tensors):
    double, single = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
    t = fuse(tensors, double + r"attn\.PART\.(weight|bias)", ["to_q", "to_k", "to_v"], r"double_blocks.\1.img_attn.qkv.\3")
    t = fuse(t, double + r"attn\.PART\.(weight|bias)", ["add_q_proj", "add_k_proj", "add_v_proj"], r"double_blocks.\1.txt_attn.qkv.\3")
    t = fuse(t, single + r"PART\.(weight|bias)", ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"], r"single_blocks.\1.linear1.\3")
    t = renamed(t, [
        (r"time_text_embed\.timestep_embedder\.linear_1\.(.*)", r"time_in.in_layer.\1"),
        (r"time_text_embed\.timestep_embedder\.linear_2\.(.*)", r"time_in.out_layer.\1"),
        (r"time_text_embed\.guidance_embedder\.linear_1\.(.*)", r"guidance_in.in_layer.\1"),
        (r"time_text_embed\.guidance_embedder\.linear_2\.(.*)", r"guidance_in.out_layer.\1"),
        (r"time_text_embed\.text_embedder\.linear_1\.(.*)", r"vector_in.in_layer.\1"),
        (r"time_text_embed\.text_embedder\.linear_2\.(.*)", r"vector_in.out_layer.\1"),
        (r"context_embedder\.(.*)", r"txt_in.\1"),
        (r"x_embedder\.(.*)", r"img_in.\1"),
        (double + r"norm1\.linear\.(.*)", r"double_blocks.\1.img_mod.lin.\2"),
        (double + r"norm1_context\.linear\.(.*)", r"double_blocks.\1.txt_mod.lin.\2"),
        (double + r"attn\.norm_q\.weight", r"double_blocks.\1.img_attn.norm.query_norm.scale"),
        (double + r"attn\.norm_k\.weight", r"double_blocks.\1.img_attn.norm.key_norm.scale"),
        (double + r"attn\.norm_added_q\.weight", r"double_blocks.\1.txt_attn.norm.query_norm.scale"),
        (double + r"attn\.norm_added_k\.weight", r"double_blocks.\1.txt_attn.norm.key_norm.scale"),
        (double + r"attn\.to_out\.0\.(.*)", r"double_blocks.\1.img_attn.proj.\2"),
        (double + r"attn\.to_add_out\.(.*)", r"double_blocks.\1.txt_attn.proj.\2"),
        (double + r"ff\.net\.0\.proj\.(.*)", r"double_blocks.\1.img_mlp.0.\2"),
        (double + r"ff\.net\.2\.(.*)", r"double_blocks.\1.img_mlp.2.\2"),
        (double + r"ff_context\.net\.0\.proj\.(.*)", r"double_blocks.\1.txt_mlp.0.\2"),
        (double + r"ff_context\.net\.2\.(.*)", r"double_blocks.\1.txt_mlp.2.\2"),
        (single + r"norm\.linear\.(.*)", r"single_blocks.\1.modulation.lin.\2"),
        (single + r"attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
        (single + r"attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
        (single + r"proj_out\.(.*)", r"single_blocks.\1.linear2.\2"),
        (r"proj_out\.(.*)", r"final_layer.linear.\1"),
        (r"norm_out\.linear\.(.*)", r"final_layer.adaLN_modulation.1.\1"),
    ])
    return {k: swap(v) if k.startswith("final_layer.adaLN") else v for k, v in t.items()}


def sd3(tensors):
    block = r"transformer_blocks\.(\d+)\."
    last = 1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("transformer_blocks."))
    for attention in ["attn", "attn2"]:
        tensors = fuse(tensors, block + attention + r"\.PART\.(weight|bias)", ["to_q", "to_k", "to_v"],
                       rf"joint_blocks.\1.x_block.{attention}.qkv.\3")
    t = fuse(tensors, block + r"attn\.PART\.(weight|bias)", ["add_q_proj", "add_k_proj", "add_v_proj"],
             r"joint_blocks.\1.context_block.attn.qkv.\3")
    t = renamed(t, [
        (r"pos_embed\.pos_embed", "pos_embed"),
        (r"pos_embed\.proj\.(.*)", r"x_embedder.proj.\1"),
        (r"time_text_embed\.timestep_embedder\.linear_1\.(.*)", r"t_embedder.mlp.0.\1"),
        (r"time_text_embed\.timestep_embedder\.linear_2\.(.*)", r"t_embedder.mlp.2.\1"),
        (r"time_text_embed\.text_embedder\.linear_1\.(.*)", r"y_embedder.mlp.0.\1"),
        (r"time_text_embed\.text_embedder\.linear_2\.(.*)", r"y_embedder.mlp.2.\1"),
        (block + r"norm1\.linear\.(.*)", r"joint_blocks.\1.x_block.adaLN_modulation.1.\2"),
        (block + r"norm1_context\.linear\.(.*)", r"joint_blocks.\1.context_block.adaLN_modulation.1.\2"),
        (block + r"attn\.norm_q\.(.*)", r"joint_blocks.\1.x_block.attn.ln_q.\2"),
        (block + r"attn\.norm_k\.(.*)", r"joint_blocks.\1.x_block.attn.ln_k.\2"),
        (block + r"attn2\.norm_q\.(.*)", r"joint_blocks.\1.x_block.attn2.ln_q.\2"),
        (block + r"attn2\.norm_k\.(.*)", r"joint_blocks.\1.x_block.attn2.ln_k.\2"),
        (block + r"attn\.norm_added_q\.(.*)", r"joint_blocks.\1.context_block.attn.ln_q.\2"),
        (block + r"attn\.norm_added_k\.(.*)", r"joint_blocks.\1.context_block.attn.ln_k.\2"),
        (block + r"attn\.to_out\.0\.(.*)", r"joint_blocks.\1.x_block.attn.proj.\2"),
        (block + r"attn2\.to_out\.0\.(.*)", r"joint_blocks.\1.x_block.attn2.proj.\2"),
        (block + r"attn\.to_add_out\.(.*)", r"joint_blocks.\1.context_block.attn.proj.\2"),
        (block + r"ff\.net\.0\.proj\.(.*)", r"joint_blocks.\1.x_block.mlp.fc1.\2"),
        (block + r"ff\.net\.2\.(.*)", r"joint_blocks.\1.x_block.mlp.fc2.\2"),
        (block + r"ff_context\.net\.0\.proj\.(.*)", r"joint_blocks.\1.context_block.mlp.fc1.\2"),
        (block + r"ff_context\.net\.2\.(.*)", r"joint_blocks.\1.context_block.mlp.fc2.\2"),
        (r"proj_out\.(.*)", r"final_layer.linear.\1"),
        (r"norm_out\.linear\.(.*)", r"final_layer.adaLN_modulation.1.\1"),
    ])
    swapped = ("final_layer.adaLN", f"joint_blocks.{last - 1}.context_block.adaLN")
    return {k: swap(v) if k.startswith(swapped) else v for k, v in t.items()}


def unet(tensors, layers):
    """Blocks are counted through: a level has `layers` on the way down and one that halves, one more on the way up."""
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    has_attention = {k.split(".")[1] for k in tensors if re.match(r"up_blocks\.\d+\.attentions", k)}
    out = {}
    for name, value in tensors.items():
        part = name.split(".")
        way, rest = part[0], part[1:]
        if way == "mid_block":
            rest = ["0", *rest]
        if way in ("down_blocks", "up_blocks", "mid_block"):
            level, kind, index, tail = int(rest[0]), rest[1], int(rest[2]), rest[3:]
            if kind == "resnets":
                tail = [resnet[tail[0]], *tail[1:]]
            place = {"resnets": 0, "attentions": 1}.get(kind)
            if way == "mid_block":
                new = f"middle_block.{1 if kind == 'attentions' else 2 * index}"
            elif way == "down_blocks":
                new = f"input_blocks.{1 + level * (layers + 1) + (layers if kind == 'downsamplers' else index)}"
                new += ".0.op" if kind == "downsamplers" else f".{place}"
            elif kind == "upsamplers":
                new = f"output_blocks.{level * (layers + 1) + layers}.{2 if str(level) in has_attention else 1}"
            else:
                new = f"output_blocks.{level * (layers + 1) + index}.{place}"
            if kind == "downsamplers":
                tail = tail[1:]
            out[".".join([new, *tail])] = value
        else:
            out.update(renamed({name: value}, [
                (r"time_embedding\.linear_1\.(.*)", r"time_embed.0.\1"),
                (r"time_embedding\.linear_2\.(.*)", r"time_embed.2.\1"),
                (r"add_embedding\.linear_1\.(.*)", r"label_emb.0.0.\1"),
                (r"add_embedding\.linear_2\.(.*)", r"label_emb.0.2.\1"),
                (r"conv_in\.(.*)", r"input_blocks.0.0.\1"),
                (r"conv_norm_out\.(.*)", r"out.0.\1"),
                (r"conv_out\.(.*)", r"out.2.\1"),
            ]))
    return out


def vae(tensors):
    levels = 1 + max(int(k.split(".")[2]) for k in tensors if k.startswith("decoder.up_blocks."))
    up = lambda m: f"decoder.up.{levels - 1 - int(m[1])}."
    out = {}
    for name, value in tensors.items():
        new = re.sub(r"^decoder\.up_blocks\.(\d+)\.", up, name)
        new = re.sub(r"^encoder\.down_blocks\.", "encoder.down.", new)
        for ours, ldm in [(".resnets.", ".block."), (".downsamplers.0.", ".downsample."), (".upsamplers.0.", ".upsample."),
                          ("mid_block.block.0.", "mid.block_1."), ("mid_block.block.1.", "mid.block_2."),
                          ("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."),
                          ("mid_block.attentions.0.to_q.", "mid.attn_1.q."), ("mid_block.attentions.0.to_k.", "mid.attn_1.k."),
                          ("mid_block.attentions.0.to_v.", "mid.attn_1.v."),
                          ("mid_block.attentions.0.to_out.0.", "mid.attn_1.proj_out."),
                          ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out")]:
            new = new.replace(ours, ldm)
        if "mid.attn_1" in new and value.dim() == 2:
            value = value[:, :, None, None]
        out[new] = value
    return out


def hugging_face_clip(tensors):
    return {k if k.startswith(("text_model.", "text_projection")) else f"text_model.{k}": v for k, v in tensors.items()}


def open_clip(tensors):
    layer = r"text_model\.encoder\.layers\.(\d+)\."
    t = hugging_face_clip(tensors)
    for kind in ["weight", "bias"]:
        t = fuse(t, layer + rf"self_attn\.PART\.{kind}", ["q_proj", "k_proj", "v_proj"],
                 rf"transformer.resblocks.\1.attn.in_proj_{kind}")
    t = renamed(t, [
        (r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
        (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"text_model\.final_layer_norm\.(.*)", r"ln_final.\1"),
        (r"text_projection\.weight", "text_projection"),
        (layer + r"layer_norm1\.(.*)", r"transformer.resblocks.\1.ln_1.\2"),
        (layer + r"layer_norm2\.(.*)", r"transformer.resblocks.\1.ln_2.\2"),
        (layer + r"self_attn\.out_proj\.(.*)", r"transformer.resblocks.\1.attn.out_proj.\2"),
        (layer + r"mlp\.fc1\.(.*)", r"transformer.resblocks.\1.mlp.c_fc.\2"),
        (layer + r"mlp\.fc2\.(.*)", r"transformer.resblocks.\1.mlp.c_proj.\2"),
    ])
    return {k: v.T if k == "text_projection" else v for k, v in t.items()}


def llama_cpp_t5(tensors):
    layer = r"encoder\.block\.(\d+)\.layer\."
    return renamed({k: v for k, v in tensors.items() if k != "encoder.embed_tokens.weight"}, [
        (r"shared\.weight", "token_embd.weight"),
        (r"encoder\.final_layer_norm\.weight", "enc.output_norm.weight"),
        (layer + r"0\.SelfAttention\.relative_attention_bias\.weight", r"enc.blk.\1.attn_rel_b.weight"),
        (layer + r"0\.SelfAttention\.(q|k|v|o)\.weight", r"enc.blk.\1.attn_\2.weight"),
        (layer + r"0\.layer_norm\.weight", r"enc.blk.\1.attn_norm.weight"),
        (layer + r"1\.layer_norm\.weight", r"enc.blk.\1.ffn_norm.weight"),
        (layer + r"1\.DenseReluDense\.wi_0\.weight", r"enc.blk.\1.ffn_gate.weight"),
        (layer + r"1\.DenseReluDense\.wi_1\.weight", r"enc.blk.\1.ffn_up.weight"),
        (layer + r"1\.DenseReluDense\.wo\.weight", r"enc.blk.\1.ffn_down.weight"),
    ])


def below(prefix, tensors):
    return {prefix + k: v for k, v in tensors.items()}


def save(tensors, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)


def save_gguf(tensors, path, architecture):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, value in tensors.items():
        value = value.contiguous().numpy()
        half = value.ndim == 2 and name.endswith("weight")
        writer.add_tensor(name, value.astype(np.float16) if half and architecture == "t5encoder" else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def same(converted, original, what):
    converted = {k: v for k, v in converted.items() if v is not None}
    missing = {k for k in original if k not in converted and not k.startswith("encoder.embed_tokens")}
    assert not missing, (what, missing)
    for k, v in converted.items():
        if k in original:
            assert torch.equal(v.reshape(original[k].shape), original[k]), (what, k)


def with_width(function, width):
    """diffusers' conversion of FLUX knows the published width alone."""
    source = inspect.getsource(function).replace("inner_dim = 3072", f"inner_dim = {width}")
    scope = dict(vars(theirs))
    exec(source, scope)
    return scope[function.__name__]


def kinds():
    """A matrix of every kind that is read, with the values that the gguf package unpacks."""
    generator = np.random.default_rng(5)
    Type = gguf.GGMLQuantizationType
    path = OUT / "kinds/kinds.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "kinds")
    expected = {}
    for kind in [Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K,
                 Type.Q5_K, Type.Q6_K]:
        values = generator.normal(size=(6, 512)).astype(np.float32)
        try:
            packed = gguf.quants.quantize(values, kind)
        except NotImplementedError:
            # The package unpacks these alone: any bits will do, with scales of a usual size.
            block, size = gguf.GGML_QUANT_SIZES[kind]
            packed = generator.integers(0, 256, size=(6, 512 // block, size), dtype=np.uint8)
            scales = {Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208]}[kind]
            for at in scales:
                scale = generator.uniform(0.01, 0.1, size=(6, 512 // block, 1)).astype(np.float16)
                packed[:, :, at : at + 2] = scale.view(np.uint8)
            packed = packed.reshape(6, -1)
        writer.add_tensor(kind.name, packed, raw_dtype=kind)
        expected[kind.name] = torch.from_numpy(gguf.quants.dequantize(packed, kind).reshape(6, 512).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save(expected, OUT / "kinds/unpacked.safetensors")


def main():
    shutil.rmtree(OUT, ignore_errors=True)

    folder = HERE / "text-to-image/flux/model"
    transformer, auto = weights(folder / "transformer"), weights(folder / "vae")
    single = flux(transformer)
    width = transformer["x_embedder.weight"].shape[0]
    convert = with_width(theirs.convert_flux_transformer_checkpoint_to_diffusers, width)
    same(convert(dict(single)), transformer, "flux")
    save(single, OUT / "flux/flux1-dev.safetensors")
    ldm = vae(auto)
    config = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    same(theirs.convert_ldm_vae_checkpoint(dict(ldm), config), auto, "vae")
    save(ldm, OUT / "flux/ae.safetensors")
    save(hugging_face_clip(weights(folder / "text_encoder")), OUT / "flux/clip_l.safetensors")
    t5 = weights(folder / "text_encoder_2")
    save(t5, OUT / "flux/t5xxl_fp16.safetensors")
    save_gguf(single, OUT / "flux-gguf/flux1-dev-F32.gguf", "flux")
    save_gguf(llama_cpp_t5(t5), OUT / "flux-gguf/t5-v1_1-xxl-encoder-F16.gguf", "t5encoder")

    folder = HERE / "text-to-image/sdxl-euler/model"
    net, auto = weights(folder / "unet"), weights(folder / "vae")
    second = weights(folder / "text_encoder_2")
    single = below("model.diffusion_model.", unet(net, 1))
    config = {"class_embed_type": None, "addition_embed_type": "text_time", "layers_per_block": 1,
              "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
    same(theirs.convert_ldm_unet_checkpoint(dict(single), config), net, "unet")
    single |= below("first_stage_model.", vae(auto))
    single |= below("conditioner.embedders.0.transformer.", hugging_face_clip(weights(folder / "text_encoder")))
    g = below("conditioner.embedders.1.model.", open_clip(second))

    class Model:
        config = type("Config", (), {"hidden_size": second["text_model.embeddings.token_embedding.weight"].shape[1]})

    same(theirs.convert_open_clip_checkpoint(Model, dict(g), prefix="conditioner.embedders.1.model."), second, "open_clip")
    save({k: v.half() if k.startswith("model.diffusion_model.") else v for k, v in (single | g).items()},
         OUT / "sdxl/sd_xl_base_1.0.safetensors")

    folder = HERE / "sd3-pipeline/tiny"
    transformer = weights(folder / "transformer")
    single = below("model.diffusion_model.", sd3(transformer))
    same(theirs.convert_sd3_transformer_checkpoint_to_diffusers(dict(single)), transformer, "sd3")
    single |= below("first_stage_model.", vae(weights(folder / "vae")))
    for name, suffix in [("clip_l", ""), ("clip_g", "_2"), ("t5xxl", "_3")]:
        tensors = weights(folder / f"text_encoder{suffix}")
        single |= below(f"text_encoders.{name}.transformer.", tensors if name == "t5xxl" else hugging_face_clip(tensors))
    save(single, OUT / "sd3/sd3_medium_incl_clips_t5xxlfp16.safetensors")

    transformer = weights(HERE / "sd3-transformer/sd35/model")
    single = below("model.diffusion_model.", sd3(transformer))
    same(theirs.convert_sd3_transformer_checkpoint_to_diffusers(dict(single)), transformer, "sd3.5")
    save(single, OUT / "sd35/sd3.5_medium.safetensors")

    kinds()


main()
