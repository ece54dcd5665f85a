//! The commands: each validates what was typed, makes one call of the library, and prints what that
//! gives.

mod adopt;
mod images;
mod layers;
mod mounts;
#[cfg(feature = "fuse")]
mod run;
mod settle;
mod snapshots;
#[cfg(feature = "fuse")]
mod unshare;
mod upkeep;

use std::fs::{self, File};
use std::io::{self, IsTerminal as _, Read};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use stratafs::{ErrorKind, ImageRecord, Store, StoreOptions};
#[cfg(feature = "fuse")]
use stratafs::{FuseServer, helper::HelperCommand};

use crate::args::{Command, DriverName, Layer, OwnersName};
use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::output::{self, Report};
use crate::progress::Reporter;

type Result<T = ()> = std::result::Result<T, Failure>;

/// What all commands share.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) root: PathBuf,
    /// Where the store keeps owners, if that was said.
    pub(crate) owners: Option<OwnersName>,
    /// The same of a new store, if it was not.
    pub(crate) owners_of_new: Option<OwnersName>,
    pub(crate) driver: DriverName,
    pub(crate) json: bool,
    /// Whether this process may be taken for root.
    pub(crate) privileged: bool,
    pub(crate) interrupt: Interrupt,
}

/// Whether a command may be the first that uses its store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Missing {
    Create,
    Refuse,
}

pub(crate) fn run(context: &Context, command: Command) -> Result {
    match command {
        Command::Info => upkeep::info(context),
        Command::Import(args) => images::import(context, args),
        Command::Save(args) => images::save(context, &args),
        Command::Apply(args) => layers::apply(context, args),
        Command::Adopt(args) => adopt::adopt(context, args),
        Command::Export(args) => layers::export(context, &args),
        Command::Prepare(args) => snapshots::prepare(context, args),
        Command::View(args) => snapshots::view(context, args),
        Command::Mounts(args) => mounts::mounts(context, &args),
        Command::Mount(args) => mounts::mount(context, &args),
        Command::Umount(args) => mounts::umount(context, &args),
        Command::Settle(args) => settle::settle(context, args),
        Command::Commit(args) => snapshots::commit(context, args),
        Command::Diff(args) => layers::diff(context, &args),
        Command::Ls(args) => snapshots::ls(context, &args),
        Command::Stat(args) => snapshots::stat(context, &args),
        Command::Usage(args) => snapshots::usage(context, &args),
        Command::Rm(args) => snapshots::rm(context, &args),
        Command::Gc => upkeep::gc(context),
        Command::Check => upkeep::check(context),
        #[cfg(feature = "fuse")]
        Command::Run(args) => run::run(context, args),
        #[cfg(feature = "fuse")]
        Command::Unshare(args) => unshare::unshare(context, args),
        Command::Layer(Layer::Apply(args)) => layers::apply_to_directory(context, args),
        Command::Layer(Layer::Diff(args)) => layers::diff_directories(context, &args),
    }
}

impl Context {
    fn open(&self, missing: Missing) -> Result<Store> {
        #[cfg(feature = "fuse")]
        // What a command mounts is to be there when it has ended.
        return self.open_served_by(missing, FuseServer::Helper(HelperCommand::CurrentExe));
        #[cfg(not(feature = "fuse"))]
        self.open_by(missing, self.options())
    }

    #[cfg(feature = "fuse")]
    fn open_served_by(&self, missing: Missing, server: FuseServer) -> Result<Store> {
        let mut options = self.options();
        options.fuse_server = server;
        self.open_by(missing, options)
    }

    fn options(&self) -> StoreOptions {
        let mut options = StoreOptions::new();
        options.owners = self.owners.map(OwnersName::owners);
        options.driver = self.driver.choice();
        options
    }

    fn open_by(&self, missing: Missing, mut options: StoreOptions) -> Result<Store> {
        options.create = false;
        match Store::open(&self.root, options.clone()) {
            Err(e) if e.kind() == ErrorKind::NotFound && missing == Missing::Create => {}
            opened => return Ok(opened?),
        }
        options.create = true;
        options.owners = options.owners.or(self.owners_of_new.map(OwnersName::owners));
        Ok(Store::open(&self.root, options)?)
    }

    fn print(&self, report: &impl Report) -> Result {
        output::print(self.json, report)
    }

    fn reporter(&self) -> Reporter {
        Reporter::new(self.interrupt.clone())
    }

    /// As [`Context::input`], of an archive: there is at least a byte of it.
    fn archive(&self, path: &Path) -> Result<Box<dyn Read>> {
        let mut input = self.input(path)?;
        let mut start = vec![0; 4096];
        let n = loop {
            match input.read(&mut start) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Failure::io("read", path, e)),
                Ok(0) => return Err(Failure::empty_archive(path)),
                Ok(n) => break n,
            }
        };
        start.truncate(n);
        Ok(Box::new(io::Cursor::new(start).chain(input)))
    }

    /// `path` opened, or standard input for `-`.
    fn input(&self, path: &Path) -> Result<Box<dyn Read>> {
        if path != Path::new("-") {
            let fail = |e| Failure::io("open", path, e);
            let kind = fs::metadata(path).map_err(fail)?.file_type();
            if kind.is_dir() {
                return Err(fail(io::ErrorKind::IsADirectory.into()));
            }
            return Ok(if kind.is_file() {
                Box::new(File::open(path).map_err(fail)?)
            } else {
                let input = OpenedWhenRead { path: path.to_owned(), file: None };
                Box::new(self.interrupt.reader(input))
            });
        }
        let stdin = io::stdin();
        if stdin.is_terminal() {
            return Err(Failure::Usage(
                "standard input is a terminal: name a file, or redirect one to it".to_owned(),
            ));
        }
        let fail = |e| Failure::io("read", Path::new("standard input"), e);
        let stdin = File::from(stdin.as_fd().try_clone_to_owned().map_err(fail)?);
        Ok(if stdin.metadata().map_err(fail)?.is_file() {
            Box::new(stdin)
        } else {
            Box::new(self.interrupt.reader(stdin))
        })
    }
}

/// Opening a named pipe waits for somebody at its other end, for ever maybe: so that is done where the
/// reading is.
struct OpenedWhenRead {
    path: PathBuf,
    file: Option<File>,
}

impl Read for OpenedWhenRead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let file = match self.file.take() {
            Some(file) => file,
            None => File::open(&self.path)?,
        };
        self.file.insert(file).read(buffer)
    }
}

/// The snapshot that `name` means: the one of that name, else the top of the image of that name.
/// None is the empty tree, which an image without layers has.
fn snapshot_or_top(store: &Store, name: &str) -> Result<Option<String>> {
    match store.stat(name) {
        Ok(info) => Ok(Some(info.key)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(image(store, name)?.layers.pop()),
        Err(e) => Err(e.into()),
    }
}

/// As [`snapshot_or_top`], where the empty tree will not do.
fn snapshot(store: &Store, name: &str) -> Result<String> {
    snapshot_or_top(store, name)?
        .ok_or_else(|| Failure::Usage(format!("the image {name:?} has no layers")))
}

/// The image `name`, once no snapshot has that name.
fn image(store: &Store, name: &str) -> Result<ImageRecord> {
    store.image(name).map_err(|e| match e.kind() {
        ErrorKind::NotFound => {
            Failure::NotFound(format!("there is neither a snapshot nor an image {name:?}"))
        }
        _ => e.into(),
    })
}
