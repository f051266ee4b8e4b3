//! Who is drawn: a class, and within it one individual that stays the same in every picture of it.

use rand::Rng;
use rand::seq::IndexedRandom;

use super::draw::Ink;

/// What kind of thing is drawn; the words are the class words of the DreamBooth dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    Dog,
    Cat,
    Backpack,
    StuffedAnimal,
    Bowl,
    Can,
    Candle,
    Clock,
    Sneaker,
    Toy,
    Boot,
    Glasses,
    Teapot,
    Vase,
}

impl Class {
    /// Every class that can be drawn.
    pub const ALL: [Class; 14] = [
        Class::Dog,
        Class::Cat,
        Class::Backpack,
        Class::StuffedAnimal,
        Class::Bowl,
        Class::Can,
        Class::Candle,
        Class::Clock,
        Class::Sneaker,
        Class::Toy,
        Class::Boot,
        Class::Glasses,
        Class::Teapot,
        Class::Vase,
    ];

    /// The class as prompts name it, for example `"stuffed animal"`.
    pub fn word(self) -> &'static str {
        match self {
            Class::Dog => "dog",
            Class::Cat => "cat",
            Class::Backpack => "backpack",
            Class::StuffedAnimal => "stuffed animal",
            Class::Bowl => "bowl",
            Class::Can => "can",
            Class::Candle => "candle",
            Class::Clock => "clock",
            Class::Sneaker => "sneaker",
            Class::Toy => "toy",
            Class::Boot => "boot",
            Class::Glasses => "glasses",
            Class::Teapot => "teapot",
            Class::Vase => "vase",
        }
    }

    /// Whether the class is one of the live subjects, which wear things and have poses.
    pub fn is_live(self) -> bool {
        matches!(self, Class::Dog | Class::Cat)
    }
}

/// A colour with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    Red,
    Orange,
    Yellow,
    Green,
    Turquoise,
    Blue,
    Purple,
    Pink,
    Brown,
    White,
    Grey,
    Black,
}

impl Colour {
    /// Every colour, in the order that [`Identity::is_reserved`] counts them.
    pub const ALL: [Colour; 12] = [
        Colour::Red,
        Colour::Orange,
        Colour::Yellow,
        Colour::Green,
        Colour::Turquoise,
        Colour::Blue,
        Colour::Purple,
        Colour::Pink,
        Colour::Brown,
        Colour::White,
        Colour::Grey,
        Colour::Black,
    ];

    /// The name of the colour in captions.
    pub fn word(self) -> &'static str {
        match self {
            Colour::Red => "red",
            Colour::Orange => "orange",
            Colour::Yellow => "yellow",
            Colour::Green => "green",
            Colour::Turquoise => "turquoise",
            Colour::Blue => "blue",
            Colour::Purple => "purple",
            Colour::Pink => "pink",
            Colour::Brown => "brown",
            Colour::White => "white",
            Colour::Grey => "grey",
            Colour::Black => "black",
        }
    }

    fn ink(self) -> Ink {
        Ink::hex(match self {
            Colour::Red => 0xd62b2b,
            Colour::Orange => 0xee8322,
            Colour::Yellow => 0xf2cf3a,
            Colour::Green => 0x3f9e43,
            Colour::Turquoise => 0x2fbdb3,
            Colour::Blue => 0x2f62d4,
            Colour::Purple => 0x8436b8,
            Colour::Pink => 0xf08cb8,
            Colour::Brown => 0x8f5a2d,
            Colour::White => 0xf1efe8,
            Colour::Grey => 0x8d9096,
            Colour::Black => 0x35343c,
        })
    }
}

/// What is on the body besides its colour; drawn in the accent colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    Plain,
    Striped,
    Dotted,
    Patchy,
    Checkered,
    Banded,
}

impl Pattern {
    /// Every pattern, in the order that [`Identity::is_reserved`] counts them.
    pub const ALL: [Pattern; 6] = [
        Pattern::Plain,
        Pattern::Striped,
        Pattern::Dotted,
        Pattern::Patchy,
        Pattern::Checkered,
        Pattern::Banded,
    ];

