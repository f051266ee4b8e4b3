//! Between pictures and tensors.

use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use crate::{Error, Result};

/// Pictures of one size as (b, 3, h, w) f32 on `device`, values x/127.5 - 1 in [-1, 1]. Fails when `images` is empty or
/// the sizes differ.
pub fn to_tensor(images: &[RgbImage], device: &Device) -> Result<Tensor> {
    planes(images, device, |value, _| f32::from(value) / 127.5 - 1.0)
}

/// Fails unless every picture is a square of `side` pixels, which `model` takes.
pub fn check_side(images: &[RgbImage], side: u32, model: &str) -> Result<()> {
    match images
        .iter()
        .find(|image| image.dimensions() != (side, side))
    {
        None => Ok(()),
        Some(image) => Err(Error::invalid(
            format!(
                "{model} was given a picture of {}×{} pixels",
                image.width(),
                image.height()
            ),
            format!("it takes {side}×{side}: images::square cuts out the middle and resizes it"),
        )),
    }
}

/// Pictures of one size as (b, 3, h, w) f32 on `device`, values (x/255 - mean) / std for each channel. Fails when
/// `images` is empty or the sizes differ.
pub fn normalized(
    images: &[RgbImage],
    mean: [f32; 3],
    std: [f32; 3],
    device: &Device,
) -> Result<Tensor> {
    planes(images, device, |value, channel| {
        (f32::from(value) / 255.0 - mean[channel]) / std[channel]
    })
}

fn planes(
    images: &[RgbImage],
    device: &Device,
    value: impl Fn(u8, usize) -> f32,
) -> Result<Tensor> {
    let Some(first) = images.first() else {
        return Err(Error::invalid(
            "an empty batch of pictures",
            "give at least one",
        ));
    };
    let (w, h) = first.dimensions();
    let mut data = Vec::with_capacity(images.len() * first.len());
    for image in images {
        if image.dimensions() != (w, h) {
            return Err(Error::invalid(
                format!(
                    "a batch holds pictures of {w}x{h} and of {}x{} pixels",
                    image.width(),
                    image.height()
                ),
                "resize them to one size first",
            ));
        }
        for channel in 0..3 {
            data.extend(image.pixels().map(|pixel| value(pixel.0[channel], channel)));
        }
    }
    let shape = (images.len(), 3, h as usize, w as usize);
    Ok(Tensor::from_vec(data, shape, device)?)
}

/// Pictures from (b, 3, h, w) of any float type, values in [-1, 1]; what lies outside is clamped. Each becomes
/// round(127.5x + 127.5), halves up: clamp(127.5x + 128, 0, 255) cut to u8, as LlamaGen's
/// `sample_t2i.py` has it. The inverse of [`to_tensor`]. Fails for another shape, or when a value is not a number.
pub fn from_tensor(tensor: &Tensor) -> Result<Vec<RgbImage>> {
    let (_, channels, h, w) = tensor.dims4()?;
    if channels != 3 {
        return Err(Error::invalid(
            format!("a picture with {channels} channels"),
            "give tensors of shape (b, 3, h, w)",
        ));
    }
    let values = tensor
        .to_dtype(DType::F32)?
        .to_device(&Device::Cpu)?
        .permute((0, 2, 3, 1))?
        .flatten_all()?
        .to_vec1::<f32>()?;
    if values.iter().any(|v| v.is_nan()) {
        return Err(Error::invalid(
            "a generated picture holds values that are not numbers",
            "look at the loss of its model; lower the guidance scale, or compute in f32",
        ));
    }
    Ok(values
        .chunks_exact((3 * h * w).max(1))
        .map(|values| {
            let mut image = RgbImage::new(w as u32, h as u32);
            for (to, &value) in image.iter_mut().zip(values) {
                *to = (127.5 * value + 128.0).clamp(0.0, 255.0) as u8;
            }
            image
        })
        .collect())
}
