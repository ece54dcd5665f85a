//! Real programs leave the same tree on a union as on a plain file system.
//!
//! Each is a shell script, run at one path three times: with a plain copy of the lower there, with the union of
//! plain directories mounted there, and with a snapshot of a store. Root mounts by himself, and an ordinary user
//! by fusermount3, in no namespace.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod calls;
    pub mod fuse_union;
    pub mod suite;
    pub mod whole_tree;
}

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use support::fuse_union::{self, Engine, Stage};
use support::{suite, whole_tree};

fn main() {
    fuse_union::enter_own_mount_namespace();
    let hindrance = Engine::under_test().hindrance_for_anyone();
    let needs = |tools: &[&str]| {
        hindrance.clone().or_else(|| tools.iter().copied().find_map(suite::needs_program))
    };
    let as_root = |tools: &[&str]| suite::needs_root().or_else(|| needs(tools));
    let long = |hindrance: Option<String>| {
        let asked = std::env::var_os("STRATAFS_FULL").is_some();
        hindrance.or_else(|| (!asked).then(|| "needs STRATAFS_FULL".to_owned()))
    };
    let builds = || needs(&["cc"]).or_else(|| toolchain().is_none().then(|| "needs cargo".into()));
    suite::run_one_by_one(vec![
        suite::trial("git", needs(&["git"]), git),
        suite::trial("make", needs(&["make"]), make),
        suite::trial("tar_and_rsync_like_copies", needs(&["tar", "cp"]), copies),
        suite::trial("rsync", needs(&["rsync"]), rsync),
        suite::trial("sqlite", needs(&["sqlite3"]), sqlite),
        suite::trial("cargo", builds(), cargo),
        suite::trial("npm", long(needs(&["npm"])), npm),
        suite::trial("dpkg", as_root(&["dpkg", "dpkg-deb"]), dpkg),
        suite::trial("debootstrap", long(as_root(&["debootstrap"])), debootstrap),
    ]);
}

/// Where cargo and rustc are, not their wrappers that ask for a home.
fn toolchain() -> Option<PathBuf> {
    let output = Command::new("rustc").args(["--print", "sysroot"]).output().ok()?;
    let bin = Path::new(String::from_utf8(output.stdout).ok()?.trim()).join("bin");
    bin.join("cargo").is_file().then_some(bin)
}

// --- a script, three times -----------------------------------------------------------------------

/// What a program does: first what becomes the lower, then what is done on top of it.
struct Play<'a> {
    lay: &'a str,
    act: &'a str,
    /// Whether a path's contents are the same each time: not if they tell times, or numbers of files.
    steady: fn(&str) -> bool,
    /// Whether the program sets a path's modification time.
    dated: fn(&str) -> bool,
}

