//! The groups of another process.

use std::io;

/// The further groups of the process `pid`, from `/proc/PID/status`: see proc_pid_status(5).
pub(crate) fn supplementary(pid: u32) -> io::Result<Vec<u32>> {
    if pid == 0 {
        return Err(io::ErrorKind::NotFound.into());
    }
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    Ok(parse(&status))
}

fn parse(status: &str) -> Vec<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Groups:"));
    line.unwrap_or_default().split_whitespace().filter_map(|id| id.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_read_from_the_status() {
        assert_eq!(parse("Name:\tx\nGroups:\t4 24 1000 \nVmPeak:\t1 kB\n"), [4, 24, 1000]);
        assert_eq!(parse("Groups:\t \n"), Vec::<u32>::new());
        assert!(supplementary(std::process::id()).is_ok());
        assert!(supplementary(0).is_err());
    }
}
