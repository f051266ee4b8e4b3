//! What other programs call the layers of diffusion models, whose own names here are diffusers': the names of the models'
//! authors (`double_blocks.0.img_attn.qkv`), with dots or, in kohya-like files, underscores. There some layers are
//! several of diffusers' in one.

mod flux;
pub mod fused;
mod sd3;
mod sdxl;

use std::collections::BTreeMap;

use crate::Result;
use crate::config::{Family, Kind};
use crate::console::escaped;
use crate::models;
use crate::nn::Factors;

/// What starts the names of kohya-like files, whose layers have underscores for dots.
const KOHYA: [&str; 2] = ["lora_unet_", "lora_transformer_"];

/// Numbered blocks: what their authors and diffusers call them, and the layers of each by both names. A layer of the
/// authors' is one of diffusers', or several on top of each other.
struct Blocks {
    theirs: &'static str,
    ours: &'static str,
    layers: &'static [(&'static str, &'static [&'static str])],
}

/// The layers of a transformer by its authors' names and diffusers'.
struct Table {
    family: Family,
    outside: &'static [(&'static str, &'static str)],
    blocks: &'static [Blocks],
}

/// Where a layer of a file belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// diffusers' paths: of one layer, or of all that lie in it, from the top.
    pub layers: Vec<String>,
    /// Whether the name is that of the model's authors, whose last modulations have shift and scale the other way round.
    pub of_authors: bool,
    /// Whose layer it is, where the name tells.
    pub family: Option<Family>,
}

/// Where the layer called `name` belongs; `None` where the name is none of another program's. Prefixes with a dot have
/// been taken off.
pub fn place(name: &str) -> Option<Place> {
    let bare = KOHYA.iter().find_map(|prefix| name.strip_prefix(prefix));
    let flat = bare.unwrap_or(name).replace('.', "_");
    let tables = [&flux::TABLE, &sd3::TABLE];
    for table in tables {
        let Some((layers, family)) = table.of_authors(&flat) else {
            continue;
        };
        // Both may call a layer alike.
        let alike = matches!(&layers[..], [layer] if same(layer, &flat));
        return match alike {
            true if bare.is_none() => None,
            _ => Some(Place {
                layers,
                of_authors: !alike,
                family: family.filter(|_| !alike),
            }),
        };
    }
    let one = |layer: String, family| Place {
        layers: vec![layer],
        of_authors: false,
        family,
    };
    // diffusers' own names need no other name, but for their underscores.
    if let Some(layer) = sdxl::layer(&flat)
        && layer != name
    {
        return Some(one(layer, Some(models::sdxl::FAMILY)));
    }
    bare?;
    let found = tables.iter().find_map(|table| table.of_diffusers(&flat));
    found.map(|layer| one(layer, None))
}

/// What kohya-like programs call diffusers' layer at `path` of a model of this `family`, without a prefix, with the place
/// of it in that layer and the number of layers in it; `None` where they have none.
pub fn of_authors(family: Family, path: &str) -> Option<(String, usize, usize)> {
    if family == models::sdxl::FAMILY {
        return Some((sdxl::of_authors(path)?, 0, 1));
    }
    let tables = [&flux::TABLE, &sd3::TABLE];
    let table = tables.into_iter().find(|table| table.family == family)?;
    table.to_authors(path)
}

/// Whether models of this `family` have a layer at `path`, as far as names tell.
pub fn is_of(family: Family, path: &str) -> bool {
    let starts = |starts: &[&str]| starts.iter().any(|start| path.starts_with(start));
    if family.kind() != Kind::Diffusion {
        return !starts(UNET) && of_authors(models::flux::FAMILY, path).is_none();
    }
    // U-Nets of other depths have blocks that the published one lacks.
    (family == models::sdxl::FAMILY && starts(UNET)) || of_authors(family, path).is_some()
}

/// What starts the paths of a U-Net's layers in diffusers.
const UNET: &[&str] = &["down_blocks.", "up_blocks.", "mid_block."];