/// Runs it in `at`, with what it needs from beside given as `$TOOLS`; what it prints is the result.
#[track_caller]
fn run(script: &str, at: &Path, tools: &Path) -> String {
    let mut path = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin".to_owned();
    if let Some(toolchain) = toolchain() {
        path = format!("{}:{path}", toolchain.display());
    }
    let output = Command::new("bash")
        .args(["-euo", "pipefail", "-c", script])
        .current_dir(at)
        .env_clear()
        .env("PATH", path)
        .env("TOOLS", tools)
        .env("HOME", tools)
        .env("LC_ALL", "C.UTF-8")
        .env("TZ", "UTC")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_AUTHOR_DATE", "2020-02-20T20:20:20+00:00")
        .env("GIT_COMMITTER_DATE", "2020-02-20T20:20:20+00:00")
        .env("SOURCE_DATE_EPOCH", "1500000000")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{}: {said}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

/// Names, kinds, modes, owners, link counts, steady contents, and times that were set.
fn shape(root: &Path, play: &Play) -> Vec<String> {
    let entries = walkdir::WalkDir::new(root).sort_by_file_name();
    let lines = entries.into_iter().map(|entry| {
        let entry = entry.unwrap();
        let name = entry.path().strip_prefix(root).unwrap().display().to_string();
        let meta = entry.path().symlink_metadata().unwrap();
        let kind = meta.file_type();
        let content = match () {
            () if kind.is_symlink() => fs::read_link(entry.path()).unwrap().display().to_string(),
            () if kind.is_file() && (play.steady)(&name) => {
                let bytes = fs::read(entry.path()).unwrap();
                match bytes.len() {
                    0..200 => bytes.escape_ascii().to_string(),
                    _ => whole_tree::line(entry.path()).split_once('"').unwrap().1.to_owned(),
                }
            }
            () if kind.is_char_device() || kind.is_block_device() => format!("{:x}", meta.rdev()),
            () => String::new(),
        };
        let links = if kind.is_dir() { 0 } else { meta.nlink() };
        let (mode, uid, gid) = (meta.mode(), meta.uid(), meta.gid());
        let time = match (play.dated)(&name) {
            true => format!("{}.{:09}", meta.mtime(), meta.mtime_nsec()),
            false => String::new(),
        };
        format!("/{name} {mode:o} {uid}:{gid} {links} {time} {content}")
    });
    lines.collect()
}

fn perform(play: &Play) {
    let mut stage = Stage::new(1);
    // Programs take what time they take.
    stage.patience = None;
    let tools = stage.beside("tools");
    let at_its_place = |dir: &Path, script: &str| {
        // In the place of an empty directory.
        fs::rename(dir, &stage.at).unwrap();
        let said = run(script, &stage.at, &tools);
        let shape = shape(&stage.at, play);
        fs::rename(&stage.at, dir).unwrap();
        fs::create_dir(&stage.at).unwrap();
        (said, shape)
    };
    at_its_place(&stage.lowers[0], play.lay);
    let plain = stage.beside("plain");
    let lower = stage.lower(".");
    let copied = Command::new("cp").arg("-a").arg(&lower).arg(&plain).status().unwrap();
    assert!(copied.success());
    let (expected_words, expected) = at_its_place(&plain, play.act);
    let same = |what: &str| {
        assert_eq!(run(play.act, &stage.at, &tools), expected_words, "{what}");
        let shape = shape(&stage.at, play);
        whole_tree::assert_same(&format!("plain, and {what}"), &expected, &shape);
    };

    let union = stage.mount();
    same("union");
    stage.survives(union);

    if !Engine::under_test().is_own() {
        return;
    }
    let store = stage.beside("store");
    let stratafs = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stratafs"));
        command.arg("--root").arg(&store).args(["--driver", "fuse"]).args(arguments);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}");
    };
    let (at, layer) = (stage.at.to_str().unwrap(), tools.join("layer.tar"));
    let tar = ["--format=posix", "--sparse", "--numeric-owner", "-cf"];
    let mut pack = Command::new("tar");
    let packed = pack.args(tar).arg(&layer).arg("-C").arg(&lower).arg(".").status().unwrap();
    assert!(packed.success());
    stratafs(&["apply", "base", layer.to_str().unwrap()]);
    stratafs(&["prepare", "work", "base"]);
    stratafs(&["mount", "work", at]);
    same("snapshot");
    let shown = whole_tree::lines(&stage.at);
    stratafs(&["umount", at]);
    stratafs(&["commit", "done", "work"]);
    stratafs(&["view", "look", "done"]);
    stratafs(&["mount", "look", at]);
    whole_tree::assert_same("committed", &shown, &whole_tree::lines(&stage.at));
    stratafs(&["umount", at]);
}

// --- the programs --------------------------------------------------------------------------------

