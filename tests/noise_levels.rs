//! Which noise levels a diffusion model learns, and what each weighs: diffusers' options, with diffusers' numbers.

use candle_core::Tensor;
use proxytune::Error;
use proxytune::config::{Document, FlowMatching, Resolved, WeightingScheme};
use proxytune::diffusion::{
    Density, FlowMatchEuler, LossForm, SchedulerConfig, TrainingDraw, Weighting,
};
use proxytune::models::latent_diffusion::Levels;

use crate::support::golden::{Tensors, case, load, values};

fn reference() -> Tensors {
    load(case("scheduler", "noise_levels.safetensors"))
}

fn close(ours: f64, theirs: f64, tolerance: f64, what: &str) {
    let apart = (ours - theirs).abs() / theirs.abs().max(1e-3);
    assert!(apart < tolerance, "{what}: {ours} and {theirs}");
}

#[test]
fn levels_are_drawn_by_diffusers_densities() {
    let reference = reference();
    let (normal, even) = (values(&reference["normal"]), values(&reference["even"]));
    for (name, density, drawn) in [
        ("logit_normal", Density::STANDARD, &normal),
        (
            "logit_normal.moved",
            Density::LogitNormal {
                mean: -0.5,
                std: 1.7,
            },
            &normal,
        ),
        ("mode", Density::Mode { scale: 1.29 }, &even),
        ("mode.ends", Density::Mode { scale: -0.6 }, &even),
        ("none", Density::Uniform, &even),
        ("cosmap", Density::Uniform, &even),
        ("sigma_sqrt", Density::Uniform, &even),
    ] {
        let theirs = values(&reference[&format!("u.{name}")]);
        let indices = values(&reference[&format!("indices.{name}")]);
        assert_eq!(drawn.len(), theirs.len());
        for ((drawn, u), index) in drawn.iter().zip(theirs).zip(indices) {
            let ours = density.u(*drawn);
            close(ours, u, 2e-5, name);
            assert!((ours * 1000.0 - index).abs() < 1.001, "{name}");
        }
    }
}

#[test]
fn losses_weigh_what_diffusers_weighs_them() {
    let reference = reference();
    let schedule = FlowMatchEuler::new(SchedulerConfig {
        shift: 3.0,
        ..SchedulerConfig::default()
    })
    .unwrap();
    let schemes = [
        ("none", Weighting::One),
        ("cosmap", Weighting::Cosmap),
        ("sigma_sqrt", Weighting::SigmaSqrt),
    ];
    let sigmas = values(&reference["sigmas"]);
    for (name, weighting) in schemes {
        let weights = values(&reference[&format!("weights.{name}")]);
        for (sigma, weight) in sigmas.iter().zip(weights) {
            close(weighting.at(*sigma as f32).into(), weight, 1e-5, name);
        }
    }
    let indices = values(&reference["indices"]);
    let draw = TrainingDraw {
        indices: indices.into_iter().map(|index| index as usize).collect(),
        noise: reference["noise"].clone(),
    };
    for (name, weighting) in &schemes[1..] {
        for (form, suffix) in [
            (LossForm::Preconditioned, "preconditioned"),
            (LossForm::Velocity, "velocity"),
        ] {
            let given = |_: &Tensor, _: &Tensor| Ok(reference["velocity"].clone());
            let loss = schedule
                .loss(&reference["latents"], &draw, (form, *weighting), given)
                .unwrap();
            let what = format!("loss.{name}.{suffix}");
            close(values(&loss)[0], values(&reference[&what])[0], 1e-4, &what);
        }
    }
}

const FILE: &str = r#"
[subject.dog]
images = "photos/dog"
class = "dog"
[supervisor]
model = "sd3-medium"
[student]
model = "flux.1-dev"
"#;

fn resolve(overrides: &[&str]) -> Result<Resolved, Error> {
    let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
    Document::parse(FILE, "test.toml", &overrides, &proxytune::models::Registry).resolve()
}

#[test]
fn each_family_has_its_own_scheme_and_each_scheme_its_own_numbers() {
    let resolved = resolve(&[]).unwrap();
    let supervisor = resolved.supervisor.as_ref().unwrap();
    assert_eq!(Levels::of(&supervisor.training), Some(Levels::LOGIT_NORMAL));
    assert_eq!(Levels::of(&resolved.student.training), Some(Levels::EVEN));
    let moved = resolve(&[
        "supervisor.logit_mean=0.5",
        "student.weighting_scheme=mode",
        "direct.mode_scale=-0.5",
    ]);
    let moved = moved.unwrap();
    let density = |training| Levels::of(training).unwrap().density;
    let supervisor = moved.supervisor.as_ref().unwrap();
    let normal = Density::LogitNormal {
        mean: 0.5,
        std: 1.0,
    };
    assert_eq!(density(&supervisor.training), normal);
    assert_eq!(
        density(&moved.student.training),
        Density::Mode { scale: 1.29 }
    );
    assert_eq!(
        density(&moved.direct.training),
        Density::Mode { scale: -0.5 }
    );
    assert_eq!(
        moved.student.training.flow_matching,
        Some(FlowMatching {
            weighting_scheme: WeightingScheme::Mode,
            logit_mean: None,
            logit_std: None,
            mode_scale: Some(1.29),
        })
    );
    for resolved in [resolved, moved] {
        let text = resolved.to_toml().unwrap();
        let again =
            Document::parse(&text, "again.toml", &[], &proxytune::models::Registry).resolve();
        assert_eq!(again.unwrap(), resolved, "{text}");
    }
}

#[test]
fn what_a_model_or_a_scheme_has_no_use_for_is_a_fault() {
    for (overrides, what) in [
        (
            &["supervisor.snr_gamma=5"][..],
            "supervisor.snr_gamma has no effect on a SD3 model",
        ),
        (
            &["supervisor.model=sdxl", "supervisor.weighting_scheme=mode"],
            "supervisor.weighting_scheme has no effect on a SDXL model",
        ),
        (
            &["student.model=llamagen-xl", "student.logit_mean=1"],
            "student.logit_mean has no effect on a LlamaGen model",
        ),
        (
            &["student.logit_std=2"],
            "student.logit_std has no effect without weighting_scheme = \"logit_normal\"",
        ),
        (
            &[
                "supervisor.weighting_scheme=cosmap",
                "supervisor.mode_scale=1",
            ],
            "supervisor.mode_scale has no effect without weighting_scheme = \"mode\"",
        ),
        (
            &[
                "supervisor.weighting_scheme=mode",
                "supervisor.mode_scale=2",
            ],
            "supervisor.mode_scale = 2 is out of range",
        ),
        (
            &["student.guidance_start=0.2"],
            "student.guidance_start has no effect on a FLUX model",
        ),
        (
            &["proxies.guidance_start=0.5", "proxies.guidance_stop=0.25"],
            "guidance ends before it has begun",
        ),
    ] {
        let Err(Error::Config(faults)) = resolve(overrides) else {
            panic!("{overrides:?} is taken")
        };
        assert_eq!(faults.len(), 1, "{faults:#?}");
        assert!(faults[0].contains(what), "{faults:#?}");
    }
    let sdxl = resolve(&["supervisor.model=sdxl", "supervisor.snr_gamma=5"]).unwrap();
    assert_eq!(sdxl.supervisor.unwrap().training.snr_gamma, Some(5.0));
}
