//! The exported functions, in the words of the driver API's documentation.

mod context;
mod copy;
mod device;
mod event;
mod host;
mod init;
mod memory;
mod module;
mod pointers;
mod stream;
mod vmm;

use crate::code::{Code, Outcome};

/// Exports functions of the driver: each body gives an [`Outcome`].
macro_rules! exported {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name($($argument: $type),*) -> u32 {
            $crate::api::answer(stringify!($name), move || $body)
        }
    )*};
}
use exported;

/// What a function returns; with `EMULATED_CUDA_TRACE` set, refusals are told on standard error.
fn answer(name: &str, call: impl FnOnce() -> Outcome) -> u32 {
    let code = call().err().unwrap_or(Code::SUCCESS);
    let quiet = [Code::SUCCESS, Code::NOT_READY];
    if !quiet.contains(&code) && std::env::var_os("EMULATED_CUDA_TRACE").is_some() {
        eprintln!("emulated libcuda: {name}: {code:?} {:?}", code.name());
    }
    code.0
}
