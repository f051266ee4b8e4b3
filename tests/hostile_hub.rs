//! A hub, a mirror or whoever stands between may say anything: nothing of it harms this machine or its user.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::hub::{COMMIT, Hub, Manner};
use crate::support::{Said, find, say};

const REPOSITORY: &str = "somebody/model";
const WEIGHTS: &str = "model.safetensors";

/// Names that no file of a repository may have here.
const NAMES: [&str; 22] = [
    "../evil.json",
    "../../../../../evil.json",
    "/tmp/proxytune-evil.json",
    "//evil.json",
    "folder/../../../evil.json",
    "folder/..",
    "./evil.json",
    "folder//evil.json",
    "folder/./evil.json",
    "..\\evil.json",
    "folder\\..\\..\\evil.json",
    "C:\\evil.json",
    "C:evil.json",
    "%2e%2e/evil.json",
    "evil?x=.json",
    "evil#.json",
    "evil\0.json",
    "evil\n.json",
    "evil\u{1b}[2J\u{1b}]0;title\u{7}.json",
    "evil\u{202e}nosj.json",
    " evil.json",
    "...",
];

fn hub(manner: Manner) -> Hub {
    let hub = Hub::start(manner);
    hub.add(REPOSITORY, "config.json", r#"{"model_type": "vit"}"#);
    hub.add(REPOSITORY, WEIGHTS, b"weights ".repeat(1000));
    hub
}

/// Downloads into `home`, below which nothing but the cache may come to be. It may take so long that a program which
/// hangs is told from one that tries again.
fn download(hub: &Hub, home: &Path) -> Said {
    let mut command = hub.program(home);
    command.env("HF_TOKEN", "secret-token");
    command.args(["models", "--download", REPOSITORY]);
    let began = Instant::now();
    let said = say(command);
    assert!(began.elapsed() < Duration::from_secs(20), "{said:?}");
    let all = format!("{}{}", said.out, said.err);
    assert!(!all.contains("panicked"), "{all}");
    assert!(!all.contains("secret-token"), "{all}");
    let is_control =
        |c: char| c.is_control() && c != '\n' || ('\u{202a}'..='\u{202e}').contains(&c);
    assert!(!all.contains(is_control), "{all:?}");
    said
}

/// Downloads into a fresh folder within a fresh folder, and fails where anything is written beside the repository's own
/// folder of the cache and its locks.
fn writes_nowhere_else(hub: &Hub) -> Said {
    let around = tempfile::tempdir().unwrap();
    let home = around.path().join("a/b/home");
    std::fs::create_dir_all(&home).unwrap();
    let said = download(hub, &home);
    let own = home.join("hub");
    let folders =
        ["models--somebody--model", ".locks/models--somebody--model"].map(|name| own.join(name));
    let outside = |path: &Path| !folders.iter().any(|folder| path.starts_with(folder));
    let mut found = find(around.path(), &|_: &str| true);
    found.retain(|path| path.symlink_metadata().is_ok_and(|file| !file.is_dir()) && outside(path));
    assert_eq!(found, Vec::<std::path::PathBuf>::new(), "{said:?}");
    assert!(!Path::new("/tmp/proxytune-evil.json").exists());
    assert!(!Path::new("/tmp/proxytune-evil.safetensors").exists());
    said
}

/// What of the repository is in the cache as whole.
fn arrived(home: &Path) -> Vec<std::path::PathBuf> {
    let snapshot = home.join("hub/models--somebody--model/snapshots");
    match snapshot.is_dir() {
        true => find(&snapshot, &|name: &str| name == WEIGHTS),
        false => Vec::new(),
    }
}

#[test]
fn nothing_is_written_outside_the_cache_whatever_a_listing_names() {
    let hub = hub(Manner {
        has_everything: true,
        ..Manner::default()
    });
    let long = format!("{}.json", "x".repeat(300));
    let deep = format!("{}evil.json", "x/".repeat(1000));
    for name in NAMES.into_iter().chain([long.as_str(), &deep]) {
        let siblings = json!([{"rfilename": "config.json"}, {"rfilename": name}]);
        let listing = json!({"siblings": siblings}).to_string().into_bytes();
        hub.change(|manner| manner.listing = Some(listing));
        let said = writes_nowhere_else(&hub);
        let wanted = name.ends_with(".json");
        assert_eq!(said.code, Some(1), "{name:?}: {said:?}");
        assert!(
            !wanted || said.err.contains("name is none that a file may have"),
            "{said:?}"
        );
    }
}

#[test]
fn nothing_is_written_or_read_outside_the_cache_whatever_an_index_names() {
    let names = NAMES.map(|name| name.replace(".json", ".safetensors"));
    let inside = "folder/model.safetensors".to_string();
    for name in names.into_iter().chain([inside]) {
        let hub = Hub::start(Manner {
            has_everything: true,
            ..Manner::default()
        });
        let index = json!({"weight_map": {"x": name}}).to_string();
        hub.add(REPOSITORY, "config.json", r#"{"model_type": "vit"}"#);
        hub.add(REPOSITORY, "model.safetensors.index.json", index);
        let said = writes_nowhere_else(&hub);
        said.says(1, &["no name of a file beside it", "hint: "]);
        let asked = hub.requests();
        assert!(
            !asked.iter().any(|asked| asked.contains("evil")),
            "{asked:#?}"
        );
    }
    for index in [
        r#"{"weight_map": {"x": 7}}"#,
        r#"{"weight_map": ["one.safetensors"]}"#,
        r#"{"weight_map": {}}"#,
        r#"{}"#,
        r#"{"weight_map": {"x": "one.saf"#,
    ] {
        let hub = Hub::start(Manner::default());
        hub.add(REPOSITORY, "model.safetensors.index.json", index);
        writes_nowhere_else(&hub).says(1, &["model.safetensors.index.json: "]);
    }
}

#[test]
fn etags_and_commits_that_are_no_digests_name_no_files() {
    let long = "0".repeat(5000);
    for id in [
        "../../../../evil",
        "..",
        ".",
        "/tmp/proxytune-evil.json",
        "a/b",
        "a\\b",
        "a b",
        "",
        &long,
    ] {
        let etag = hub(Manner {
            etag: Some(id.to_string()),
            ..Manner::default()
        });
        writes_nowhere_else(&etag).says(1, &["not a hub's"]);
        let commit = hub(Manner {
            commit: Some(id.to_string()),
            ..Manner::default()
        });
        writes_nowhere_else(&commit).says(1, &["not a hub's"]);
    }
}

#[test]
fn revisions_that_leave_the_cache_are_no_revisions() {
    let hub = hub(Manner::default());
    let home = tempfile::tempdir().unwrap();
    for revision in ["../../../../evil", "/etc", "a/../../b", "a b", "a?b"] {
        let mut command = hub.program(home.path());
        command.args(["models", "--download", &format!("{REPOSITORY}@{revision}")]);
        say(command).says(1, &["neither a known model nor a directory"]);
    }
    assert_eq!(hub.requests(), Vec::<String>::new());
}

#[test]
fn sizes_that_cannot_be_are_refused_before_anything_is_written() {
    let max = u64::MAX.to_string();
    for size in [
        &max,
        "18446744073709551616",
        "-1",
        "1e9",
        "*",
        "9223372036854775807",
        "8001",
        "",
    ] {
        let hub = hub(Manner {
            size: Some(size.to_string()),
            ..Manner::default()
        });
        let said = writes_nowhere_else(&hub);
        said.says(1, &["hint: "]);
    }
    for size in [
        json!(u64::MAX),
        json!(-1),
        json!(1.5),
        json!("8000"),
        json!(7999),
    ] {
        let hub = hub(Manner::default());
        let listing = json!({"siblings": [{"rfilename": WEIGHTS, "size": size}]});
        hub.change(|manner| manner.listing = Some(listing.to_string().into_bytes()));
        writes_nowhere_else(&hub).says(1, &["not a hub's"]);
    }
    // All places agree, and no disk has as much.
    let hub = hub(Manner {
        size: Some(max),
        ..Manner::default()
    });
    let listing = json!({"siblings": [{"rfilename": WEIGHTS, "size": u64::MAX}]});
    hub.change(|manner| manner.listing = Some(listing.to_string().into_bytes()));
    writes_nowhere_else(&hub).says(1, &["are to come, and", "are free"]);
}

#[test]
fn a_file_of_settings_of_gigabytes_is_refused() {
    let hub = hub(Manner::default());
    hub.add(REPOSITORY, "config.json", vec![b' '; 65 << 20]);
    writes_nowhere_else(&hub).says(1, &["68.2 MB for a file of settings"]);
}

#[test]
fn redirects_lead_to_other_hosts_of_the_web_alone() {
    let to_nowhere = hub(Manner {
        redirect: Some(None),
        ..Manner::default()
    });
    writes_nowhere_else(&to_nowhere).says(1, &["a redirect to nowhere"]);
    for location in [
        "file:///etc/passwd",
        "ftp://127.0.0.1/model",
        "javascript:alert(1)",
        "data:application/json,{}",
        "gopher://127.0.0.1:70/x",
        "http://",
        "http://[",
    ] {
        let hub = hub(Manner {
            redirect: Some(Some(location.to_string())),
            ..Manner::default()
        });
        writes_nowhere_else(&hub).says(1, &["a redirect"]);
    }
    let hub = hub(Manner::default());
    let own = format!("{}/somebody/model/resolve/main/config.json", hub.endpoint());
    for location in [
        own.as_str(),
        "config.json",
        "/somebody/model/resolve/main/config.json?again",
    ] {
        hub.change(|manner| manner.redirect = Some(Some(location.to_string())));
        writes_nowhere_else(&hub).says(1, &["more than ten redirects"]);
        assert!(hub.requests().len() < 20);
    }
}

#[test]
fn the_token_goes_to_the_configured_host_and_to_no_other() {
    let hub = hub(Manner {
        token: Some("secret-token".into()),
        redirects_from: Some(1000),
        ..Manner::default()
    });
    // Another name of the same machine, as the network of a hub has.
    let home = tempfile::tempdir().unwrap();
    download(&hub, home.path()).says(0, &[]);
    assert_eq!(arrived(home.path()).len(), 1);
    let tokens = hub.tokens();
    let own = |host: &str| host.starts_with("127.0.0.1:");
    assert!(tokens.iter().any(|(host, _)| own(host)) && tokens.iter().any(|(host, _)| !own(host)));
    for (host, token) in tokens {
        let expected = own(&host).then(|| "Bearer secret-token".to_string());
        assert_eq!(token, expected, "{host}");
    }
    // Another port of the same host.
    let other = self::hub(Manner::default());
    let there = format!("{}/{REPOSITORY}/resolve/main/{WEIGHTS}", other.endpoint());
    hub.change(|manner| manner.redirect = Some(Some(there)));
    let home = tempfile::tempdir().unwrap();
    download(&hub, home.path());
    let tokens = other.tokens();
    assert!(!tokens.is_empty());
    assert!(
        tokens.iter().all(|(_, token)| token.is_none()),
        "{tokens:?}"
    );
}

#[test]
fn bytes_that_are_not_what_is_published_never_count_as_whole() {
    let (flips, cuts) = (
        Manner {
            flips: true,
            ..Manner::default()
        },
        Manner {
            cuts: 100,
            ..Manner::default()
        },
    );
    for manner in [flips, cuts] {
        for redirects_from in [None, Some(1000)] {
            let hub = Hub::start(Manner {
                redirects_from,
                ..manner.clone()
            });
            hub.add(REPOSITORY, WEIGHTS, b"weights ".repeat(1000));
            if redirects_from.is_some() {
                // The etag is all that tells.
                let listing = json!({"siblings": [{"rfilename": WEIGHTS}]});
                hub.change(|manner| manner.listing = Some(listing.to_string().into_bytes()));
            }
            let home = tempfile::tempdir().unwrap();
            let said = download(&hub, home.path());
            said.says(1, &["hint: "]);
            assert_eq!(arrived(home.path()), Vec::<std::path::PathBuf>::new());
            let parts = find(home.path(), &|name: &str| name.ends_with(".incomplete"));
            assert_eq!(parts, Vec::<std::path::PathBuf>::new(), "{said:?}");
            // The hub has mended its ways.
            hub.change(|manner| (manner.flips, manner.cuts) = (false, 0));
            download(&hub, home.path()).says(0, &[]);
            let weights = std::fs::read(&arrived(home.path())[0]).unwrap();
            assert!(weights == b"weights ".repeat(1000));
        }
    }
}

#[test]
fn a_digest_of_the_listing_holds_where_the_etag_is_none() {
    let hub = hub(Manner {
        etag: Some("6a3f-1b".into()),
        ..Manner::default()
    });
    let home = tempfile::tempdir().unwrap();
    let listing = |sha256: &str| {
        let lfs = json!({"sha256": sha256, "size": 8000});
        json!({"siblings": [{"rfilename": WEIGHTS, "size": 8000, "lfs": lfs}]})
            .to_string()
            .into_bytes()
    };
    hub.change(|manner| manner.listing = Some(listing(&"0".repeat(64))));
    download(&hub, home.path()).says(1, &["not what the hub publishes", "SHA-256 0000"]);
    assert!(arrived(home.path()).is_empty());
    let right = crate::support::hub::sha256(&b"weights ".repeat(1000));
    hub.change(|manner| manner.listing = Some(listing(&right)));
    download(&hub, home.path()).says(0, &[]);
}

#[test]
fn a_hub_that_ignores_ranges_gives_whole_files() {
    let hub = hub(Manner {
        ignores_ranges: true,
        redirects_from: Some(1000),
        ..Manner::default()
    });
    let weights = b"weights ".repeat(1000);
    let home = tempfile::tempdir().unwrap();
    let blobs = home.path().join("hub/models--somebody--model/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let part = blobs.join(format!(
        "{}.incomplete",
        crate::support::hub::sha256(&weights)
    ));
    std::fs::write(part, &weights[..3000]).unwrap();
    download(&hub, home.path()).says(0, &[]);
    assert!(std::fs::read(&arrived(home.path())[0]).unwrap() == weights);
}

#[test]
fn a_part_that_is_another_than_was_asked_for_is_refused() {
    let hub = hub(Manner {
        redirects_from: Some(1000),
        ..Manner::default()
    });
    let weights = b"weights ".repeat(1000);
    let home = tempfile::tempdir().unwrap();
    let blobs = home.path().join("hub/models--somebody--model/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let part = blobs.join(format!(
        "{}.incomplete",
        crate::support::hub::sha256(&weights)
    ));
    std::fs::write(part, &weights[..3000]).unwrap();
    hub.change(|manner| manner.range_off_by = 8);
    download(&hub, home.path()).says(1, &["begins at byte 3008 instead of 3000"]);
    assert!(arrived(home.path()).is_empty());
    hub.change(|manner| manner.range_off_by = 0);
    download(&hub, home.path()).says(0, &[]);
    assert!(std::fs::read(&arrived(home.path())[0]).unwrap() == weights);
}

