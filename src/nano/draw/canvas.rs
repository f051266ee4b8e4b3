//! A picture in the making: filled shapes in any coordinate system. Nothing is anti-aliased here, because
//! pictures are drawn four times as wide as they are wanted and averaged down.

use tiny_skia::{
    BlendMode, Color, FillRule, LineCap, LineJoin, Paint, Path, PathBuilder, Pixmap, Rect, Shader,
    Stroke, Transform,
};

use super::skin::Skin;

/// A colour with alpha, 0 to 255 per channel, not premultiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nano) struct Ink(pub [u8; 4]);

impl Ink {
    /// From `0xrrggbb`, opaque.
    pub const fn hex(rgb: u32) -> Ink {
        Ink([(rgb >> 16) as u8, (rgb >> 8) as u8, rgb as u8, 255])
    }

    /// With alpha from 0 to 1.
    pub fn alpha(self, alpha: f32) -> Ink {
        let [r, g, b, _] = self.0;
        Ink([r, g, b, (alpha * 255.0).round() as u8])
    }

    /// The colour at `t` between `self` (0) and `other` (1).
    pub fn mix(self, other: Ink, t: f32) -> Ink {
        let mut mixed = self.0;
        for (a, b) in mixed.iter_mut().zip(other.0) {
            *a = (f32::from(*a) + (f32::from(b) - f32::from(*a)) * t).round() as u8;
        }
        Ink(mixed)
    }

    /// Towards black by `t`.
    pub fn darker(self, t: f32) -> Ink {
        self.mix(Ink::hex(0x000000), t)
    }

    /// Towards white by `t`.
    pub fn lighter(self, t: f32) -> Ink {
        self.mix(Ink::hex(0xffffff), t)
    }

    fn shader(self) -> Shader<'static> {
        let [r, g, b, a] = self.0;
        Shader::SolidColor(Color::from_rgba8(r, g, b, a))
    }
}

/// A shape; `None` if its numbers leave nothing to draw.
pub(in crate::nano) type Shape = Option<Path>;

/// Pixels, and the map from the coordinates in use to them.
pub(in crate::nano) struct Canvas {
    pub pixmap: Pixmap,
    pub transform: Transform,
    blend: BlendMode,
}

impl Canvas {
    /// An empty picture of `side` pixels whose coordinates reach from 0 to `units`. `None` if `side` is 0.
    pub fn new(side: u32, units: f32) -> Option<Canvas> {
        let scale = side as f32 / units;
        Some(Canvas {
            pixmap: Pixmap::new(side, side)?,
            transform: Transform::from_scale(scale, scale),
            blend: BlendMode::SourceOver,
        })
    }

    /// Moves coordinates: what is drawn from now on goes through `transform` first.
    pub fn place(&mut self, transform: Transform) {
        self.transform = self.transform.pre_concat(transform);
    }

    /// From now on draws only where there is something already.
    pub fn only_inside(&mut self) {
        self.blend = BlendMode::SourceAtop;
    }

    /// How many pixels one unit of the present coordinates covers.
    pub fn pixels_per_unit(&self) -> f32 {
        let t = self.transform;
        (t.sx * t.sy - t.kx * t.ky).abs().sqrt()
    }

    /// Fills a shape with one colour.
    pub fn fill(&mut self, shape: &Shape, ink: Ink) {
        self.paint(shape, ink.shader());
    }

    /// Fills a shape with the subject's skin.
    pub fn cover(&mut self, shape: &Shape, skin: &Skin) {
        self.paint(shape, skin.shader());
    }

    fn paint(&mut self, shape: &Shape, shader: Shader) {
        if let Some(path) = shape {
            let paint = self.brush(shader);
            self.pixmap
                .fill_path(path, &paint, FillRule::Winding, self.transform, None);
        }
    }

