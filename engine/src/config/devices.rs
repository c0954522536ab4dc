//! Options that name GPUs, or a rate.

#![forbid(unsafe_code)]

use pegaflow_shm::control::DeviceUuid;

use super::value::{BadValue, Kind, Size, quoted};
use crate::device::DeviceChoice;

/// Which GPUs: `auto`, `off`, or UUIDs as `nvidia-smi -L` prints them, separated by commas.
pub(super) struct Gpus;
impl Kind for Gpus {
    type Value = DeviceChoice;
    fn parse(text: &str) -> Result<DeviceChoice, BadValue> {
        match text {
            "auto" => return Ok(DeviceChoice::Auto),
            "off" => return Ok(DeviceChoice::Off),
            _ => {}
        }
        let mut uuids = Vec::new();
        for word in text.split(',').map(str::trim) {
            let uuid = uuid(word).ok_or_else(|| {
                BadValue(format!(
                    "`{word}` is no UUID of a GPU: give auto, off, or UUIDs as `nvidia-smi -L` \
                     prints them, separated by commas"
                ))
            })?;
            if !uuids.contains(&uuid) {
                uuids.push(uuid);
            }
        }
        Ok(DeviceChoice::Only(uuids))
    }
    fn show(value: &DeviceChoice) -> String {
        match value {
            DeviceChoice::Auto => quoted("auto"),
            DeviceChoice::Off => quoted("off"),
            DeviceChoice::Only(uuids) => {
                let uuids: Vec<String> = uuids.iter().map(|uuid| format!("GPU-{uuid}")).collect();
                quoted(&uuids.join(","))
            }
        }
    }
}

/// 32 hex digits with or without dashes, behind `GPU-`, `MIG-` or nothing.
fn uuid(word: &str) -> Option<DeviceUuid> {
    let bare = word.strip_prefix("GPU-").or(word.strip_prefix("MIG-"));
    let digits = bare.unwrap_or(word).replace('-', "");
    if digits.len() != 32 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let number = u128::from_str_radix(&digits, 16).ok()?;
    Some(DeviceUuid(number.to_be_bytes()))
}

/// Bytes a second, with or without a unit; or `off` for no limit.
pub(super) struct Rate;
impl Kind for Rate {
    type Value = Option<u64>;
    fn parse(text: &str) -> Result<Option<u64>, BadValue> {
        if text == "off" {
            return Ok(None);
        }
        let bytes = Size::parse(text.strip_suffix("/s").unwrap_or(text));
        bytes.map(Some).map_err(|_| {
            BadValue("give off, or bytes a second with or without a unit: 10GB, 512MiB".into())
        })
    }
    fn show(value: &Option<u64>) -> String {
        value.as_ref().map_or_else(|| quoted("off"), Size::show)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_nvidia_smi_names_them() {
        let text = "GPU-0a000000-0000-0000-0000-0000000000ff";
        let mut uuid = DeviceUuid([0; 16]);
        (uuid.0[0], uuid.0[15]) = (0x0a, 0xff);
        let one = DeviceChoice::Only(vec![uuid]);
        assert_eq!(Gpus::parse(text), Ok(one.clone()));
        assert_eq!(
            Gpus::parse(&format!("{text}, {}", &text[4..])),
            Ok(one.clone())
        );
        assert_eq!(Gpus::parse(&text.replace("GPU", "MIG")), Ok(one.clone()));
        assert_eq!(Gpus::show(&one), format!("\"{text}\""));
        for wrong in [
            "",
            "0",
            "GPU-1",
            "auto,off",
            "GPU-0a000000-0000-0000-0000-0000000000zz",
        ] {
            assert!(Gpus::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_rate_is_a_size_a_second_or_off() {
        assert_eq!(Rate::parse("off"), Ok(None));
        assert_eq!(Rate::parse("2MiB/s"), Ok(Some(2 << 20)));
        assert_eq!(Rate::parse("20GB"), Ok(Some(20_000_000_000)));
        assert!(Rate::parse("fast").is_err());
        assert_eq!(Rate::show(&Some(2 << 20)), "\"2MiB\"");
    }
}
