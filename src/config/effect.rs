//! What was typed although something else takes its effect away.

use super::tree::Place;
use super::typed::Typed;

/// The first of `places` that was typed for nothing, because of what was typed at `switch`. An override that switches
/// something off for one run does not fault what the file says of it.
pub(super) fn first_idle<'a>(
    switch: Option<&Place>,
    places: impl IntoIterator<Item = &'a Place>,
) -> Option<&'a Place> {
    let for_one_run = matches!(switch, Some(Place::Override(_)));
    places
        .into_iter()
        .find(|place| !for_one_run || matches!(place, Place::Override(_)))
}

/// Where `typed` was typed, if it says something else than `default`: a resolved file names every field.
pub(super) fn unlike<'a, T: PartialEq>(typed: &'a Typed<T>, default: &T) -> Option<&'a Place> {
    let typed = typed.as_ref()?;
    (typed.value != *default).then_some(&typed.place)
}
