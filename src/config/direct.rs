//! The baseline: what was typed over what the student got.

use super::effect::first_idle;
use super::reader::Faults;
use super::resolve::{dropout, or, place_of};
use super::resolved::{Direct, Source, Student};
use super::training::training;
use super::typed;

/// The baseline of `student`. Where it is not enabled, what was typed for it does not count.
pub(super) fn resolve(typed: &typed::Pipeline, student: &Student, faults: &Faults) -> Direct {
    let section = &typed.direct;
    if let Some(source) = &section.source
        && source.value.makes_proxies()
    {
        let name = match source.value {
            Source::Custom => "custom",
            _ => "proxies",
        };
        faults.push(
            &source.place,
            format!("direct.source = \"{name}\" would not be direct"),
            "the choices here are \"references\" and \"augmented\"",
        );
    }
    let model = typed.student.as_ref();
    let inherited = model.map(|student| &student.training);
    let model_place = model.map_or(&typed.start, |student| {
        place_of(&student.model, &typed.start)
    });
    let meaning = |section: &typed::Direct, faults: &Faults| Direct {
        enabled: or(&section.enabled, student.source == Source::Proxies),
        source: or(&section.source, Source::References),
        training: training(
            ("direct", student.family, model_place),
            &section.training,
            &student.training,
            inherited,
            false,
            faults,
        ),
        condition_dropout: or(&section.condition_dropout, student.condition_dropout),
        dropout: dropout(
            ("direct", &section.dropout),
            (student.family, student.dropout),
            model_place,
            faults,
        ),
    };
    if or(&section.enabled, student.source == Source::Proxies) {
        return meaning(section, faults);
    }
    let unheard = Faults::default();
    let asked = meaning(section, &unheard);
    let unasked = Direct {
        enabled: false,
        ..meaning(&typed::Direct::default(), &unheard)
    };
    let source = model.and_then(|student| student.source.as_ref());
    let switch = match &section.enabled {
        Some(enabled) => Some(&enabled.place),
        None => source.map(|at| &at.place),
    };
    if asked != unasked
        && let Some(place) = first_idle(switch, section.places())
    {
        faults.push(
            place,
            "[direct] has no effect: it is not enabled",
            "remove what it says, or set direct.enabled = true",
        );
    }
    unasked
}
