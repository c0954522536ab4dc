//! libFuzzer around `pegaflow_engine::fuzz::descriptors`.

#![no_main]
#![forbid(unsafe_code)]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| pegaflow_engine::fuzz::descriptors(data));
