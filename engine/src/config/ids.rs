//! Users and groups by number or by name.

#![forbid(unsafe_code)]

use nix::unistd::{Group, User};

use super::value::{BadValue, Kind};

/// Whether a text names a user or a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    User,
    Group,
}

impl Who {
    /// Reads an id. A number need not be known to this machine: it may be that of a container.
    pub(super) fn resolve(self, text: &str) -> Result<u32, BadValue> {
        let (what, flag) = match self {
            Who::User => ("user", "u"),
            Who::Group => ("group", "g"),
        };
        if let Ok(number) = text.parse::<u32>() {
            // The kernel's word for "no id".
            return match number {
                u32::MAX => Err(BadValue(format!("`{text}` is no {what} id"))),
                number => Ok(number),
            };
        }
        let found = match self {
            Who::User => User::from_name(text).map(|user| user.map(|user| user.uid.as_raw())),
            Who::Group => Group::from_name(text).map(|group| group.map(|group| group.gid.as_raw())),
        };
        match found {
            Ok(Some(id)) => Ok(id),
            Ok(None) => Err(BadValue(format!(
                "`{text}` is no {what} of this machine: give a name that `getent` knows, or a number, \
                 as `id -{flag}` prints it"
            ))),
            Err(errno) => Err(BadValue(format!(
                "the {what} `{text}` cannot be looked up: {errno}; give a number"
            ))),
        }
    }

    fn parse_list(self, text: &str) -> Result<Vec<u32>, BadValue> {
        let parts = text.split(',').map(str::trim);
        let ids: Result<Vec<u32>, BadValue> = parts
            .filter(|part| !part.is_empty())
            .map(|part| self.resolve(part))
            .collect();
        Ok(sorted(ids?))
    }
}

/// Ids in order, each once.
pub(super) fn sorted(mut ids: Vec<u32>) -> Vec<u32> {
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Ids as a TOML list.
pub(super) fn show(ids: &[u32]) -> String {
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    format!("[{}]", ids.join(", "))
}

/// Users, separated by commas.
pub(super) struct Uids;
impl Kind for Uids {
    type Value = Vec<u32>;
    fn parse(text: &str) -> Result<Vec<u32>, BadValue> {
        Who::User.parse_list(text)
    }
    fn show(value: &Vec<u32>) -> String {
        show(value)
    }
}

/// Groups, separated by commas.
pub(super) struct Gids;
impl Kind for Gids {
    type Value = Vec<u32>;
    fn parse(text: &str) -> Result<Vec<u32>, BadValue> {
        Who::Group.parse_list(text)
    }
    fn show(value: &Vec<u32>) -> String {
        show(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_ids() {
        assert_eq!(Who::User.resolve("root"), Ok(0));
        assert_eq!(Who::Group.resolve("root"), Ok(0));
        assert_eq!(Who::User.resolve("4000000000"), Ok(4_000_000_000));
        assert_eq!(Uids::parse("7, root,7"), Ok(vec![0, 7]));
        assert_eq!(Gids::parse(""), Ok(vec![]));
    }

    #[test]
    fn an_unknown_name_and_the_id_that_is_none_are_refused() {
        for (who, word) in [(Who::User, "id -u"), (Who::Group, "id -g")] {
            let refused = who.resolve("no-such-name-here").unwrap_err().to_string();
            assert!(
                refused.contains("no-such-name-here") && refused.contains(word),
                "{refused}"
            );
            assert!(who.resolve("4294967295").is_err());
        }
        assert!(Uids::parse("1,-2").is_err());
    }
}