    /// The word for the pattern in captions; plain has none.
    pub fn word(self) -> Option<&'static str> {
        match self {
            Pattern::Plain => None,
            Pattern::Striped => Some("striped"),
            Pattern::Dotted => Some("dotted"),
            Pattern::Patchy => Some("patchy"),
            Pattern::Checkered => Some("checkered"),
            Pattern::Banded => Some("banded"),
        }
    }
}

/// Where the accent colour stands out apart from the pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marking {
    /// Nowhere but in the parts that always have it.
    None,
    /// Socks, foot, sole, base.
    Base,
    /// Chest, belly, emblem.
    Front,
    /// Ears, lid, cap, shoulder.
    Top,
}

impl Marking {
    /// Every marking.
    pub const ALL: [Marking; 4] = [Marking::None, Marking::Base, Marking::Front, Marking::Top];
}

/// Which identities a generator may produce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Everything but the reserved ones: what nano models are trained on.
    Train,
    /// Only the reserved ones: individuals that no nano model has seen.
    HeldOut,
}

/// One individual. Two pictures of an equal `Identity` show the same individual.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Identity {
    pub class: Class,
    pub body: Colour,
    pub accent: Colour,
    pub pattern: Pattern,
    pub marking: Marking,
    /// Which of the three builds of the class: ears, vessel shapes, kinds of toy; 0 to 2.
    pub build: u8,
    /// Girth, height, size of the head (or lid, or sole), size of the details; -1 to 1 each.
    pub proportions: [f32; 4],
    /// How far body and accent lie from the pure colour, towards black (-1) or white (1).
    pub shade: [f32; 2],
    /// Where the pattern begins and how wide it is; 0 to 1 each.
    pub phase: [f32; 2],
}

/// Coats of real animals, so that half of all dogs and cats look like some.
const COATS: [Colour; 6] = [
    Colour::Brown,
    Colour::Orange,
    Colour::Yellow,
    Colour::White,
    Colour::Grey,
    Colour::Black,
];

impl Identity {
    /// Draws an individual of `class` from the part of identity space that `split` allows.
    pub fn sample(class: Class, split: Split, generator: &mut impl Rng) -> Identity {
        loop {
            let natural = class.is_live() && generator.random_bool(0.5);
            let palette: &[Colour] = if natural { &COATS } else { &Colour::ALL };
            let signed = |generator: &mut _| Rng::random_range(generator, -1.0f32..=1.0);
            let identity = Identity {
                class,
                body: pick(palette, generator),
                accent: pick(palette, generator),
                pattern: pick(&Pattern::ALL, generator),
                marking: pick(&Marking::ALL, generator),
                build: generator.random_range(0..3),
                proportions: [(); 4].map(|()| signed(generator)),
                shade: [(); 2].map(|()| signed(generator)),
                phase: [(); 2].map(|()| generator.random_range(0.0f32..1.0)),
            };
            let wanted = identity.is_reserved() == (split == Split::HeldOut);
            if wanted && identity.body != identity.accent {
                return identity;
            }
        }
    }

    /// Whether this combination of body, accent and pattern is kept from all training.
    ///
    /// Identity space is a grid of 12 bodies x 12 accents x 6 patterns; the reserved cells lie on a diagonal
    /// through it, about one in eleven, so that every colour and every pattern is seen in training, but none of
    /// these combinations of them.
    pub fn is_reserved(&self) -> bool {
        let (body, accent, pattern) = (
            self.body as usize,
            self.accent as usize,
            self.pattern as usize,
        );
        (3 * body + 5 * accent + 2 * pattern) % 11 == 7
    }

    pub(super) fn body_ink(&self) -> Ink {
        shaded(self.body.ink(), self.shade[0])
    }

    pub(super) fn accent_ink(&self) -> Ink {
        shaded(self.accent.ink(), self.shade[1])
    }
}

fn shaded(ink: Ink, shade: f32) -> Ink {
    if shade < 0.0 {
        ink.darker(-0.16 * shade)
    } else {
        ink.lighter(0.16 * shade)
    }
}

/// A uniform choice. `options` must not be empty: it is one of this module's constants.
pub(super) fn pick<T: Copy>(options: &[T], generator: &mut impl Rng) -> T {
    // Every caller passes a constant list with at least one entry.
    *options.choose(generator).unwrap_or(&options[0])
}
