//! Pictures: reading photos as people have them, resizing as the reference pipelines do it, and the ways between
//! pixels, tensors and stored bytes. Everywhere a picture is 8-bit RGB, taken as sRGB; profiles are not applied.

mod augment;
mod codec;
mod container;
mod draw;
mod font;
mod load;
mod resize;
mod tensor;

pub use augment::augment;
pub use codec::{decode_png, encode_png, encode_png_with, pixel_digest};
pub(crate) use draw::fitted;
pub use draw::{Canvas, grid};
pub use load::{
    Folder, MAX_BYTES, MAX_PIXELS, MAX_SIDE, Photo, decode, expect_photos, folder,
    is_other_picture, is_photo_name, load, read,
};
pub use resize::{
    Filter, center_crop, resize_and_crop, resize_exact, resize_short_side, short_side, square,
};
pub use tensor::{check_side, from_tensor, normalized, to_tensor};
