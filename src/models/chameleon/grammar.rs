//! How Lumina-mGPT (Liu et al. 2024, arXiv 2408.02657) writes an image as tokens. Reference: `FlexARItemProcessor` in
//! its `item_processor.py`.
//!
//! ```text
//! prompt:  <s> "Generate an image of 768x768 according to the following prompt:\n…" <reserved08706>
//! answer:  <racm3:break> height width (columns codes, <reserved08799>) × rows <eoss> <reserved08706>
//! ```
//! Height and width are counted in units of [`Config::patch_size`] pixels; n of them is the token `<reserved08800+n>`.
//! The id of a code is that of the name `IMGIMG…Z` which spells the code's digits with A for 0 to J for 9.

use std::collections::{HashMap, HashSet};

use super::config::Config;
use crate::models::tokenizer::TextTokenizer;
use crate::{Error, Result};

/// Ids of the tokens that frame an image, and those of the codes.
#[derive(Debug, Clone, PartialEq)]
pub struct Vocabulary {
    /// `<s>`, before every prompt.
    pub beginning: u32,
    /// `<reserved08706>`, after the prompt and after the answer.
    pub separator: u32,
    /// `<racm3:break>`, before an image.
    pub image_start: u32,
    /// `<eoss>`, after an image.
    pub image_end: u32,
    /// `<reserved08799>`, after each row of codes.
    pub new_line: u32,
    /// The id of each code.
    pub codes: Vec<u32>,
    /// The token of n units at n − 1, as far as the vocabulary has them.
    units: Vec<u32>,
}

impl Vocabulary {
    /// Looks the names up with `id`; `codes` is the number of codes, and every id must be below `vocab_size`.
    ///
    /// # Errors
    /// With every name that is missing, and every id that is too large or stands for two codes.
    pub fn new(id: impl Fn(&str) -> Option<u32>, codes: usize, vocab_size: usize) -> Result<Self> {
        let mut faults = Vec::new();
        let mut find = |name: &str| match id(name) {
            Some(id) if (id as usize) < vocab_size => id,
            Some(id) => {
                faults.push(format!("{name} has id {id}, the model has {vocab_size}"));
                0
            }
            None => {
                faults.push(format!("{name} is missing"));
                0
            }
        };
        let found = Self {
            beginning: find("<s>"),
            separator: find("<reserved08706>"),
            image_start: find("<racm3:break>"),
            image_end: find("<eoss>"),
            new_line: find("<reserved08799>"),
            codes: (0..codes).map(|code| find(&name_of_code(code))).collect(),
            units: (1..)
                .map_while(|n| id(&format!("<reserved{:05}>", 8800 + n)))
                .collect(),
        };
        let distinct: HashSet<&u32> = found.codes.iter().collect();
        if faults.is_empty() && distinct.len() < codes {
            faults.push("two codes have the same id".into());
        }
        if faults.is_empty() {
            return Ok(found);
        }
        let more = faults.len().saturating_sub(10);
        faults.truncate(10);
        if more > 0 {
            faults.push(format!("and {more} more"));
        }
        Err(Error::invalid(
            format!("the vocabulary of images: {}", faults.join("; ")),
            "use tokenizer.json of the same checkpoint",
        ))
    }

    /// The vocabulary of the checkpoint with `tokenizer` and `config`, whose image tokenizer has `codes` codes.
    pub fn of(tokenizer: &TextTokenizer, config: &Config, codes: usize) -> Result<Self> {
        let vocabulary = Self::new(|name| tokenizer.id(name), codes, config.vocab_size)?;
        let Some(map) = &config.vocabulary_map else {
            return Ok(vocabulary);
        };
        // transformers translates with the config's own map: the two must not differ.
        let differs = |code: &usize| {
            let id = map.get(&name_of_code(*code));
            id.is_some_and(|id| *id != vocabulary.codes[*code])
        };
        match (0..codes).find(differs) {
            None => Ok(vocabulary),
            Some(code) => Err(Error::invalid(
                format!(
                    "{} has another id in tokenizer.json than in vocabulary_map of config.json",
                    name_of_code(code)
                ),
                "take both files from the same checkpoint",
            )),
        }
    }

    /// The token for `n` units of height or width.
    pub fn units(&self, n: usize) -> Result<u32> {
        n.checked_sub(1)
            .and_then(|index| self.units.get(index))
            .copied()
            .ok_or_else(|| {
                Error::invalid(
                    format!("an image {n} units high or wide"),
                    format!("the vocabulary counts from 1 to {}", self.units.len()),
                )
            })
    }
}

