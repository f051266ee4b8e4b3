//! Numbers of a pipeline file that are each in range, and together too large to be planned.

use super::limits;
use super::reader::Faults;
use super::resolve::place_of;
use super::resolved::{Resolved, Training};
use super::typed;

/// Reports them.
pub(super) fn check(typed: &typed::Pipeline, resolved: &Resolved, faults: &Faults) {
    let start = &typed.start;
    let subjects = resolved.subjects.len() as u128;
    let uses = |training: &Training| training.steps as u128 * training.examples_per_step() as u128;
    let student = typed.student.as_ref();
    let mut checks = vec![(
        uses(&resolved.student.training),
        limits::USES,
        student.map_or(start, |student| place_of(&student.training.steps, start)),
        "the examples of all steps of the student (steps · batch_size)",
    )];
    if let Some(direct) = resolved.direct() {
        checks.push((
            uses(&direct.training),
            limits::USES,
            place_of(&typed.direct.training.steps, start),
            "the examples of all steps of direct tuning (steps · batch_size)",
        ));
    }
    if let Some(proxies) = &resolved.proxies {
        checks.push((
            subjects * proxies.count as u128,
            limits::PICTURES,
            place_of(&typed.proxies.count, start),
            "the proxies of all subjects (subjects · count)",
        ));
    }
    if let (Some(supervisor), Some(section)) = (&resolved.supervisor, &typed.supervisor) {
        let prior = supervisor.prior_preservation.as_ref();
        let class_images = prior.map_or(0, |prior| prior.class_images as u128);
        checks.extend([
            (
                subjects * uses(&supervisor.training),
                limits::USES,
                place_of(&section.training.steps, &section.place),
                "the examples of all steps of the supervisors (subjects · steps · batch_size)",
            ),
            (
                subjects * class_images,
                limits::PICTURES,
                &section.place,
                "the class images of all subjects (subjects · class_images)",
            ),
        ]);
    }
    let prompts = resolved.subjects.iter().map(|subject| {
        let templates = resolved.evaluation.prompts.templates(&subject.class);
        templates.len() as u128
    });
    checks.push((
        prompts.sum::<u128>() * resolved.evaluation.images_per_prompt as u128,
        limits::PICTURES,
        place_of(&typed.evaluation.images_per_prompt, start),
        "the pictures of an evaluation (subjects · prompts · images_per_prompt)",
    ));
    for (number, most, place, what) in checks {
        if number > most as u128 {
            faults.push(
                place,
                format!("{what} are {number}"),
                format!("at most {most} can be planned beforehand"),
            );
        }
    }
}