#[test]
fn a_body_that_goes_on_behind_its_end_is_cut_off_as_a_fault() {
    let hub = hub(Manner {
        goes_on: true,
        ..Manner::default()
    });
    writes_nowhere_else(&hub).says(1, &["beyond the 21 bytes"]);
}

#[test]
fn listings_of_any_form_are_refused_without_harm() {
    let deep = |depth: usize| [b"[".repeat(depth), b"]".repeat(depth)].concat();
    let siblings = |inside: &str| format!("{{\"siblings\": {inside}}}").into_bytes();
    let mut listings = vec![
        Vec::new(),
        b"null".to_vec(),
        b"<html>sign in</html>".to_vec(),
        b"\xff\xfe".to_vec(),
        deep(100_000),
        [b"{\"siblings\": ".to_vec(), deep(100_000), b"}".to_vec()].concat(),
        siblings("null"),
        siblings("{}"),
        siblings("7"),
        siblings("[null]"),
        siblings("[7]"),
        siblings("[{}]"),
        siblings(r#"[{"rfilename": null}]"#),
        siblings(r#"[{"rfilename": ["config.json"]}]"#),
        siblings(r#"[{"rfilename": "config.json", "lfs": 7}]"#),
        siblings(r#"[{"rfilename": "config.json", "lfs": {"sha256": "../../x"}}]"#),
        siblings(r#"[{"rfilename": "config.json", "blobId": "../../x"}]"#),
        siblings(r#"[{"rfilename": "config.js"#),
        vec![b' '; 40 << 20],
    ];
    let many = r#"{"rfilename": "x"},"#.repeat(1_400_000);
    listings.push(siblings(&format!("[{many}{{}}]")));
    for listing in listings {
        let start = String::from_utf8_lossy(&listing[..listing.len().min(60)]).into_owned();
        let hub = hub(Manner {
            listing: Some(listing),
            ..Manner::default()
        });
        let said = writes_nowhere_else(&hub);
        assert_eq!(said.code, Some(1), "{start}: {said:?}");
        assert!(said.err.contains("not a hub's"), "{start}: {said:?}");
    }
}

#[test]
fn a_cache_that_names_another_folder_is_not_followed() {
    let hub = hub(Manner::default());
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("hub/models--somebody--model");
    std::fs::create_dir_all(root.join("refs")).unwrap();
    std::fs::create_dir_all(root.join("snapshots")).unwrap();
    std::fs::write(home.path().join(WEIGHTS), "another's").unwrap();
    std::fs::write(root.join("refs/main"), "../../..").unwrap();
    download(&hub, home.path()).says(0, &[]);
    assert_eq!(
        std::fs::read_to_string(root.join("refs/main")).unwrap(),
        COMMIT
    );
    assert_eq!(arrived(home.path()).len(), 1);
}