/// `IMGIMG`, the digits of `code` as letters, `Z`.
pub fn name_of_code(code: usize) -> String {
    let digits = code.to_string();
    let letters = digits.bytes().map(|digit| char::from(digit - b'0' + b'A'));
    format!("IMGIMG{}Z", letters.collect::<String>())
}

/// The format of images of one size.
#[derive(Debug, Clone, PartialEq)]
pub struct Format {
    vocabulary: Vocabulary,
    /// Ids of codes back to codes.
    codes: HashMap<u32, u32>,
    /// Height and width in pixels.
    size: (usize, usize),
    opening: [u32; 3],
    rows: usize,
    columns: usize,
}

impl Format {
    /// Images of `height` × `width` pixels, units of `patch_size` pixels and codes of `downsampling` pixels a side.
    pub fn new(
        vocabulary: Vocabulary,
        (height, width): (usize, usize),
        patch_size: usize,
        downsampling: usize,
    ) -> Result<Self> {
        let whole = |side: usize| side > 0 && side.is_multiple_of(patch_size.max(1));
        if !whole(height) || !whole(width) || !patch_size.is_multiple_of(downsampling) {
            return Err(Error::invalid(
                format!("images of {width}x{height} pixels"),
                format!("sides are multiples of {patch_size} pixels here"),
            ));
        }
        let units = |side: usize| vocabulary.units(side / patch_size);
        let ids = vocabulary.codes.iter().zip(0..);
        Ok(Self {
            codes: ids.map(|(&id, code)| (id, code)).collect(),
            size: (height, width),
            opening: [vocabulary.image_start, units(height)?, units(width)?],
            rows: height / downsampling,
            columns: width / downsampling,
            vocabulary,
        })
    }

    /// Number of codes of an image.
    pub fn count(&self) -> usize {
        self.rows * self.columns
    }

    /// Height of the images in pixels.
    pub fn side(&self) -> usize {
        self.size.0
    }

    /// How many positions of a sequence are not for the words of its prompt: of one that is learnt, whose last token is
    /// not fed, or of one that is drawn, whose last code is not.
    pub fn tokens_beside_words(&self, learns: bool) -> usize {
        let frame = 2 + self.opening.len();
        match learns {
            true => frame + self.tokens_of(self.count()) + 1,
            false => frame + self.tokens_of(self.count().saturating_sub(1)),
        }
    }

    /// What is asked of the model for an image of `prompt`.
    pub fn request(&self, prompt: &str) -> String {
        let (height, width) = self.size;
        format!(
            "Generate an image of {width}x{height} according to the following prompt:\n{prompt}"
        )
    }

    /// The prompt's tokens, from `<s>` to the separator.
    pub fn prompt(&self, tokenizer: &TextTokenizer, prompt: &str) -> Result<Vec<u32>> {
        let words = tokenizer.plain_ids(&self.request(prompt))?;
        let (first, last) = (self.vocabulary.beginning, self.vocabulary.separator);
        Ok([vec![first], words, vec![last]].concat())
    }

    /// The tokens before the first code: start, height, width.
    pub fn opening(&self) -> [u32; 3] {
        self.opening
    }

    /// The answer's tokens for an image of `codes`, row by row.
    pub fn answer(&self, codes: &[u32]) -> Result<Vec<u32>> {
        if codes.len() != self.count() {
            return Err(Error::invalid(
                format!("{} codes for an image of {}", codes.len(), self.count()),
                "tokenize the image again with this model's tokenizer",
            ));
        }
        let mut tokens = self.opening.to_vec();
        for (index, &code) in codes.iter().enumerate() {
            tokens.extend(self.after(index, code)?);
        }
        tokens.extend([self.vocabulary.image_end, self.vocabulary.separator]);
        Ok(tokens)
    }

    /// The tokens that the code at `index` stands for: its own, and a new line where it ends a row.
    pub fn after(&self, index: usize, code: u32) -> Result<Vec<u32>> {
        let id = self.vocabulary.codes.get(code as usize).ok_or_else(|| {
            Error::invalid(
                format!("code {code} of {}", self.vocabulary.codes.len()),
                "tokenize the image again with this model's tokenizer",
            )
        })?;
        let mut tokens = vec![*id];
        if (index + 1).is_multiple_of(self.columns) {
            tokens.push(self.vocabulary.new_line);
        }
        Ok(tokens)
    }

