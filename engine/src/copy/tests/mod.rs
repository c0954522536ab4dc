mod checksum;
mod crew;
mod owner;
mod process;
mod region;
mod support;
mod workers;
