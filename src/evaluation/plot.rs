//! Line charts as inline SVG, coloured by the page's style sheet so that they follow its light and dark modes.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::html::escape;

/// One line of a chart.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Series {
    pub name: String,
    /// (x, y), x rising; points that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// A chart with its axes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Chart {
    pub title: String,
    pub x_label: String,
    pub y_label: String,
    pub series: Vec<Series>,
    /// Draw the values faintly and their running mean boldly, as suits a loss; otherwise points joined by lines.
    pub smoothed: bool,
}

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 280.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 44.0;

/// More points than this in a line are averaged in bins: a screen shows no more.
const MAX_POINTS: usize = 400;

/// Colours of the style sheet, `.s0` to `.s5`.
const COLOURS: usize = 6;

impl Chart {
    /// A `<figure>` with title, SVG and, for several series, a legend. Without a single point it says so instead.
    pub fn html(&self) -> String {
        let series: Vec<(&str, Vec<(f64, f64)>)> = self
            .series
            .iter()
            .map(|s| (s.name.as_str(), thinned(&s.points)))
            .filter(|(_, points)| !points.is_empty())
            .collect();
        let mut html = format!(
            "<figure class=\"chart\"><figcaption>{}</figcaption>",
            escape(&self.title)
        );
        if series.is_empty() {
            html.push_str("<p class=\"note\">No values were recorded.</p></figure>\n");
            return html;
        }
        html.push_str(&self.svg(&series));
        if series.len() > 1 {
            html.push_str("<ul class=\"legend\">");
            for (index, (name, _)) in series.iter().enumerate() {
                let colour = index % COLOURS;
                let _ = write!(html, "<li><i class=\"s{colour}\"></i>{}</li>", escape(name));
            }
            html.push_str("</ul>");
        }
        html.push_str("</figure>\n");
        html
    }

    fn svg(&self, series: &[(&str, Vec<(f64, f64)>)]) -> String {
        let all = || series.iter().flat_map(|(_, points)| points.iter().copied());
        let x_ticks = ticks(all().map(|(x, _)| x), 6);
        let y_ticks = ticks(all().map(|(_, y)| y), 5);
        let (x_low, x_high) = all().fold((f64::MAX, f64::MIN), |(low, high), (x, _)| {
            (low.min(x), high.max(x))
        });
        let x_span = if x_high > x_low { x_high - x_low } else { 1.0 };
        let (y_low, y_high) = (y_ticks[0], y_ticks[y_ticks.len() - 1]);
        let place_x = |x: f64| LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT);
        let place_y =
            |y: f64| HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM);

        let label = format!("{}: {} over {}", self.title, self.y_label, self.x_label);
        let mut svg = format!(
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
            escape(&label)
        );
        for &tick in &y_ticks {
            let y = place_y(tick);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 8.0,
                y + 4.0,
                number(tick, &y_ticks)
            );
        }
        for &tick in x_ticks.iter().filter(|t| (x_low..=x_high).contains(*t)) {
            let _ = write!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                place_x(tick),
                HEIGHT - BOTTOM + 18.0,
                number(tick, &x_ticks)
            );
        }
        let middle = (LEFT + WIDTH - RIGHT) / 2.0;
        let _ = write!(
            svg,
            "<text class=\"axis\" x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            HEIGHT - 6.0,
            escape(&self.x_label)
        );
        let middle = (TOP + HEIGHT - BOTTOM) / 2.0;
        let _ = write!(
            svg,
            "<text class=\"axis\" transform=\"translate(13 {middle:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            escape(&self.y_label)
        );
        for (index, (_, points)) in series.iter().enumerate() {
            let colour = index % COLOURS;
            let path = |points: &[(f64, f64)]| {
                let mut path = String::new();
                for (i, (x, y)) in points.iter().enumerate() {
                    let command = if i == 0 { 'M' } else { 'L' };
                    let _ = write!(path, "{command}{:.1} {:.1}", place_x(*x), place_y(*y));
                }
                path
            };
            if self.smoothed {
                let _ = write!(
                    svg,
                    "<path class=\"raw s{colour}\" d=\"{}\"/><path class=\"line s{colour}\" d=\"{}\"/>",
                    path(points),
                    path(&smooth(points))
                );
                continue;
            }
            let _ = write!(
                svg,
                "<path class=\"line s{colour}\" d=\"{}\"/>",
                path(points)
            );
            for (x, y) in points {
                let _ = write!(
                    svg,
                    "<circle class=\"s{colour}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"/>",
                    place_x(*x),
                    place_y(*y)
                );
            }
        }
        svg.push_str("</svg>");
        svg
    }
}

