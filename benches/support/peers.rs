//! Other programs that do the same, where they are installed.

use std::ffi::OsStr;
use std::process::{Command, Output, Stdio};

/// A program that is there, with the first line of what it says of its version; else says that what
/// it is for is skipped.
pub fn find(program: &str) -> Option<Peer> {
    match Command::new(program).arg("--version").stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            println!("peer: {}", text.lines().next().unwrap_or(program));
            Some(Peer(program.to_owned()))
        }
        Ok(output) => skip(program, &format!("--version gives {}", output.status)),
        Err(e) => skip(program, &e.to_string()),
    }
}

fn skip(program: &str, why: &str) -> Option<Peer> {
    println!("skipped: {program}: {why}");
    None
}

/// A program that is there.
pub struct Peer(String);

impl Peer {
    /// Runs it; whatever it prints is dropped, unless it fails.
    pub fn run(&self, arguments: &[&dyn AsRef<OsStr>]) -> Result<(), String> {
        let mut command = self.command(arguments);
        let output = command.stdin(Stdio::null()).output().map_err(|e| e.to_string())?;
        self.judge(&output)
    }

    /// Runs it, with its output as the input of `into`.
    pub fn pipe(
        &self,
        arguments: &[&dyn AsRef<OsStr>],
        into: &Peer,
        then: &[&dyn AsRef<OsStr>],
    ) -> Result<(), String> {
        let mut first = self.command(arguments);
        let mut first = first.stdout(Stdio::piped()).spawn().map_err(|e| e.to_string())?;
        let pipe = first.stdout.take().ok_or("no pipe")?;
        let second = into.command(then).stdin(pipe).output().map_err(|e| e.to_string())?;
        let first = first.wait_with_output().map_err(|e| e.to_string())?;
        into.judge(&second).and_then(|()| self.judge(&first))
    }

    fn command(&self, arguments: &[&dyn AsRef<OsStr>]) -> Command {
        let mut command = Command::new(&self.0);
        for argument in arguments {
            command.arg(argument.as_ref());
        }
        command
    }

    fn judge(&self, output: &Output) -> Result<(), String> {
        let said = String::from_utf8_lossy(&output.stderr);
        match output.status.success() {
            true => Ok(()),
            false => Err(format!("{} {}: {}", self.0, output.status, said.trim())),
        }
    }
}
