//! GPU memory and events that a client shares: their names, and how they are written down.

use std::fmt;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Most physical allocations that one region of the VMM API consists of.
pub const MAX_REGION_CHUNKS: usize = 8192;
/// Most descriptors of such allocations beside one message.
pub const MAX_MESSAGE_CHUNKS: usize = 64;
/// Most events of one session on one device.
pub const MAX_DEVICE_EVENTS: usize = 256;

/// A GPU, or a MIG instance of one, by the UUID that the driver gives it: the same in every process
/// and container, whatever ordinal `CUDA_VISIBLE_DEVICES` gives it there. 32 hex digits in JSON.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceUuid(pub [u8; 16]);

impl fmt::Display for DeviceUuid {
    /// In groups, as `nvidia-smi -L` writes it behind `GPU-` or `MIG-`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            let dash = if matches!(at, 4 | 6 | 8 | 10) {
                "-"
            } else {
                ""
            };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for DeviceUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceUuid({self})")
    }
}

impl Serialize for DeviceUuid {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize_hex(&self.0, serializer)
    }
}

impl<'de> Deserialize<'de> for DeviceUuid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<DeviceUuid, D::Error> {
        deserialize_hex(deserializer).map(DeviceUuid)
    }
}

/// A handle of CUDA's interprocess calls (`CUipcMemHandle`, `CUipcEventHandle`): opaque, and good
/// while the process that made it lives. 128 hex digits in JSON.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct IpcHandle(pub [u8; 64]);

impl fmt::Debug for IpcHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IpcHandle({})", hex::encode(self.0))
    }
}

impl Serialize for IpcHandle {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize_hex(&self.0, serializer)
    }
}

impl<'de> Deserialize<'de> for IpcHandle {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<IpcHandle, D::Error> {
        deserialize_hex(deserializer).map(IpcHandle)
    }
}

/// How the daemon gets at a region of device memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceHandle {
    /// One allocation of `cuMemAlloc` (or `cudaMalloc`), whole, from its first byte on.
    Ipc {
        /// Its `CUipcMemHandle`.
        handle: IpcHandle,
    },
    /// Physical allocations of `cuMemCreate` that are mapped one after the other. Their descriptors
    /// come beside this message and the [`AddDeviceChunks`](super::ClientMessage::AddDeviceChunks)
    /// that follow it, in this order.
    Vmm {
        /// Size of each in bytes; together they are the region.
        chunks: Vec<u64>,
    },
}

fn serialize_hex<S: Serializer, const N: usize>(
    bytes: &[u8; N],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&hex::encode(bytes))
}

fn deserialize_hex<'de, D: Deserializer<'de>, const N: usize>(
    deserializer: D,
) -> Result<[u8; N], D::Error> {
    let text = String::deserialize(deserializer)?;
    let mut bytes = [0; N];
    hex::decode_to_slice(&text, &mut bytes).map_err(|fault| {
        let (digits, given) = (2 * N, text.len());
        D::Error::custom(format!(
            "{digits} hex digits expected, {given} characters came: {fault}"
        ))
    })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::{ClientMessage, DaemonMessage, GroupLayout};
    use super::*;

    const UUID: DeviceUuid = DeviceUuid([
        0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 0, 1, 2, 3, 4, 5, 6, 0xff,
    ]);

    fn golden<M>(message: &M, text: &str)
    where
        M: Serialize + for<'de> Deserialize<'de> + PartialEq + fmt::Debug,
    {
        assert_eq!(serde_json::to_string(message).unwrap(), text);
        assert_eq!(&serde_json::from_str::<M>(text).unwrap(), message);
    }

    #[test]
    fn device_messages_are_golden() {
        let device = UUID;
        let uuid = "0123456789abcdef00010203040506ff";
        let (handle, digits) = (IpcHandle([0x5a; 64]), "5a".repeat(64));
        golden(
            &ClientMessage::AddDeviceRegion {
                seq: 1,
                region: 2,
                bytes: 3,
                device,
                handle: DeviceHandle::Ipc { handle },
            },
            &format!(
                r#"{{"type":"add_device_region","seq":1,"region":2,"bytes":3,"device":"{uuid}","handle":{{"ipc":{{"handle":"{digits}"}}}}}}"#
            ),
        );
        golden(
            &ClientMessage::AddDeviceRegion {
                seq: 1,
                region: 2,
                bytes: 6 << 20,
                device,
                handle: DeviceHandle::Vmm {
                    chunks: vec![2 << 20, 4 << 20],
                },
            },
            &format!(
                r#"{{"type":"add_device_region","seq":1,"region":2,"bytes":6291456,"device":"{uuid}","handle":{{"vmm":{{"chunks":[2097152,4194304]}}}}}}"#
            ),
        );
        golden(
            &ClientMessage::AddDeviceChunks { seq: 4, region: 2 },
            r#"{"type":"add_device_chunks","seq":4,"region":2}"#,
        );
        golden(
            &ClientMessage::AddEvents {
                seq: 5,
                device,
                handles: vec![handle],
            },
            &format!(r#"{{"type":"add_events","seq":5,"device":"{uuid}","handles":["{digits}"]}}"#),
        );
        golden(
            &DaemonMessage::DeviceDown {
                device,
                message: "why".into(),
            },
            &format!(r#"{{"type":"device_down","device":"{uuid}","message":"why"}}"#),
        );
        golden(
            &DaemonMessage::DeviceUp { device },
            &format!(r#"{{"type":"device_up","device":"{uuid}"}}"#),
        );
    }

    #[test]
    fn a_group_is_replicated_only_where_it_says_so() {
        let group = |replicated| GroupLayout {
            group: 1,
            num_blocks: 2,
            segments: Vec::new(),
            replicated,
        };
        golden(&group(false), r#"{"group":1,"num_blocks":2,"segments":[]}"#);
        golden(
            &group(true),
            r#"{"group":1,"num_blocks":2,"segments":[],"replicated":true}"#,
        );
    }

    #[test]
    fn a_uuid_reads_as_in_nvidia_smi_and_nothing_but_its_digits_is_one() {
        assert_eq!(UUID.to_string(), "01234567-89ab-cdef-0001-0203040506ff");
        for bad in [
            "",
            "0123",
            &UUID.to_string(),
            &"0".repeat(33),
            &"g".repeat(32),
        ] {
            let fault = serde_json::from_str::<DeviceUuid>(&format!("\"{bad}\"")).unwrap_err();
            assert!(fault.to_string().contains("32 hex digits"), "{fault}");
        }
    }

    #[test]
    fn the_longest_messages_about_devices_fit_a_packet() {
        let events = ClientMessage::AddEvents {
            seq: u64::MAX,
            device: UUID,
            handles: vec![IpcHandle([0xff; 64]); MAX_DEVICE_EVENTS],
        };
        let chunks = ClientMessage::AddDeviceRegion {
            seq: u64::MAX,
            region: u32::MAX,
            bytes: u64::MAX,
            device: UUID,
            // No chunk of a region within the address space of 47 bits is longer.
            handle: DeviceHandle::Vmm {
                chunks: vec![1 << 47; MAX_REGION_CHUNKS],
            },
        };
        for message in [events, chunks] {
            crate::seqpacket::check_length(&message).unwrap();
        }
    }
}
