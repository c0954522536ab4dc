//! A simulation of the daemon with its clients, from a seed.
//!
//! One thread plays everything: a lane over a small real pool, catalog and index, clients with real
//! rings and real memory, the copy threads, the control thread and the clock. Chance decides what
//! happens next: submissions with right and wrong arguments, turns of the lane, copies that go on,
//! fail or stop half-way, time, deaths of clients and of the daemon between any two steps and at
//! the named crash points, lost bells, hostile words. After every step the invariants of
//! `docs/design.md` are checked against a model of what is true. A seed decides all of it, so that
//! a failure can be looked at as often as it takes.
//!
//! | file | what it does |
//! | --- | --- |
//! | `plan` | what a run is made of: sizes, limits, processes, weights |
//! | `rng`, `time` | chance and time |
//! | `world` | daemon, processes, truth |
//! | `copies` | the copy threads |
//! | `drives` | what is below the pool |
//! | `kv` | memory whose bytes tell what they are |
//! | `session` | a client's end of rings, bells and arena |
//! | `steps` | the steps |
//! | `requests`, `completions` | what clients ask, and what they are answered |
//! | `control` | sessions and registrations come and go |
//! | `below` | drives go on, fail and stall, and what must hold of them |
//! | `hostile` | a client that writes anything anywhere |
//! | `crash` | daemons die and start |
//! | `quiet` | everything completes once the faults stop |
//! | `truth`, `check` | the model, and the invariants as checks |
//! | `seeds` | seeds that found something |
//! | `runs` | runs from the command line and in tests |

#![forbid(unsafe_code)]

mod below;
mod check;
mod completions;
mod control;
mod copies;
mod crash;
mod drives;
mod hostile;
mod kv;
mod plan;
mod quiet;
mod requests;
mod rng;
mod runs;
mod seeds;
mod session;
mod steps;
mod time;
mod truth;
mod world;