fn git() {
    let configure = "
        git config --global user.name tester
        git config --global user.email tester@example.org
        git config --global init.defaultBranch main
        git config --global pack.threads 1
        git config --global gc.auto 0
        git config --global safe.directory '*'
        git config --global protocol.file.allow always
        git config --global advice.detachedHead false
    ";
    perform(&Play {
        // A repository with loose objects, and one with a pack.
        lay: &format!(
            "{configure}
            git init -q old; cd old
            mkdir -p src/deep; seq 1000 >src/numbers; echo '#!/bin/sh' >run; chmod +x run
            ln -s src/numbers link; echo deep >src/deep/file
            git add -A; git commit -qm first
            for n in $(seq 10); do echo $n >>src/numbers; git commit -qam \"change $n\"; done
            git branch feature HEAD~5; git tag -a v1 -m 'first tag'
            cd ..; git clone -q --bare old packed.git; git -C packed.git gc -q
            "
        ),
        act: &format!(
            "{configure}
            git -C old status --porcelain; git -C old fsck --strict
            cd old
            git checkout -q feature; test -x run; echo other >other; git add other
            git mv src/deep moved; git commit -qm feature
            git checkout -q main; git merge -q -m merged feature
            git rm -q link; ln -s moved/file link; git add link; git commit -qm relinked
            git stash -q || true; echo dirty >>src/numbers; git stash -q; git stash pop -q
            git checkout -q -- src/numbers
            git gc -q --prune=now; git fsck --strict; git count-objects -v
            cd ..
            git clone -q old new; git clone -q --no-hardlinks packed.git copy
            git -C new log --oneline --all | cat; git -C new status --porcelain
            cd new; git checkout -q HEAD~3; git checkout -q -b topic; mkdir d; echo d >d/d
            git add d; git commit -qm topic; git push -q origin topic; git repack -q -a -d
            git worktree add -q ../tree main; git -C ../tree status --porcelain
            git worktree remove ../tree
            cd ../copy; git checkout -q -b side HEAD~2; echo side >side; git add side
            git commit -qm side; git rebase -q main; git log --oneline | cat; git gc -q; git fsck
            cd ..
            git -C old gc -q --prune=now; git -C old fsck --strict; git -C new fsck --strict
            git -C packed.git fetch -q ../old '+refs/heads/*:refs/heads/*'
            git -C packed.git gc -q --prune=now; git -C packed.git fsck --strict
            for r in old new copy; do git -C $r ls-files -s; git -C $r status --porcelain; done
            rm -rf copy
            "
        ),
        // The index tells numbers and times of files.
        steady: |name| !name.ends_with(".git/index"),
        dated: |_| false,
    });
}

fn make() {
    perform(&Play {
        lay: r"
            mkdir src obj
            for n in 1 2 3 4 5 6; do echo source $n >src/$n.in; done
            printf '%s\n' 'parts := $(patsubst src/%.in,obj/%.out,$(wildcard src/*.in))' \
                'all: result' 'result: $(parts)' '	cat $^ >$@' \
                'obj/%.out: src/%.in' '	tr a-z A-Z <$< >$@' 'clean:' '	rm -f obj/* result' >Makefile
            make -s all; make -q all
        ",
        act: r"
            make -q all || echo something is to be done
            make
            echo changed >>src/3.in
            make
            make -q all || echo something is to be done
            touch src/5.in; make; make -q all
            echo more >src/7.in; rm src/1.in obj/1.out; make; make -q all
            mv src/7.in src/8.in; make; make -q all
            make clean; make; make -q all
            cp -p src/2.in src/9.in; make; make -q all
        ",
        steady: |_| true,
        dated: |name| name == "src/9.in",
    });
}

fn copies() {
    perform(&Play {
        lay: r"
            mkdir -p tree/a/b tree/empty; chmod 1777 tree/empty; chmod 2750 tree/a
            seq 10000 >tree/a/numbers; ln tree/a/numbers tree/a/b/linked; ln -s ../numbers tree/a/b/link
            truncate -s 10M tree/sparse; printf x | dd of=tree/sparse bs=1 seek=5000000 conv=notrunc
            mkfifo tree/pipe; touch -d '1960-01-01 UTC' tree/a/b
            if [ $UID = 0 ]; then chown 12:34 tree/a/numbers; fi
        ",
        act: r"
            cp -a tree copy; tar -C tree -cf - . | (mkdir untarred; tar -C untarred -xpf -)
            tar --sparse -C tree -cf t.tar . ; tar -df t.tar -C tree; tar -df t.tar -C copy
            mv tree/a moved; mv moved tree/a2; rm -r copy/a; cp -a --reflink=auto tree/a2 copy/a
            sed -i s/1/one/ copy/a/numbers; cmp tree/a2/numbers untarred/a/numbers
            find . -links 2 -type f | sort
            du -k --apparent-size untarred/sparse; stat -c '%s %Y' tree/a2/b
            rm -rf tree; mkdir tree; ls -A tree; rm t.tar
            cp -a untarred tree2; diff -r --no-dereference -x pipe untarred tree2
            install -m 4755 copy/a/numbers installed; if [ $UID = 0 ]; then chown 3 installed; fi
            d=$(mktemp -d XXXXXX); rmdir $d
        ",
        steady: |_| true,
        dated: |name| name.starts_with("untarred") || name.starts_with("tree2"),
    });
}

