//! libFuzzer around `pegaflow_ssd::fuzz::shard`.

#![no_main]
#![forbid(unsafe_code)]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| pegaflow_ssd::fuzz::shard(data));