/// The family whose layers these are, where their names or the published models' widths tell.
pub fn family<'a>(layers: impl IntoIterator<Item = (&'a String, &'a Factors)>) -> Option<Family> {
    let layers: Vec<(&String, &Factors)> = layers.into_iter().collect();
    let has = |test: &dyn Fn(&str) -> bool| layers.iter().any(|(layer, _)| test(layer));
    let starts = |starts: &'static [&'static str]| {
        move |layer: &str| starts.iter().any(|start| layer.starts_with(start))
    };
    let wide = |widths: &[usize]| {
        layers.iter().any(|(layer, factors)| {
            let inputs = factors.a.dims().get(1);
            layer.ends_with("attn.to_q") && inputs.is_some_and(|inputs| widths.contains(inputs))
        })
    };
    if has(&starts(UNET)) {
        Some(models::sdxl::FAMILY)
    } else if has(&starts(&["single_transformer_blocks."])) {
        Some(models::flux::FAMILY)
    } else if has(&starts(&["layers."])) {
        Some(models::llamagen::FAMILY)
    } else if has(&starts(&["model.layers."])) {
        Some(models::chameleon::FAMILY)
    } else if has(&|layer| layer.contains(".attn2.")) || wide(&[1536, 2432]) {
        Some(models::sd3::FAMILY)
    } else if wide(&[3072]) {
        Some(models::flux::FAMILY)
    } else {
        None
    }
}

/// The layers under diffusers' names, and the family that their names tell. What is several layers in one is cut up; what
/// cannot be, or is there twice, is added to `faults`.
pub fn renamed(
    layers: BTreeMap<String, Factors>,
    faults: &mut Vec<String>,
) -> Result<(BTreeMap<String, Factors>, Option<Family>)> {
    let mut own: BTreeMap<String, Factors> = BTreeMap::new();
    let mut told = None;
    for (layer, factors) in layers {
        let name = escaped(&layer).into_owned();
        let Some(place) = place(&layer) else {
            insert(&mut own, layer, factors, faults);
            continue;
        };
        told = told.or(place.family);
        let count = place.layers.len();
        if count == 1 {
            for path in place.layers {
                let turned = place.of_authors && fused::is_turned(&path, &factors);
                let factors = match turned {
                    true => fused::halves_exchanged(&factors)?,
                    false => factors.clone(),
                };
                insert(&mut own, path, factors, faults);
            }
            continue;
        }
        let Some(parts) = fused::split(&factors, count)? else {
            let (a, b) = (factors.a.dims(), factors.b.dims());
            faults.push(format!(
                "{name} has factors of shapes {a:?} and {b:?}, which are not those of {count} layers in one"
            ));
            continue;
        };
        for (path, part) in place.layers.into_iter().zip(parts) {
            if let Some(part) = part {
                insert(&mut own, path, part, faults);
            }
        }
    }
    let told = told.or_else(|| family(&own));
    Ok((own, told))
}

fn insert(
    own: &mut BTreeMap<String, Factors>,
    path: String,
    factors: Factors,
    faults: &mut Vec<String>,
) {
    if own.contains_key(&path) {
        faults.push(format!(
            "{} is there a second time, under another name",
            escaped(&path)
        ));
    }
    own.insert(path, factors);
}

impl Table {
    /// diffusers' layers in the layer that the model's authors call `flat`, with underscores for dots, and the family where
    /// no other one's layers are called so.
    fn of_authors(&self, flat: &str) -> Option<(Vec<String>, Option<Family>)> {
        for blocks in self.blocks {
            if let Some((number, rest)) = numbered(flat, blocks.theirs) {
                let (_, ours) = blocks.layers.iter().find(|(name, _)| same(name, rest))?;
                let path = |layer: &&str| format!("{}.{number}.{layer}", blocks.ours);
                return Some((ours.iter().map(path).collect(), Some(self.family)));
            }
        }
        let found = self.outside.iter().find(|(name, _)| same(name, flat));
        found.map(|(_, ours)| (vec![ours.to_string()], None))
    }

