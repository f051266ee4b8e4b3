//! The page, the JSON and the table say the same, and nothing that a user wrote becomes markup.

use image::{Rgb, RgbImage};
use proxytune::evaluation::metrics::{ScoredImage, Scores};
use proxytune::evaluation::plot::{Chart, Series};
use proxytune::evaluation::report::{ModelScores, Report, StageTime};
use proxytune::evaluation::sheet::{Block, Row, Sheet};
use proxytune::images::encode_png;

const PROMPTS: [&str; 4] = [
    "a sks dog in the jungle",
    "a sks dog on top of a purple rug in a forest",
    "a sks dog with the Eiffel Tower in the background",
    "a cube shaped sks dog",
];

/// A small picture that differs by `seed`: a disc on a shaded ground.
fn picture(seed: u32, side: u32) -> RgbImage {
    let middle = side as f32 / 2.0;
    RgbImage::from_fn(side, side, |x, y| {
        let distance = ((x as f32 - middle).powi(2) + (y as f32 - middle).powi(2)).sqrt();
        if distance < middle * 0.6 {
            Rgb([(seed * 53 % 200) as u8 + 40, (seed * 91 % 160) as u8, 60])
        } else {
            Rgb([150, (y * 255 / side) as u8, (seed * 37 % 255) as u8])
        }
    })
}

fn sheet(side: u32) -> RgbImage {
    let row = |index: usize, prompt: &str| Row {
        prompt: prompt.into(),
        images: (0..3u32)
            .map(|column| {
                let missing = index == 3 && column == 1;
                (!missing).then(|| picture(index as u32 * 3 + column, side))
            })
            .collect(),
    };
    Sheet {
        title: "Proxy-Tuning, nano".into(),
        subtitle: "same prompt and seed along each line".into(),
        columns: ["supervisor", "tuned directly", "proxy-tuned"]
            .map(String::from)
            .into(),
        blocks: vec![Block {
            heading: "dog6: \"a sks dog\"".into(),
            references: (20..23).map(|seed| picture(seed, 32)).collect(),
            rows: PROMPTS.iter().enumerate().map(|(i, p)| row(i, p)).collect(),
        }],
    }
    .draw()
}

fn report() -> Report {
    let model = |name: &str, base: f64| ModelScores {
        name: name.into(),
        images: PROMPTS
            .iter()
            .enumerate()
            .map(|(i, prompt)| ScoredImage {
                subject: "dog6".into(),
                prompt: (*prompt).into(),
                run_seed: 7,
                scores: Scores {
                    clip_i: base + 0.02 * i as f64,
                    clip_t: 0.28 + 0.01 * (i % 2) as f64,
                    dino: base - 0.1 + 0.03 * (i % 3) as f64,
                },
            })
            .collect(),
    };
    let loss = |name: &str, from: f64, to: f64| Series {
        name: name.into(),
        points: (0..300u32)
            .map(|i| {
                let noise = f64::from(i.wrapping_mul(2_654_435_761) >> 16 & 0xFF) / 255.0 - 0.5;
                (
                    f64::from(i),
                    to + (from - to) * (-f64::from(i) / 70.0).exp() + 0.2 * noise,
                )
            })
            .collect(),
    };
    let chart = |title: &str, series: Vec<Series>, smoothed: bool| Chart {
        title: title.into(),
        x_label: "step".into(),
        y_label: if smoothed { "loss" } else { "cosine" }.into(),
        series,
        smoothed,
    };
    let points = |name: &str, at: f64| Series {
        name: name.into(),
        points: (1..=5)
            .map(|i| (60.0 * f64::from(i), at + 0.03 * f64::from(i).sqrt()))
            .collect(),
    };
    let stage = |name: &str, done, unit: &str, busy_seconds, waiting_seconds| StageTime {
        name: name.into(),
        done,
        unit: unit.into(),
        busy_seconds,
        waiting_seconds,
    };
    Report {
        title: "Proxy-Tuning of nano-llamagen by nano-sd3".into(),
        lead: "A diffusion supervisor learnt dog6 from 5 photos and made 96 proxies; the student learnt from those.".into(),
        facts: [
            ("Subject", "dog6 (dog, token sks)"),
            ("Supervisor", "nano-sd3, LoRA rank 16, 120 steps"),
            ("Student", "nano-llamagen, LoRA rank 16, 300 steps"),
            ("Proxies", "96"),
            ("Wall time", "1 min 42 s"),
        ]
        .map(|(k, v)| (k.to_string(), v.to_string()))
        .into(),
        sheet_png: encode_png(&sheet(32)).unwrap(),
        models: vec![
            model("untouched student", 0.61),
            model("directly tuned student", 0.66),
            model("supervisor", 0.71),
            model("proxy-tuned student", 0.74),
        ],
        protocol: vec!["CLIP: nano-clip (short side 32 bicubic, crop 32x32).".into()],
        charts: vec![
            chart("Supervisor", vec![loss("dog6", 1.1, 0.4)], true),
            chart("Student", vec![loss("direct", 3.4, 0.9), loss("proxy-tuned", 3.4, 2.2)], true),
            chart("Scores over checkpoints", vec![points("CLIP-I", 0.6), points("CLIP-T", 0.27), points("DINO", 0.5)], false),
        ],
        stages: vec![
            stage("supervise", 120, "steps", 31.2, 0.0),
            stage("synthesize", 96, "images", 40.25, 3.5),
            stage("tokenize", 96, "images", 1.2, 44.0),
            stage("train", 300, "steps", 62.0, 9.9),
        ],
        wall_seconds: 102.4,
        first_training_proxy: Some((8, 96)),
        settings: "seed = 7\n[subject.dog6]\nclass = \"dog\" # <script>alert(1)</script>\n".into(),
        provenance: [("seed", "7"), ("plan", "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08")]
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .into(),
        set_aside: vec!["photos/<b>04.jpg: the JPEG is cut short".into()],
        warnings: vec![],
    }
}