    /// The ids of all codes: what may stand where a code stands.
    pub fn code_ids(&self) -> &[u32] {
        &self.vocabulary.codes
    }

    /// The codes of an answer, or of an image from its start token on; what follows the image is not read.
    ///
    /// # Errors
    /// When it is not an image of this format.
    pub fn codes(&self, answer: &[u32]) -> Result<Vec<u32>> {
        let unlike = || {
            Error::invalid(
                "tokens that are no image of this size",
                "draw or tokenize the image again",
            )
        };
        let rest = answer.strip_prefix(&self.opening).ok_or_else(unlike)?;
        let length = self.rows * (self.columns + 1);
        if rest.get(length) != Some(&self.vocabulary.image_end) {
            return Err(unlike());
        }
        let mut codes = Vec::with_capacity(self.count());
        for row in rest[..length].chunks(self.columns + 1) {
            if row.last() != Some(&self.vocabulary.new_line) {
                return Err(unlike());
            }
            for id in &row[..self.columns] {
                codes.push(*self.codes.get(id).ok_or_else(unlike)?);
            }
        }
        Ok(codes)
    }

    /// Number of tokens that the first `codes` codes stand for, new lines included.
    pub fn tokens_of(&self, codes: usize) -> usize {
        codes + codes / self.columns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chameleon's vocabulary as far as images need it: its ids are facts of the published files.
    fn chameleon(name: &str) -> Option<u32> {
        match name {
            "<s>" => Some(0),
            "<eoss>" => Some(8196),
            "<racm3:break>" => Some(8197),
            _ => {
                if let Some(number) = name.strip_prefix("<reserved") {
                    let number: u32 = number.strip_suffix('>')?.parse().ok()?;
                    return (number < 65532).then_some(number + 4);
                }
                let letters = name.strip_prefix("IMGIMG")?.strip_suffix('Z')?;
                let digits: String = letters
                    .bytes()
                    .map(|letter| char::from(letter - b'A' + b'0'))
                    .collect();
                Some(digits.parse::<u32>().ok()? + 4)
            }
        }
    }

    #[test]
    fn an_image_of_768_pixels_is_2356_tokens_with_the_published_ids() {
        let vocabulary = Vocabulary::new(chameleon, 8192, 65536).unwrap();
        let format = Format::new(vocabulary, (768, 768), 32, 16).unwrap();
        let codes: Vec<u32> = (0..2304).collect();
        let answer = format.answer(&codes).unwrap();
        // The separator after the image is not the image's own.
        assert_eq!((answer.len(), format.tokens_of(2304)), (2357, 2352));
        assert_eq!((format.tokens_of(47), format.tokens_of(48)), (47, 49));
        assert_eq!(answer[..4], [8197, 8828, 8828, 4]);
        assert_eq!(answer[3 + 48], 8803);
        assert_eq!(answer[2354..], [8803, 8196, 8710]);
        assert_eq!(format.codes(&answer).unwrap(), codes);
        assert!(format.codes(&answer[1..]).is_err());
        assert_eq!(
            format.request("a dog"),
            "Generate an image of 768x768 according to the following prompt:\na dog"
        );
    }

    #[test]
    fn height_comes_before_width() {
        let vocabulary = Vocabulary::new(chameleon, 8192, 65536).unwrap();
        let format = Format::new(vocabulary, (64, 96), 32, 16).unwrap();
        assert_eq!(format.opening(), [8197, 8806, 8807]);
        assert_eq!(format.count(), 4 * 6);
        assert!(format.request("x").contains("96x64"));
        let answer = format.answer(&[7; 24]).unwrap();
        assert_eq!(answer.iter().filter(|&&id| id == 8803).count(), 4);
    }

    #[test]
    fn a_vocabulary_without_the_codes_is_refused_by_name() {
        let error = Vocabulary::new(|name| chameleon(name).filter(|id| *id != 9), 8192, 65536);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("IMGIMGFZ is missing"), "{error}");
        let error = Vocabulary::new(chameleon, 8192, 8000).unwrap_err();
        assert!(error.to_string().contains("and "), "{error}");
        let same = |name: &str| chameleon(name).map(|id| if id == 9 { 8 } else { id });
        assert!(Vocabulary::new(same, 8192, 65536).is_err());
    }

    #[test]
    fn sizes_that_are_no_whole_units_are_refused() {
        let vocabulary = Vocabulary::new(chameleon, 8192, 65536).unwrap();
        assert!(Format::new(vocabulary, (100, 96), 32, 16).is_err());
    }
}
