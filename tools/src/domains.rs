//! Isolation domains in `status` and `cache`.

#![forbid(unsafe_code)]

use comfy_table::Table;
use pegaflow_shm::node::{DomainRow, field_text};
use serde_json::{Value, json};

use crate::output::{count, printable, size, table};

/// The domains as a JSON list.
pub fn domains_json(rows: &[DomainRow]) -> Value {
    let one = |row: &DomainRow| {
        json!({
            "name": field_text(&row.name),
            "key": format!("{:016x}", row.key),
            "sessions": row.sessions,
            "leases": row.leases,
            "blocks": row.blocks,
            "bytes": row.bytes,
            "pinned_blocks": row.pinned,
            "pins": row.pins,
        })
    };
    rows.iter().map(one).collect()
}

/// The domains as a table.
pub fn domains_table(rows: &[DomainRow]) -> Table {
    let header = [
        "isolation domain",
        "sessions",
        "leases",
        "blocks",
        "pinned",
        "bytes",
    ];
    let mut domains = table(&header, &[1, 2, 3, 4, 5]);
    for row in rows {
        domains.add_row([
            printable(&field_text(&row.name)),
            row.sessions.to_string(),
            count(row.leases),
            count(row.blocks),
            count(row.pinned),
            size(row.bytes),
        ]);
    }
    domains
}

/// The domains that have sessions or blocks, in one line.
pub fn domains_line(rows: &[DomainRow]) -> String {
    let used = rows.iter().filter(|row| row.sessions > 0 || row.bytes > 0);
    let one = |row: &DomainRow| {
        let name = printable(&field_text(&row.name));
        format!("{name} ({} sessions, {})", row.sessions, size(row.bytes))
    };
    let texts: Vec<String> = used.map(one).collect();
    if texts.is_empty() {
        "none in use".to_owned()
    } else {
        texts.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;
    use pegaflow_shm::node::text_field;

    use super::*;

    #[test]
    fn domains_are_shown_by_name() {
        let row = DomainRow {
            key: 1 << 63 | 5,
            used: 1,
            sessions: 2,
            bytes: 4096,
            name: text_field("serving"),
            ..DomainRow::zeroed()
        };
        let idle = DomainRow {
            name: text_field("uid-7"),
            ..DomainRow::zeroed()
        };
        let rows = [row, idle];
        assert_eq!(domains_json(&rows)[0]["key"], "8000000000000005");
        assert_eq!(domains_json(&rows)[1]["name"], "uid-7");
        assert!(domains_table(&rows).to_string().contains("uid-7"));
        assert_eq!(domains_line(&rows), "serving (2 sessions, 4.0 KiB)");
        assert_eq!(domains_line(&[idle]), "none in use");
    }
}