#[test]
fn the_page_is_complete_and_needs_nothing_from_outside() {
    let html = report().html();
    for part in [
        "<h1>Proxy-Tuning of nano-llamagen by nano-sd3</h1>",
        "data:image/png;base64,iVBORw0KGgo",
        "untouched student",
        "Scores by prompt",
        "The student’s first training step ran at proxy 8 of 96.",
        "1 min 42 s",
        "prefers-color-scheme: dark",
    ] {
        assert!(html.contains(part), "{part}");
    }
    for outside in [
        "http://", "https://", "<script", "<link", "src=\"/", "@import",
    ] {
        assert!(!html.contains(outside), "{outside}");
    }
    assert!(!html.contains("NaN"));
    assert_eq!(
        html.matches("<table").count(),
        html.matches("</table>").count()
    );
    assert_eq!(html.matches("<svg").count(), 3);
}

#[test]
fn what_a_user_wrote_is_text() {
    let html = report().html();
    assert!(html.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
    assert!(html.contains("photos/&lt;b&gt;04.jpg"));
    assert!(!html.contains("<b>"));
}

#[test]
fn an_empty_report_is_still_a_page() {
    let html = Report::default().html();
    assert!(html.starts_with("<!doctype html>") && html.ends_with("</html>\n"));
    assert!(!html.contains("<table") && !html.contains("<img"));
}

#[test]
fn page_json_and_terminal_show_the_same_numbers() {
    let report = report();
    let json: serde_json::Value = serde_json::from_str(&report.json().unwrap()).unwrap();
    let row = &json["table"]["proxy-tuned student"];
    // 0.74, 0.76, 0.78, 0.80: mean 0.77, standard error 0.0129.
    assert!((row["clip_i"]["mean"].as_f64().unwrap() - 0.77).abs() < 1e-12);
    assert!((row["clip_i"]["standard_error"].as_f64().unwrap() - 0.012_909_944).abs() < 1e-8);
    assert_eq!(row["basis"], "images");
    assert!(json.get("sheet_png").is_none());
    assert!(report.html().contains("0.770 <small>± 0.013</small>"));
    let text = report.text();
    assert!(text.contains("0.770 ± 0.013"));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 6);
    assert!(
        lines[..5]
            .iter()
            .all(|l| l.chars().count() == lines[0].chars().count())
    );
}

#[test]
fn the_sheet_keeps_small_pixels_sharp_and_leaves_an_empty_frame_for_what_is_missing() {
    let small = sheet(32);
    // A cell of the supervisor: 32 pixels become 128, four by four equal ones.
    let (x, y) = (40 + 220 + 10 + 128 + 28, 0);
    let column: Vec<[u8; 3]> = (0..small.height())
        .map(|row| small.get_pixel(x, y + row).0)
        .collect();
    let first = column.iter().position(|c| *c == [150, 0, 0]).unwrap();
    assert!(column[first..first + 4].iter().all(|c| *c == column[first]));
    let pixels = small.pixels().filter(|p| p.0 == [246, 247, 249]).count();
    assert_eq!(pixels, 128 * 128);
    assert!(sheet(300).width() > small.width());
    assert!(Sheet::default().draw().width() > 0);
    if let Some(directory) = std::env::var_os("PROXYTUNE_SHOW") {
        let directory = std::path::PathBuf::from(directory);
        std::fs::write(directory.join("report.html"), report().html()).unwrap();
        small.save(directory.join("sheet.png")).unwrap();
    }
}
