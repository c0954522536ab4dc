//! How tables, sizes and durations look.

#![forbid(unsafe_code)]

use bytesize::ByteSize;
use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

/// Prints `value` as one JSON object on one line of standard output.
pub fn print_json(value: &impl Serialize) {
    match serde_json::to_string(value) {
        Ok(text) => println!("{text}"),
        Err(error) => eprintln!("pegactl: cannot write JSON: {error}"),
    }
}

/// A table with a header; columns named in `right` are aligned to the right.
pub fn table(header: &[&str], right: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(header.iter().map(Cell::new));
    for position in right {
        if let Some(column) = table.column_mut(*position) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// A table of names and values, without a header.
pub fn facts<'a>(rows: impl IntoIterator<Item = (&'a str, String)>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    for (name, value) in rows {
        table.add_row([name.to_owned(), value]);
    }
    table
}

/// Bytes in binary units, such as `1.5 GiB`.
pub fn size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

/// A count with thousands separated by commas.
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Nanoseconds in the unit that suits them.
pub fn nanos(value: f64) -> String {
    match value {
        v if v < 1e3 => format!("{v:.0} ns"),
        v if v < 1e6 => format!("{:.2} us", v / 1e3),
        v if v < 1e9 => format!("{:.2} ms", v / 1e6),
        v => format!("{:.2} s", v / 1e9),
    }
}

/// A share as per cent, `-` of nothing.
pub fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        "-".to_owned()
    } else {
        format!("{:.2} %", 100.0 * part as f64 / whole as f64)
    }
}

/// `part / whole`, 0 of nothing.
pub fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

/// Seconds since `unix_ms` in words, such as `3m 12s`.
pub fn age(unix_ms: u64) -> String {
    duration(unix_now_ms().saturating_sub(unix_ms))
}

/// Milliseconds in words.
pub fn duration(ms: u64) -> String {
    let rounded = if ms < 10_000 { ms } else { ms / 1000 * 1000 };
    humantime::format_duration(std::time::Duration::from_millis(rounded)).to_string()
}

/// Unix time in milliseconds.
pub fn unix_now_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

/// Text for a terminal: control characters, which a peer could have put into a name, made visible.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_grouped_by_three() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(288_500), "288,500");
        assert_eq!(count(1_000_000), "1,000,000");
    }

    #[test]
    fn durations_take_the_unit_that_suits() {
        assert_eq!(nanos(110.0), "110 ns");
        assert_eq!(nanos(23_400.0), "23.40 us");
        assert_eq!(nanos(1.5e6), "1.50 ms");
        assert_eq!(nanos(2e9), "2.00 s");
    }

    #[test]
    fn a_ratio_of_nothing_is_no_number_to_divide_by() {
        assert_eq!(ratio(0, 0), 0.0);
        assert_eq!(percent(1, 0), "-");
        assert_eq!(percent(1, 4), "25.00 %");
    }

    #[test]
    fn names_cannot_drive_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb"), "a\u{fffd}[2Jb");
    }
}