    fn brush<'a>(&self, shader: Shader<'a>) -> Paint<'a> {
        Paint {
            shader,
            anti_alias: false,
            blend_mode: self.blend,
            ..Paint::default()
        }
    }

    pub fn ellipse(&mut self, x: f32, y: f32, rx: f32, ry: f32, ink: Ink) {
        self.fill(&ellipse(x, y, rx, ry), ink);
    }

    pub fn disc(&mut self, x: f32, y: f32, r: f32, ink: Ink) {
        self.fill(&ellipse(x, y, r, r), ink);
    }

    /// A rectangle by its left, top, right and bottom edges.
    pub fn rect(&mut self, x0: f32, y0: f32, x1: f32, y1: f32, ink: Ink) {
        self.fill(&rect(x0, y0, x1, y1), ink);
    }

    pub fn polygon(&mut self, points: &[(f32, f32)], ink: Ink) {
        self.fill(&polygon(points), ink);
    }

    /// An open line through `points` with round ends.
    pub fn line(&mut self, points: &[(f32, f32)], width: f32, ink: Ink) {
        self.stroke(&trail(points, false), width, ink.shader());
    }

    /// An open, rounded line through `points` with round ends.
    pub fn curve(&mut self, points: &[(f32, f32)], width: f32, ink: Ink) {
        self.stroke(&curve(points), width, ink.shader());
    }

    /// As [`Canvas::curve`], in the subject's skin.
    pub fn cover_curve(&mut self, points: &[(f32, f32)], width: f32, skin: &Skin) {
        self.stroke(&curve(points), width, skin.shader());
    }

    /// The outline of a shape in the subject's skin.
    pub fn cover_outline(&mut self, shape: &Shape, width: f32, skin: &Skin) {
        self.stroke(shape, width, skin.shader());
    }

    /// The outline of a shape.
    pub fn outline(&mut self, shape: &Shape, width: f32, ink: Ink) {
        self.stroke(shape, width, ink.shader());
    }

    fn stroke(&mut self, shape: &Shape, width: f32, shader: Shader) {
        if let Some(path) = shape {
            let stroke = Stroke {
                width,
                line_cap: LineCap::Round,
                line_join: LineJoin::Round,
                ..Stroke::default()
            };
            let paint = self.brush(shader);
            self.pixmap
                .stroke_path(path, &paint, &stroke, self.transform, None);
        }
    }
}

/// An ellipse by centre and radii.
pub(super) fn ellipse(x: f32, y: f32, rx: f32, ry: f32) -> Shape {
    PathBuilder::from_oval(Rect::from_ltrb(x - rx, y - ry, x + rx, y + ry)?)
}

/// A rectangle by its left, top, right and bottom edges.
pub(super) fn rect(x0: f32, y0: f32, x1: f32, y1: f32) -> Shape {
    Some(PathBuilder::from_rect(Rect::from_ltrb(x0, y0, x1, y1)?))
}

/// A rectangle with rounded corners of radius `r`.
pub(super) fn rounded(x0: f32, y0: f32, x1: f32, y1: f32, r: f32) -> Shape {
    let r = r.min((x1 - x0) / 2.0).min((y1 - y0) / 2.0);
    let mut path = PathBuilder::new();
    path.move_to(x0 + r, y0);
    path.line_to(x1 - r, y0);
    path.quad_to(x1, y0, x1, y0 + r);
    path.line_to(x1, y1 - r);
    path.quad_to(x1, y1, x1 - r, y1);
    path.line_to(x0 + r, y1);
    path.quad_to(x0, y1, x0, y1 - r);
    path.line_to(x0, y0 + r);
    path.quad_to(x0, y0, x0 + r, y0);
    path.close();
    path.finish()
}

/// A closed polygon.
pub(super) fn polygon(points: &[(f32, f32)]) -> Shape {
    trail(points, true)
}

fn trail(points: &[(f32, f32)], closed: bool) -> Shape {
    let (&(x, y), rest) = points.split_first()?;
    let mut path = PathBuilder::new();
    path.move_to(x, y);
    for &(x, y) in rest {
        path.line_to(x, y);
    }
    if closed {
        path.close();
    }
    path.finish()
}

/// A closed, rounded shape through `points` (a Catmull-Rom spline).
pub(super) fn blob(points: &[(f32, f32)]) -> Shape {
    let n = points.len();
    let mut path = PathBuilder::new();
    let &(x, y) = points.first()?;
    path.move_to(x, y);
    for i in 0..n {
        let at = |j: usize| points[(i + j) % n];
        segment(&mut path, at(n - 1), at(0), at(1), at(2));
    }
    path.close();
    path.finish()
}

/// An open, rounded line through `points` (a Catmull-Rom spline).
pub(super) fn curve(points: &[(f32, f32)]) -> Shape {
    let mut path = PathBuilder::new();
    let &(x, y) = points.first()?;
    path.move_to(x, y);
    let last = points.len() - 1;
    for i in 0..last {
        let (before, after) = (points[i.saturating_sub(1)], points[(i + 2).min(last)]);
        segment(&mut path, before, points[i], points[i + 1], after);
    }
    path.finish()
}

/// The cubic from `a` to `b` whose ends run parallel to the chords of their neighbours.
fn segment(
    path: &mut PathBuilder,
    before: (f32, f32),
    a: (f32, f32),
    b: (f32, f32),
    after: (f32, f32),
) {
    path.cubic_to(
        a.0 + (b.0 - before.0) / 6.0,
        a.1 + (b.1 - before.1) / 6.0,
        b.0 - (after.0 - a.0) / 6.0,
        b.1 - (after.1 - a.1) / 6.0,
        b.0,
        b.1,
    );
}

/// A shape symmetric about the vertical axis from its right half, top to bottom.
pub(super) fn turned(profile: &[(f32, f32)]) -> Shape {
    let mirrored = profile.iter().rev().map(|&(x, y)| (-x, y));
    let points: Vec<(f32, f32)> = profile.iter().copied().chain(mirrored).collect();
    blob(&points)
}
