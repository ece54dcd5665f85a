//! The example `oci-bundle`: runs by runc, again and again, and leaves nothing behind.
//!
//! It must be built, as `cargo test` does without the name of a test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "support/suite.rs"]
#[allow(dead_code, reason = "each suite uses its part")]
mod suite;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use stratafs::{LayoutWriter, SaveOptions, Store, StoreOptions, ignore_progress, save_image};

fn main() {
    let hindrance = || {
        let needs = suite::needs_root().or_else(|| suite::needs_program("runc"));
        let needs = needs.or_else(|| suite::needs_program("busybox"));
        needs.or_else(|| (!example().is_file()).then(|| "needs the example oci-bundle".to_owned()))
    };
    suite::run_one_by_one(vec![
        suite::trial("it_runs_as_root_and_in_a_user_namespace", hindrance(), runs),
        suite::trial("it_keeps_what_came_of_it_in_a_store", hindrance(), keeps),
        suite::trial("it_cleans_up_when_it_fails", hindrance(), fails),
    ]);
}

/// Beside the directory of this program.
fn example() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().with_file_name("examples/oci-bundle")
}

/// Its exit code, and what it printed; its temporary directory is in `dir`, and must be gone.
#[track_caller]
fn run(dir: &Path, arguments: &[&str]) -> (i32, String) {
    let temporary = dir.join("temporary");
    fs::create_dir_all(&temporary).unwrap();
    let out = Command::new(example())
        .args(arguments)
        .current_dir(dir)
        .env("TMPDIR", &temporary)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = [out.stdout, out.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0, "{text}");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(temporary.to_str().unwrap()), "{text}");
    let known = Command::new("runc").arg("list").output().unwrap();
    assert!(!String::from_utf8_lossy(&known.stdout).contains("oci-bundle-"), "{text}");
    (out.status.code().unwrap(), text)
}

fn in_passable_directory() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = suite::temp();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

fn runs() {
    let dir = in_passable_directory();
    for arguments in [&[][..], &["--userns"], &[]] {
        let (code, text) = run(dir.path(), arguments);
        assert_eq!(code, 0, "{text}");
        for expected in ["uid=0 gid=0", "drwxr-xr-x    2 0        0 ", "A /hello", "committed as"] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
    }
}

/// What came of it is an image, which runs as another does.
fn keeps() {
    let dir = in_passable_directory();
    for _ in 0..2 {
        let (code, text) = run(dir.path(), &["--userns", "--store", "store"]);
        assert_eq!(code, 0, "{text}");
    }
    let store = Store::open(dir.path().join("store"), StoreOptions::new()).unwrap();
    let mut results: Vec<String> = Vec::new();
    let each = &mut |info: &stratafs::Info| {
        results.extend(info.parent.is_some().then(|| info.key.clone()));
        Ok(())
    };
    store.walk(&[], each).unwrap();
    assert_eq!(results.len(), 2, "{results:?}");
    let to = LayoutWriter::to_tar_file(dir.path().join("image.tar"), dir.path()).unwrap();
    save_image(&store, &results[0], to, &SaveOptions::new(), &mut ignore_progress).unwrap();

    for (script, code, expected) in [
        ("cat /hello && rm /hello", 0, "D /hello"),
        ("rm /hello; exit 3", 1, "runc ended with exit status: 3"),
    ] {
        for arguments in [&["image.tar"][..], &["--userns", "--store", "other", "image.tar"]] {
            let (ended, text) = run(dir.path(), &[arguments, &["sh", "-c", script]].concat());
            assert_eq!(ended, code, "{text}");
            assert!(text.contains(expected), "{text}");
        }
    }
    // Of those that failed nothing is left.
    let store = Store::open(dir.path().join("other"), StoreOptions::new()).unwrap();
    let mut count = 0;
    let each = &mut |_: &stratafs::Info| {
        count += 1;
        Ok(())
    };
    store.walk(&[], each).unwrap();
    assert_eq!(count, 3, "two layers, and one that came of a run");
}

fn fails() {
    let dir = in_passable_directory();
    for (arguments, expected) in [
        (&["none.tar"][..], "none.tar"),
        (&["--what"], "there is no option --what"),
        (&["--store"], "--store takes a directory"),
    ] {
        let (code, text) = run(dir.path(), arguments);
        assert_eq!(code, 1);
        assert!(text.starts_with("oci-bundle: ") || text.starts_with("store at"), "{text}");
        assert!(text.contains(expected), "{text}");
    }
}
