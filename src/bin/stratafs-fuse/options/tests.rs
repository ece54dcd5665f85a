//! What command lines mean.

use super::*;

const ORDINARY: Caller = Caller { reads_trusted: false, is_root: false };

fn mount(arguments: &[&str]) -> Result<MountRequest, String> {
    let arguments = arguments.iter().map(OsString::from);
    match parse(arguments, ORDINARY)? {
        Request::Mount(request) => Ok(*request),
        other => Err(format!("{other:?}")),
    }
}

fn dirs(layers: &[FuseLayer]) -> Vec<&str> {
    layers.iter().map(|layer| layer.dir.to_str().unwrap()).collect()
}

#[test]
fn uppers_of_containers_storage_refer_to_nothing_unless_asked_to() {
    let tmp = tempfile::tempdir().unwrap();
    let layer = tmp.path().join("0123/diff");
    std::fs::create_dir_all(&layer).unwrap();
    let refers = |more: &str| {
        let list = format!("lowerdir=/l,upperdir={},workdir=/w{more}", layer.display());
        let options = mount(&["/mnt", "-o", &list]).unwrap().options;
        (options.redirects, options.metacopy)
    };
    assert_eq!(refers(""), (true, true));
    std::fs::write(tmp.path().join("0123/link"), "SHORT").unwrap();
    assert_eq!(refers(""), (false, false));
    assert_eq!(refers(",metacopy=on,redirect_dir=on"), (true, true));
    assert_eq!(refers(",metacopy=off,redirect_dir=on"), (true, false));
}

#[test]
fn directories_are_lists_with_escapes() {
    let list = r"lowerdir=/a\:b:/c\,d:/e\\f,upperdir=/u:v,workdir=/w";
    let request = mount(&["src", "/mnt", "-o", list, "-f"]).unwrap();
    assert_eq!(dirs(&request.options.lowers), ["/a:b", "/c,d", r"/e\f"]);
    let upper = request.options.upper.unwrap();
    assert_eq!((upper.dir, upper.work), ("/u:v".into(), "/w".into()));
    assert_eq!(request.options.source, "src");
    assert_eq!(request.options.format, LayerFormat::OverlayUser);
    assert!(request.foreground && !request.debug && !request.options.allow_other);
}

