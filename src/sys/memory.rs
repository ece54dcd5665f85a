//! Memory of the process.

/// Gives memory that was freed back to the system, where the allocator keeps it otherwise. Takes some
/// milliseconds; for who has just freed a lot.
///
/// Source: malloc_trim(3), which only the GNU library has.
pub(crate) fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