    /// diffusers' layer whose path is `flat` with underscores for dots.
    fn of_diffusers(&self, flat: &str) -> Option<String> {
        for blocks in self.blocks {
            if let Some((number, rest)) = numbered(flat, blocks.ours) {
                let mut all = blocks.layers.iter().flat_map(|(_, ours)| ours.iter());
                // Other blocks may be called alike.
                if let Some(layer) = all.find(|layer| same(layer, rest)) {
                    return Some(format!("{}.{number}.{layer}", blocks.ours));
                }
            }
        }
        let found = self.outside.iter().find(|(_, ours)| same(ours, flat));
        found.map(|(_, ours)| ours.to_string())
    }

    /// The authors' name of the layer in which diffusers' `path` lies, its place there and how many do.
    fn to_authors(&self, path: &str) -> Option<(String, usize, usize)> {
        for blocks in self.blocks {
            let Some(rest) = path.strip_prefix(blocks.ours) else {
                continue;
            };
            let (number, rest) = rest.strip_prefix('.')?.split_once('.')?;
            number.parse::<usize>().ok()?;
            return blocks.layers.iter().find_map(|(theirs, ours)| {
                let at = ours.iter().position(|layer| *layer == rest)?;
                let name = format!("{}.{number}.{theirs}", blocks.theirs);
                Some((name.replace('.', "_"), at, ours.len()))
            });
        }
        let found = self.outside.iter().find(|(_, ours)| *ours == path);
        found.map(|(theirs, _)| (theirs.replace('.', "_"), 0, 1))
    }
}

/// Whether `flat` is `name` with underscores for dots.
fn same(name: &str, flat: &str) -> bool {
    name.replace('.', "_") == flat
}

/// The number of the block of `stem` in `flat`, and what follows it.
fn numbered<'a>(flat: &'a str, stem: &str) -> Option<(usize, &'a str)> {
    let rest = flat.strip_prefix(stem)?.strip_prefix('_')?;
    let (number, rest) = rest.split_once('_')?;
    Some((number.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layer_comes_back_by_its_authors_name_and_by_diffusers_with_underscores() {
        for table in [&flux::TABLE, &sd3::TABLE] {
            let outside = table.outside.iter().map(|(_, ours)| ours.to_string());
            let inside = table.blocks.iter().flat_map(|blocks| {
                let layers = blocks.layers.iter().flat_map(|(_, ours)| ours.iter());
                layers.map(|layer| format!("{}.11.{layer}", blocks.ours))
            });
            for path in outside.chain(inside) {
                let (theirs, at, count) = of_authors(table.family, &path).unwrap();
                let place_of = |name: &str| place(name).map(|place| place.layers);
                let layers = place_of(&format!("lora_unet_{theirs}")).unwrap();
                assert_eq!((&layers[at], layers.len()), (&path, count));
                let flat = format!("lora_transformer_{}", path.replace('.', "_"));
                assert_eq!(place_of(&flat), Some(vec![path.clone()]));
                assert_eq!(place_of(&path), None);
            }
        }
        let theirs = place("double_blocks.7.img_attn.qkv").unwrap();
        assert_eq!(theirs.layers.len(), 3);
        assert_eq!(
            (theirs.of_authors, theirs.family),
            (true, Some(models::flux::FAMILY))
        );
    }

    #[test]
    fn names_of_nothing_have_no_place() {
        for name in [
            "lora_te1_text_model_encoder_layers_0_mlp_fc1",
            "lora_unet_double_blocks_0_img_attn_something",
            "lora_unet_joint_blocks_x_x_block_attn_qkv",
            "layers.0.attention.wo",
            "model.layers.0.self_attn.q_proj",
            "transformer_blocks.0.attn.to_q",
            "down_blocks.1.attentions.0.proj_in",
        ] {
            assert_eq!(place(name), None, "{name}");
        }
    }
}
