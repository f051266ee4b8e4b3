"""Golden pictures from Pillow: python generate.py writes golden.safetensors beside itself.

`source` is a picture of 61x47 pixels with smooth and hard parts. `resize.FILTER.WxH` is Pillow's resize of it.
`preprocess.NAME` is `source` as an evaluator's image processor of transformers (its PIL backend) has it, (3, h, w).
`file.NAME` is an encoded photo and `pixels.NAME` what it must decode to, as (h, w, 3) u8.
"""

import io
import pathlib

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

generator = np.random.default_rng(5)
height, width = 47, 61
y, x = np.mgrid[0:height, 0:width]
source = np.stack([x * 255 / width, y * 255 / height, (x * 7 + y * 3) % 256], axis=-1)
source[10:30, 15:40] = generator.integers(0, 256, (20, 25, 3))
source[35:, 50:] = (255, 0, 0)
source = source.astype(np.uint8)
picture = Image.fromarray(source)

tensors = {"source": source}
FILTERS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Widths that shrink at least as much as heights: there every Pillow goes through the rows first (13 swaps the passes
# where that is cheaper, which moves some values by one level).
for name, kind in FILTERS.items():
    for size in [(16, 16), (32, 24), (61, 20), (9, 47), (70, 50), (1, 1), (13, 64)]:
        tensors[f"resize.{name}.{size[0]}x{size[1]}"] = np.asarray(picture.resize(size, kind))

processors = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "dino": CLIPImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ),
    "vit": ViTImageProcessorPil(size={"height": 32, "width": 32}),
}
for name, processor in processors.items():
    tensors[f"preprocess.{name}"] = np.asarray(processor(picture)["pixel_values"][0], np.float32)


def add(name, image, expected, **options):
    """`expected` is an RGB picture, or an array of its pixels."""
    buffer = io.BytesIO()
    image.save(buffer, **options)
    tensors[f"file.{name}"] = np.frombuffer(buffer.getvalue(), np.uint8)
    tensors[f"pixels.{name}"] = np.asarray(expected)


smooth = Image.fromarray(source).resize((48, 32), Image.Resampling.BOX)
grey = smooth.convert("L")
turns = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
for orientation, turn in turns.items():
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = smooth if turn is None else smooth.transpose(turn)
    # Only one of each kind besides PNG, to keep the file small.
    add(f"png.orientation{orientation}", smooth, upright, format="PNG", exif=exif)
    if orientation == 6:
        add("webp.orientation6", smooth, upright, format="WEBP", lossless=True, exif=exif)
        add("jpeg.orientation6", smooth, upright, format="JPEG", quality=98, subsampling=0, exif=exif)

add("jpeg.colour", smooth, smooth, format="JPEG", quality=98, subsampling=0)
add("jpeg.progressive", smooth, smooth, format="JPEG", quality=98, subsampling=0, progressive=True)
add("jpeg.grey", grey, grey.convert("RGB"), format="JPEG", quality=98)
cmyk = smooth.convert("CMYK")
add("jpeg.cmyk", cmyk, cmyk.convert("RGB"), format="JPEG", quality=98, subsampling=0)
add("png.grey", grey, grey.convert("RGB"), format="PNG")
bits = grey.point(lambda v: 255 * (v > 100)).convert("1")
add("png.one_bit", bits, bits.convert("RGB"), format="PNG")
palette = smooth.quantize(16)
add("png.palette", palette, palette.convert("RGB"), format="PNG")
add("webp.lossless", smooth, smooth, format="WEBP", lossless=True)
lossy = io.BytesIO()
smooth.save(lossy, format="WEBP", quality=90)
add("webp.lossy", smooth, Image.open(io.BytesIO(lossy.getvalue())).convert("RGB"), format="WEBP", quality=90)


def on_white(rgba):
    values = np.asarray(rgba).astype(np.float64)
    alpha = values[..., 3:] / 255
    return np.floor(values[..., :3] * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)


rgba = smooth.copy()
rgba.putalpha(Image.fromarray(generator.integers(0, 256, (32, 48)).astype(np.uint8)))
add("png.alpha", rgba, on_white(rgba), format="PNG")
add("webp.alpha", rgba, on_white(rgba), format="WEBP", lossless=True, exact=True)
grey_alpha = grey.copy().convert("LA")
grey_alpha.putalpha(rgba.getchannel("A"))
add("png.grey_alpha", grey_alpha, on_white(grey_alpha.convert("RGBA")), format="PNG")
transparent = palette.copy()
clear = np.asarray(palette.convert("RGB")).copy()
clear[np.asarray(palette) == 3] = 255
add("png.palette_transparent", transparent, clear, format="PNG", transparency=3)

sixteen = generator.integers(0, 65536, (32, 48)).astype(np.uint16)
scaled = np.floor(sixteen / 257 + 0.5).astype(np.uint8)
add("png.grey_16_bit", Image.fromarray(sixteen), np.repeat(scaled[..., None], 3, -1), format="PNG")

save_file(
    {name: torch.from_numpy(np.array(array, order="C")) for name, array in sorted(tensors.items())},
    pathlib.Path(__file__).with_name("golden.safetensors"),
)