#[test]
fn what_a_mount_prints_is_read_back() {
    use stratafs::Mount;
    let mut lower = vec![PathBuf::from("/plain")];
    for odd in [r"/a:b", r"/a,b", r"/a\b", r"/a\:,b\\", "/ü b"] {
        lower.push(odd.into());
    }
    lower.push(PathBuf::from(OsStr::from_bytes(b"/\xff")));
    let mut request = stratafs::MountRequest::new(LayerFormat::OverlayUser, "/empty");
    request.lower.clone_from(&lower);
    request.upper = Some(UpperDir { dir: r"/u\,:".into(), work: r"/w,\".into() });
    let Ok(mounts) = stratafs::Driver::mounts(&stratafs::FuseDriver::new(), &request) else {
        // Not here.
        return;
    };
    let [mount @ Mount::Fuse { .. }] = mounts.as_slice() else {
        panic!("{mounts:?}");
    };
    let list = mount.options().join(OsStr::new(","));
    let arguments = ["-o".into(), list, "/mnt".into()];
    let Ok(Request::Mount(read)) = parse(arguments, ORDINARY) else { panic!() };
    let read: Vec<_> = read.options.lowers.into_iter().map(|layer| layer.dir).collect();
    assert_eq!(read, lower);
}

#[test]
fn aufs_branches() {
    let request = mount(&["/m", "-o", "br=/a=rw:/b=ro+wh:/c=rr:/d"]).unwrap();
    assert_eq!(dirs(&request.options.lowers), ["/b", "/c", "/d"]);
    let upper = request.options.upper.unwrap();
    assert_eq!((upper.dir, upper.work), ("/a".into(), "/a.stratafs-work".into()));
    assert_eq!(request.options.format, LayerFormat::Aufs);
    let request = mount(&["/m", "-o", "dirs=/b=ro:/c=rr"]).unwrap();
    assert!(request.options.upper.is_none());
    assert!(mount(&["/m", "-o", "br=/b=ro:/c=rw"]).unwrap_err().contains("/c"));
    assert!(mount(&["/m", "-o", "br=/b=wo"]).unwrap_err().contains("wo"));
}

#[test]
fn ids_times_and_flags() {
    let list = "lowerdir=/l,uidmapping=100000:0:65536:7:70000:1,squash_to_gid=5,timeout=0.5,\
                writeback=off,fsync=0,noacl,redirect_dir=off,metacopy=off,threads=3,busy_poll=70,nosuid,suid,nodev,noatime,\
                x-systemd.automount,_netdev,context=system_u:object_r:x,fsname=n";
    let options = mount(&["/m", "-o", list]).unwrap().options;
    assert_eq!(
        options.uids,
        [
            IdRange { host: 100_000, shown: 0, len: 65536 },
            IdRange { host: 7, shown: 70_000, len: 1 }
        ]
    );
    assert_eq!(options.squash_gid, Some(5));
    assert_eq!(options.timeout, Some(Duration::from_millis(500)));
    assert!(
        options.volatile
            && options.no_acl
            && !options.redirects
            && !options.metacopy
            && !options.writeback
    );
    assert_eq!(options.threads.map(NonZeroUsize::get), Some(3));
    assert_eq!(options.busy_poll, Duration::from_micros(70));
    assert!(options.restrictions.nodev && !options.restrictions.nosuid);
    assert_eq!(options.kernel_options, ["context=system_u:object_r:x"]);
    assert_eq!(options.source, "n");
}

#[test]
fn mappings_as_containers_storage_tells_them() {
    let ranges = |list: &str| {
        let options = mount(&["/m", "-o", list]).unwrap().options;
        (options.uids, options.gids)
    };
    let maps = "uidmapping=:0:100000:65536,gidmapping=:0:200000:65536:70000:5:1";
    let told = ranges(&format!("lowerdir=/s/l/A,upperdir=/s/c/diff,workdir=/s/c/work,{maps}"));
    let range = |host, shown, len| IdRange { host, shown, len };
    let gids = vec![range(0, 200_000, 65536), range(70_000, 5, 1)];
    assert_eq!(told, (vec![range(0, 100_000, 65536)], gids));
    // Its idmapped mounts of the layers.
    let mapped =
        "lowerdir=/s/c/mapped/0/l/A:/s/c/mapped/0/l/B,upperdir=/s/c/diff,workdir=/s/c/work";
    assert_eq!(ranges(&format!("{mapped},{maps}")), (vec![], vec![]));
    let partly = mapped.replace("/s/c/mapped/0/l/B", "/s/l/B");
    assert_eq!(ranges(&format!("{partly},{maps}")).0.len(), 1);
}

#[test]
fn what_is_wrong_is_named() {
    let with = |list: &str| mount(&["/m", "-o", list]).unwrap_err();
    for (list, named) in [
        ("lowerdir=/l,frobnicate", "frobnicate"),
        ("lowerdir=/l,frob=1", "frob=1"),
        ("lowerdir=/l::/k", "empty"),
        ("lowerdir", "lowerdir="),
        ("upperdir=/u,workdir=/w,timeout=x", "timeout=x"),
        ("upperdir=/u", "workdir="),
        ("lowerdir=/l,workdir=/w", "upperdir="),
        ("lowerdir=/l,threads=0", "threads=0"),
        ("lowerdir=/l,busy_poll=10001", "busy_poll=10001"),
        ("lowerdir=/l,uidmapping=1:2", "uidmapping=1:2"),
        ("lowerdir=/l,uidmapping=4294967295:0:2", "largest"),
        ("lowerdir=/l,format=zfs", "zfs"),
        ("lowerdir=/l,writeback=maybe", "writeback=maybe"),
        ("lowerdir=/l,plugins=x", "plugins"),
        ("lowerdir=/l,xattr_permissions=3", "xattr_permissions"),
        ("lowerdir=/l,xattr_permissions", "xattr_permissions"),
        ("lowerdir=/l,timeout=-1", "timeout=-1"),
        ("br=/a=rw,upperdir=/u,workdir=/w", "br="),
        ("ro", "lowerdir="),
    ] {
        let message = with(list);
        assert!(message.contains(named), "{list}: {message}");
    }
    assert!(mount(&["-o", "lowerdir=/l"]).unwrap_err().contains("mount point"));
    assert!(mount(&["a", "b", "c"]).unwrap_err().contains("\"c\""));
    assert!(mount(&["--frob", "/m"]).unwrap_err().contains("--frob"));
    assert!(mount(&["/m", "-o"]).unwrap_err().contains("-o"));
}
