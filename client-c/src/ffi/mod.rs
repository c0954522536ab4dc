//! The C ABI.

/// Path of the file this library was loaded from.
pub(crate) fn library_path() -> Option<std::path::PathBuf> {
    None
}
