//! Which words a session hears depends on the version that it negotiated.

use std::os::fd::AsFd;
use std::time::Duration;

use pegaflow_shm::control::{
    ClientMessage, DaemonMessage, DeviceHandle, DeviceUuid, Hello, MemoryRef, PROTOCOL_DEVICES,
    PROTOCOL_DRAINING, PROTOCOL_MAX, PROTOCOL_MIN,
};
use pegaflow_shm::status::Status;

use super::{Rig, c2d, group, hello_spec, register, worker};

fn hello_of(protocol_min: u32, protocol_max: u32) -> ClientMessage {
    ClientMessage::Hello(Hello {
        protocol_min,
        protocol_max,
        ..hello_spec()
    })
}

#[test]
fn every_version_that_is_served_is_spoken_to_the_client_that_asks_for_it() {
    let rig = Rig::start();
    for version in PROTOCOL_MIN..=PROTOCOL_MAX {
        let client = rig.connect();
        client.send_fds(&hello_of(version, version), &[c2d().as_fd()]);
        let DaemonMessage::Welcome(welcome) = client.receive() else {
            panic!("no welcome in protocol {version}");
        };
        assert_eq!(welcome.protocol, version);
    }
}

#[test]
fn a_client_without_a_common_version_is_told_both_ranges() {
    let rig = Rig::start();
    let client = rig.connect();
    let newer = hello_of(PROTOCOL_MAX + 1, PROTOCOL_MAX + 4);
    client.send_fds(&newer, &[c2d().as_fd()]);
    let theirs = format!("{} to {}", PROTOCOL_MAX + 1, PROTOCOL_MAX + 4);
    let ours = format!("{PROTOCOL_MIN} to {PROTOCOL_MAX}");
    client.is_refused(
        Status::VersionMismatch,
        &[&theirs, &ours, "upgrade the older one"],
    );
}

#[test]
fn only_sessions_that_know_the_word_are_told_of_draining() {
    let mut rig = Rig::start();
    let sessions: Vec<_> = (PROTOCOL_MIN..=PROTOCOL_MAX)
        .map(|version| {
            let client = rig.connect();
            client.send_fds(&hello_of(version, version), &[c2d().as_fd()]);
            assert!(matches!(client.receive(), DaemonMessage::Welcome(_)));
            (version, client)
        })
        .collect();
    rig.control.announce_draining(Duration::from_millis(1500));
    assert!(rig.stop(), "every session went");
    for (version, client) in sessions {
        let mut heard = client.receive();
        if version >= PROTOCOL_DRAINING {
            assert_eq!(heard, DaemonMessage::Draining { limit_ms: 1500 });
            heard = client.receive();
        }
        let status = Status::Draining;
        assert!(
            matches!(&heard, DaemonMessage::Closing { status: found, .. } if *found == status),
            "protocol {version}: {heard:?}"
        );
        client.is_closed();
    }
}

#[test]
fn only_sessions_that_negotiated_them_may_speak_of_devices() {
    let rig = Rig::start();
    let mut replicated = group(MemoryRef::Process);
    replicated.replicated = true;
    let device = DeviceUuid([7; 16]);
    let words = [
        ClientMessage::AddDeviceChunks { seq: 1, region: 2 },
        ClientMessage::AddEvents {
            seq: 1,
            device,
            handles: Vec::new(),
        },
        ClientMessage::AddDeviceRegion {
            seq: 1,
            region: 2,
            bytes: 3,
            device,
            handle: DeviceHandle::Vmm { chunks: Vec::new() },
        },
        register(worker(vec![replicated])),
    ];
    for version in PROTOCOL_MIN..=PROTOCOL_MAX {
        for word in &words {
            let client = rig.connect();
            client.send_fds(&hello_of(version, version), &[c2d().as_fd()]);
            assert!(matches!(client.receive(), DaemonMessage::Welcome(_)));
            client.send(word);
            if version < PROTOCOL_DEVICES {
                client.is_faulted(&format!("protocol {version}"));
            } else {
                // Sound words are taken: a replicated group of process memory needs no device.
                let answer = client.receive();
                let known = matches!(word, ClientMessage::Register { .. });
                let taken = matches!(answer, DaemonMessage::Registered { .. });
                let refused = matches!(answer, DaemonMessage::Failed { .. });
                assert!(if known { taken } else { refused }, "{answer:?}");
            }
        }
    }
}