fn rsync() {
    perform(&Play {
        lay: r"
            mkdir -p tree/a/b tree/empty; chmod 2750 tree/a
            seq 10000 >tree/a/numbers; ln tree/a/numbers tree/a/b/linked; ln -s ../numbers tree/a/b/link
            for n in $(seq 50); do echo $n >tree/empty/$n; done; truncate -s 5M tree/sparse
            touch -d '1999-09-09 09:09:09.999999999 UTC' tree/a/numbers
        ",
        act: r#"
            # Which directories have another time depends on the second in which this runs.
            sync() { rsync -aHi "$@" | grep -v '^\.d' || true; }
            rsync -aHS tree/ copy/; sync -S --dry-run tree/ copy/
            echo more >>tree/a/numbers; touch -d '2000-01-01 UTC' tree/a/numbers
            rm tree/a/b/link tree/empty/7; mv tree/sparse tree/moved
            ln -s numbers tree/a/link; chmod 600 tree/empty/8; touch -d '2001-01-01 UTC' tree/empty/9
            sync --delete --fuzzy tree/ copy/
            rsync -aH --link-dest=$PWD/copy tree/ linked/; find linked -type f -links 2 | wc -l
            sed -i s/1/one/ tree/a/numbers; touch -d '2002-01-01 UTC' tree/a/numbers
            sync --inplace --no-whole-file tree/ copy/
            mv tree/a tree/z; sync --delete-before --delay-updates tree/ copy/
            sync --dry-run --checksum tree/ copy/; sync --backup --suffix=.old copy/ linked/
            find tree ! -type f -exec touch -h -d '2003-01-01 01:01:01.123456789 UTC' {} +
            rsync -aH tree/ copy/
        "#,
        steady: |_| true,
        dated: |name| name.starts_with("copy"),
    });
}

fn sqlite() {
    perform(&Play {
        lay: r"
            sqlite3 data.db 'PRAGMA journal_mode=WAL;
                CREATE TABLE t(who TEXT, n INTEGER, PRIMARY KEY(who, n));
                CREATE TABLE blobs(data BLOB);
                INSERT INTO blobs VALUES(zeroblob(300000)); INSERT INTO t VALUES(0, 0);'
        ",
        act: r"
            writer() {
                for n in $(seq 60); do
                    echo '.timeout 60000'
                    echo 'BEGIN IMMEDIATE;'
                    for m in 1 2 3; do echo INSERT INTO t VALUES\('$1', $((n * 10 + m))\)\;; done
                    echo 'COMMIT;'
                done | sed s/.1/$1/ | sqlite3 -bail data.db
            }
            writer 1 & first=$!
            writer 2 & second=$!
            for n in $(seq 20); do sqlite3 -cmd '.timeout 60000' data.db 'SELECT count(*) FROM t' >/dev/null; done
            wait $first; wait $second
            sqlite3 data.db 'PRAGMA integrity_check; PRAGMA journal_mode;
                SELECT count(*) FROM t; SELECT who, n FROM t ORDER BY who, n;'
            sqlite3 data.db 'PRAGMA journal_mode=DELETE; VACUUM; PRAGMA integrity_check;'
            sqlite3 data.db 'BEGIN; DELETE FROM t; ROLLBACK; SELECT count(*), sum(n) FROM t;'
            sqlite3 data.db 'PRAGMA journal_mode=TRUNCATE; UPDATE t SET n = n + 1000000;
                SELECT sum(n) FROM t;'
            ls
        ",
        steady: |name| name != "data.db",
        dated: |_| false,
    });
}

