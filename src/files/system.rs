//! What systems put beside people's own folders.

/// Folders that systems, network drives, cameras and other programs make beside people's own: recycle bins, thumbnails,
/// snapshots. In small letters.
const SYSTEM: [&str; 35] = [
    "#recycle",
    "#snapshot",
    "@__qini",
    "@__thumb",
    "@cloudsync",
    "@database",
    "@download",
    "@eadir",
    "@qmariadb",
    "@recently-snapshot",
    "@recycle",
    "@sharebin",
    "@sharesnap",
    "@synodrive",
    "@synologydrive",
    "@synoresource",
    "@tmp",
    "__macosx",
    "_gsdata_",
    "_thumb",
    "config.msi",
    "lost+found",
    "lost.dir",
    "msdownld.tmp",
    "network recycle bin",
    "network trash folder",
    "recycle bin",
    "recycle.bin",
    "recycled",
    "recycler",
    "system volume information",
    "temporary items",
    "thevolumesettingsfolder",
    "trashbox",
    "~snapshot",
];

/// Whether a folder of this name is none of the user's own: what is thrown away is no subject. Hidden ones are not either.
pub fn is_system(name: &str) -> bool {
    let small = name.to_lowercase();
    // Windows' own: $RECYCLE.BIN, $WinREAgent, $Extend.
    let is_windows = || {
        let rest = small.strip_prefix('$');
        rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_alphabetic()))
    };
    // What its disk check has found.
    let is_found = || {
        let rest = small.strip_prefix("found.");
        rest.is_some_and(|rest| rest.len() == 3 && rest.bytes().all(|b| b.is_ascii_digit()))
    };
    SYSTEM.contains(&small.as_str()) || is_windows() || is_found()
}
