//! GPUs in `status`.

#![forbid(unsafe_code)]

use comfy_table::Table;
use pegaflow_shm::node::{DeviceRow, field_text};
use serde_json::{Value, json};

use crate::output::{count, percent, printable, size, table};

/// The GPUs as a JSON list.
pub fn gpus_json(rows: &[DeviceRow]) -> Value {
    let one = |row: &DeviceRow| {
        json!({
            "uuid": field_text(&row.uuid),
            "name": field_text(&row.name),
            "ordinal": row.ordinal,
            "state": row.state_text(),
            "regions": row.regions,
            "copy_tasks": row.tasks,
            "saved_bytes": row.saved_bytes,
            "loaded_bytes": row.loaded_bytes,
            "save_busy_nanoseconds": row.save_busy_nanos,
            "load_busy_nanoseconds": row.load_busy_nanos,
            "direct_bytes": row.direct_bytes,
            "staged_bytes": row.staged_bytes,
            "bounced_bytes": row.bounced_bytes,
            "staging_bytes": row.staging_bytes,
            "downs": row.downs,
        })
    };
    rows.iter().map(one).collect()
}

/// The GPUs as a table; `None` when the daemon uses none.
pub fn gpus_table(rows: &[DeviceRow]) -> Option<Table> {
    if rows.is_empty() {
        return None;
    }
    let header = [
        "GPU", "name", "state", "regions", "tasks", "saved", "loaded", "staged", "bounced",
        "staging", "downs",
    ];
    let mut gpus = table(&header, &[3, 4, 5, 6, 7, 8, 9, 10]);
    for row in rows {
        let copied = row.saved_bytes + row.loaded_bytes;
        gpus.add_row([
            field_text(&row.uuid),
            printable(&field_text(&row.name)),
            row.state_text().to_owned(),
            row.regions.to_string(),
            count(row.tasks),
            size(row.saved_bytes),
            size(row.loaded_bytes),
            percent(row.staged_bytes, copied),
            percent(row.bounced_bytes, copied),
            size(row.staging_bytes),
            count(row.downs),
        ]);
    }
    Some(gpus)
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;
    use pegaflow_shm::node::text_field;

    use super::*;

    #[test]
    fn a_gpu_is_shown_with_its_state_and_how_its_bytes_went() {
        assert!(gpus_table(&[]).is_none());
        let row = DeviceRow {
            used: 1,
            state: 2,
            saved_bytes: 300,
            loaded_bytes: 100,
            staged_bytes: 100,
            uuid: text_field("00000000-0000-0000-0000-000000000007"),
            ..DeviceRow::zeroed()
        };
        let text = gpus_table(&[row]).map_or(String::new(), |table| table.to_string());
        for shown in ["-000000000007", "down", "25.00 %"] {
            assert!(text.contains(shown), "{shown} in {text}");
        }
        assert_eq!(gpus_json(&[row])[0]["state"], "down");
    }
}