/// Two packages without dependencies beyond each other, and a build script.
fn cargo() {
    perform(&Play {
        lay: r#"
            mkdir -p app/src part/src
            printf '%s\n' '[workspace]' 'members = ["app", "part"]' 'resolver = "3"' >Cargo.toml
            printf '%s\n' '[package]' 'name = "part"' 'version = "1.0.0"' 'edition = "2024"' >part/Cargo.toml
            echo 'pub fn twice(n: u64) -> u64 { n * 2 }' >part/src/lib.rs
            printf '%s\n' '[package]' 'name = "app"' 'version = "1.0.0"' 'edition = "2024"' \
                '[dependencies]' 'part = { path = "../part" }' >app/Cargo.toml
            echo 'fn main() {
                println!("cargo::rerun-if-changed=number");
                let number = std::fs::read_to_string("number").unwrap();
                let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").unwrap());
                std::fs::write(out.join("number.rs"), number).unwrap();
            }' >app/build.rs
            echo 21 >app/number
            echo 'fn main() { println!("{}", part::twice(include!(concat!(env!("OUT_DIR"), "/number.rs")))); }' \
                >app/src/main.rs
            CARGO_INCREMENTAL=0 cargo build -q --offline; target/debug/app
        "#,
        act: r#"
            export CARGO_INCREMENTAL=0
            build() { cargo build -v -j 1 --offline "$@" 2>&1 | grep -oE '(Fresh|Dirty|Compiling) [a-z]*'; }
            build; target/debug/app
            touch part/src/lib.rs; build; build
            echo 22 >app/number; build; target/debug/app
            sed -i 's/n \* 2/n * 3/' part/src/lib.rs; build; target/debug/app; build
            mv part moved; sed -i s/part/moved/ Cargo.toml; sed -i s,../part,../moved, app/Cargo.toml
            build; target/debug/app
            cargo test -q --offline | grep -c 'test result: ok'
            for n in 1 2; do
                CARGO_INCREMENTAL=1 build --target-dir other; other/debug/app; touch app/src/main.rs
            done
            rm -r other; cargo clean -q --offline; ls; build --release; target/release/app
        "#,
        // They tell times.
        steady: |name| !name.contains("/.fingerprint/") && !name.ends_with(".rustc_info.json"),
        dated: |_| false,
    });
}

/// Packages packed and installed without the network: one by its archive, one by a link.
fn npm() {
    let package = r#"
        export npm_config_offline=true npm_config_audit=false npm_config_fund=false
        export npm_config_update_notifier=false npm_config_loglevel=error
        package() {
            mkdir -p $1/lib $1/bin; for n in $(seq 100); do echo "module.exports = $n" >$1/lib/$n.js; done
            echo '{"name":"'$1'","version":"'$2'","main":"lib/7.js","bin":{"'$1'":"bin/run.js"}}' >$1/package.json
            printf '%s
' '#!/usr/bin/env node' 'console.log(require("..") * 6)' >$1/bin/run.js
        }
    "#;
    perform(&Play {
        lay: &format!(
            r#"{package}
            package packed 1.0.0; npm pack --silent ./packed; rm -r packed; package linked 1.0.0
            mkdir app; cd app; npm init -y >$TOOLS/said; npm install ../packed-1.0.0.tgz ../linked >$TOOLS/said
            npx packed
            "#
        ),
        act: &format!(
            r#"{package}
            cd app; npx packed; npx linked; npm ls --parseable | xargs -n 1 basename | sort
            npm ci >$TOOLS/said; npx packed
            cd ..; package packed 2.0.0; npm pack --silent ./packed
            cd app; npm install ../packed-2.0.0.tgz >$TOOLS/said; npx packed; npm ls | grep -c @
            npm uninstall linked >$TOOLS/said; ls -A node_modules node_modules/.bin; npm prune >$TOOLS/said
            rm -rf node_modules; npm ci >$TOOLS/said; node -p 'require("packed")'
            "#
        ),
        steady: |_| true,
        dated: |_| false,
    });
}

