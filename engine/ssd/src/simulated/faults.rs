//! Drives that fail, hang and come back.
