mod fake;
mod plan;
mod rig;
mod worker;