/// Two versions of a package, with what upgrades trip over: conffiles, links, a directory that becomes a
/// link, files that go.
const PACKAGES: &str = r#"
    cd "$TOOLS"; [[ -e two.deb ]] && exit
    for version in 1 2; do
        p=$TOOLS/p$version; mkdir -p $p/DEBIAN $p/etc/thing $p/usr/share/thing/sub $p/usr/bin
        printf '%s\n' 'Package: thing' "Version: $version" 'Architecture: all' \
            'Maintainer: Tester <tester@example.org>' 'Description: a thing' >$p/DEBIAN/control
        echo /etc/thing/conf >$p/DEBIAN/conffiles
        echo "conf of $version" >$p/etc/thing/conf
        for n in $(seq 30); do echo "file $n of $version" >$p/usr/share/thing/file$n; done
        ln $p/usr/share/thing/file1 $p/usr/share/thing/hard; ln -s file2 $p/usr/share/thing/soft
        echo program >$p/usr/bin/thing; chmod 4755 $p/usr/bin/thing
        echo $version >$p/usr/share/thing/sub/only-in-$version
        chmod -R g-w $p
    done
    dpkg-deb --root-owner-group --build p1 one.deb >/dev/null
    dpkg-deb --root-owner-group --build p2 two.deb >/dev/null
"#;

fn dpkg() {
    let install =
        r#"install() { dpkg --root="$PWD" --log=/dev/null --force-confold "$@" >/dev/null; }"#;
    perform(&Play {
        lay: &format!(
            "({PACKAGES}); {install}
            mkdir -p var/lib/dpkg/info var/lib/dpkg/updates var/lib/dpkg/triggers
            touch var/lib/dpkg/status var/lib/dpkg/available
            install -i $TOOLS/one.deb; echo edited >>etc/thing/conf
            "
        ),
        act: &format!(
            "{install}
            install -V thing || true; install -i $TOOLS/one.deb
            install -i $TOOLS/two.deb
            dpkg --root=\"$PWD\" -l thing | tail -1; cat etc/thing/conf usr/share/thing/file7
            install -r thing; find . -path ./var -prune -o -print | sort
            install -i $TOOLS/two.deb; install -P thing; find . -path ./var -prune -o -print | sort
            install -i $TOOLS/one.deb; install -i $TOOLS/two.deb
            "
        ),
        steady: |_| true,
        dated: |_| false,
    });
}

/// A whole Debian: made once as an archive of packages, unpacked on both.
fn debootstrap() {
    let bootstrap = r#"
        exec >/dev/null
        if [[ ! -e $TOOLS/packages.tar ]]; then
            debootstrap --variant=minbase --make-tarball="$TOOLS/packages.tar" bookworm "$TOOLS/scratch"
        fi
        debootstrap --variant=minbase --unpack-tarball="$TOOLS/packages.tar" bookworm "$PWD"
    "#;
    perform(&Play {
        lay: &format!("({PACKAGES}); ({bootstrap})"),
        act: &format!(
            "chroot . dpkg --audit; cp $TOOLS/one.deb $TOOLS/two.deb root/
            chroot . dpkg -i /root/one.deb >/dev/null; chroot . dpkg -i /root/two.deb >/dev/null
            chroot . dpkg -V || true; chroot . dpkg -P --force-all mawk >/dev/null 2>&1 || true
            chroot . dpkg-query -W | cat; chroot . useradd -m somebody; chroot . su somebody -c id
            chroot . su somebody -c 'umask 077; echo mine >~/file; stat -c %a ~/file'
            chroot . mv /usr/share/doc /usr/share/docs; chroot . mv /usr/share/docs /usr/share/doc
            mkdir second; cd second; ({bootstrap})
            "
        ),
        // Logs, caches that tell numbers of files, and the days of passwords.
        steady: |name| {
            !name.contains("var/log/")
                && !name.contains("var/cache/")
                && !name.contains("etc/machine-id")
                && !name.contains("etc/shadow")
        },
        dated: |_| false,
    });
}
