//! Seeds that found something, and what. A change of what chance is asked changes what they mean:
//! then look for a seed that finds the defect again, with the guard taken out.

#![forbid(unsafe_code)]

/// Seeds that are run each time, with what each found when it was new.
pub const FOUND: &[(u64, &str)] = &[
    (
        2,
        "the lane slept without a bound while sessions were open: a lost bell cost its client for \
         ever",
    ),
    (
        17_730_101,
        "no room for a block though others could leave: of a victim's extents the same one, which \
         cannot be emptied, was tried again and again",
    ),
];
