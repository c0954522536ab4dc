mod checksum;
mod crew;
mod process;
mod region;
mod support;
mod workers;