/// The finite points, averaged in bins of equal count when they are many.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> = points
        .iter()
        .copied()
        .filter(|(x, y)| x.is_finite() && y.is_finite())
        .collect();
    if finite.len() <= MAX_POINTS {
        return finite;
    }
    finite
        .chunks(finite.len().div_ceil(MAX_POINTS))
        .map(|bin| {
            let count = bin.len() as f64;
            let sum = bin.iter().fold((0.0, 0.0), |s, p| (s.0 + p.0, s.1 + p.1));
            (sum.0 / count, sum.1 / count)
        })
        .collect()
}

/// Mean over about a twelfth of the points around each; towards the ends over a third of that, so that they are hardly
/// shifted.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = points.len() / 24;
    (0..points.len())
        .map(|i| {
            let last = points.len() - 1;
            let reach = reach.min(i.min(last - i).max(reach / 3));
            let window = &points[i.saturating_sub(reach)..=(i + reach).min(last)];
            let sum: f64 = window.iter().map(|(_, y)| y).sum();
            (points[i].0, sum / window.len() as f64)
        })
        .collect()
}

/// About `count` round numbers that enclose `values`, at least two.
fn ticks(values: impl Iterator<Item = f64>, count: usize) -> Vec<f64> {
    let (mut low, mut high) = values.fold((f64::MAX, f64::MIN), |(low, high), v| {
        (low.min(v), high.max(v))
    });
    if high - low <= f64::EPSILON * high.abs().max(1.0) {
        let room = (low.abs() * 0.1).max(0.5);
        (low, high) = (low - room, high + room);
    }
    let rough = (high - low) / count as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step = power
        * match rough / power {
            r if r <= 1.0 => 1.0,
            r if r <= 2.0 => 2.0,
            r if r <= 5.0 => 5.0,
            _ => 10.0,
        };
    let (first, last) = ((low / step).floor(), (high / step).ceil());
    (0..=(last - first) as usize)
        .map(|i| (first + i as f64) * step)
        .collect()
}

/// `tick` with as many decimals as the distance between ticks needs.
fn number(tick: f64, ticks: &[f64]) -> String {
    let step = (ticks[1] - ticks[0]).abs();
    if !(1e-4..1e5).contains(&step) {
        return format!("{tick:.1e}");
    }
    let decimals = (-step.log10()).ceil().max(0.0) as usize;
    format!("{tick:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>, smoothed: bool) -> String {
        Chart {
            title: "Loss <of> dog".into(),
            x_label: "step".into(),
            y_label: "loss".into(),
            series: vec![Series {
                name: "a & b".into(),
                points,
            }],
            smoothed,
        }
        .html()
    }

    #[test]
    fn ticks_are_round_and_enclose_the_values() {
        assert_eq!(
            ticks([0.0, 1.0].into_iter(), 5),
            [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
        );
        assert_eq!(
            ticks([12.0, 97.0].into_iter(), 5),
            [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
        );
        let constant = ticks([3.0].into_iter(), 5);
        assert!(constant[0] < 3.0 && constant[constant.len() - 1] > 3.0);
        assert_eq!(number(0.6000000000000001, &[0.0, 0.2]), "0.6");
    }

    #[test]
    fn a_constant_keeps_its_value_when_smoothed() {
        let points: Vec<(f64, f64)> = (0..100).map(|i| (f64::from(i), 2.5)).collect();
        assert!(smooth(&points).iter().all(|(_, y)| (y - 2.5).abs() < 1e-9));
    }

    #[test]
    fn empty_single_and_broken_values_draw_without_nan() {
        assert!(chart(vec![], true).contains("No values"));
        assert!(chart(vec![(1.0, f64::NAN)], true).contains("No values"));
        let html = chart(vec![(1.0, 2.0)], false);
        assert!(html.contains("<svg") && !html.contains("NaN"));
        assert!(html.contains("Loss &lt;of&gt; dog"));
        let many = (0..100_000).map(|i| (f64::from(i), 1.0 / f64::from(i + 1)));
        assert!(chart(many.collect(), true).len() < 40_000);
    }
}
