//! What `top` draws.

#![forbid(unsafe_code)]

use std::time::Duration;

use pegaflow_shm::node::{Counter, Gauge, Histogram, field_text};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Block, Gauge as Bar, Paragraph, Row, Table};

use super::sample::Rates;
use crate::node::{Liveness, NodeView};
use crate::output::{age, count, duration, nanos, percent, printable, size};
use crate::status::rank_text;

/// Draws everything.
pub fn draw(frame: &mut Frame, view: &NodeView, rates: &Rates, interval: Duration) {
    let areas = Layout::vertical([
        Constraint::Length(2),
        Constraint::Length(3),
        Constraint::Length(7),
        Constraint::Min(4),
        Constraint::Length(1),
    ])
    .split(frame.area());
    head(frame, areas[0], view, rates);
    pool(frame, areas[1], view);
    let middle = Layout::horizontal([Constraint::Percentage(45), Constraint::Percentage(55)])
        .split(areas[2]);
    throughput(frame, middle[0], view, rates);
    latencies(frame, middle[1], rates);
    sessions(frame, areas[3], view);
    let help = format!(
        " q quits   refresh every {}",
        duration(interval.as_millis() as u64)
    );
    frame.render_widget(Paragraph::new(help).dim(), areas[4]);
}

fn head(frame: &mut Frame, area: Rect, view: &NodeView, rates: &Rates) {
    let color = match view.liveness() {
        Liveness::Alive => Color::Green,
        Liveness::Stopped => Color::Yellow,
        Liveness::Dead => Color::Red,
    };
    let header = &view.header;
    let cpu = rates
        .daemon_cpus
        .map_or_else(|| "-".to_owned(), |cpus| format!("{:.1} %", cpus * 100.0));
    let about = format!(
        "node {}   version {}   started {} ago   policy {}   CPU {cpu}",
        field_text(&header.node),
        field_text(&header.version),
        age(header.started_unix_ms),
        field_text(&header.policy),
    );
    let lines = vec![
        Line::from(view.daemon_sentence()).fg(color).bold(),
        Line::from(about),
    ];
    frame.render_widget(Paragraph::new(lines), area);
}

fn pool(frame: &mut Frame, area: Rect, view: &NodeView) {
    let gauge = |gauge| view.reader.gauge(gauge);
    let (used, total) = (gauge(Gauge::PoolUsedBytes), gauge(Gauge::PoolBytes));
    let share = if total == 0 {
        0.0
    } else {
        (used as f64 / total as f64).clamp(0.0, 1.0)
    };
    let label = format!(
        "{} of {}, {} blocks, {} pinned, {} leases",
        size(used),
        size(total),
        count(gauge(Gauge::BlocksHeld)),
        count(gauge(Gauge::BlocksPinned)),
        gauge(Gauge::Leases)
    );
    let bar = Bar::default()
        .block(Block::bordered().title(" pool "))
        .gauge_style(Style::new().fg(Color::Blue))
        .ratio(share)
        .label(label);
    frame.render_widget(bar, area);
}

fn throughput(frame: &mut Frame, area: Rect, view: &NodeView, rates: &Rates) {
    let rate = |counter| rates.per_second(counter);
    let copied = |counter| format!("{:.2} GB/s", rate(counter) / 1e9);
    let (hits, queried) = view.hits_of_queried();
    let lines = vec![
        Line::from(format!(
            "queries {:.0}/s   loads {:.0}/s   saves {:.0}/s",
            rate(Counter::RequestsQuery),
            rate(Counter::RequestsLoad),
            rate(Counter::RequestsSave)
        )),
        Line::from(format!(
            "hit ratio {} now, {} since the start",
            percent(rates.hits.0, rates.hits.1),
            percent(hits, queried)
        )),
        Line::from(format!(
            "saving {}   loading {}",
            copied(Counter::SavedBytes),
            copied(Counter::LoadedBytes)
        )),
        Line::from(format!(
            "sealed {:.0}/s   evicted {:.0}/s",
            rate(Counter::BlocksSealed),
            rate(Counter::EvictedCapacity)
        )),
        Line::from(format!(
            "errors {:.1}/s   bells {:.0}/s   lane parks {:.0}/s",
            rate(Counter::RequestErrors),
            rate(Counter::BellsRung),
            rate(Counter::LaneParks)
        )),
    ];
    frame.render_widget(
        Paragraph::new(lines).block(Block::bordered().title(" rates ")),
        area,
    );
}

fn latencies(frame: &mut Frame, area: Rect, rates: &Rates) {
    let rows = Histogram::ALL.iter().map(|histogram| {
        let snapshot = rates.histogram(*histogram);
        let at = |share| nanos(snapshot.quantile_nanos(share) as f64);
        let name = histogram
            .family()
            .trim_start_matches("pegaflow_")
            .trim_end_matches("_seconds");
        Row::new([name.to_owned(), count(snapshot.count), at(0.5), at(0.99)])
    });
    let widths = [
        Constraint::Length(10),
        Constraint::Length(10),
        Constraint::Length(12),
        Constraint::Length(12),
    ];
    let table = Table::new(rows, widths)
        .header(Row::new(["request", "count", "p50", "p99"]).bold())
        .block(Block::bordered().title(" latency in the daemon, this interval "));
    frame.render_widget(table, area);
}

fn sessions(frame: &mut Frame, area: Rect, view: &NodeView) {
    let rows: Vec<Row> = view
        .reader
        .sessions()
        .iter()
        .map(|row| {
            Row::new([
                row.session.to_string(),
                row.pid.to_string(),
                printable(&field_text(&row.client_name)),
                printable(&field_text(&row.instance)),
                rank_text(row),
                count(row.submissions),
                row.unfinished.to_string(),
            ])
        })
        .collect();
    let title = format!(" {} sessions ", rows.len());
    let widths = [
        Constraint::Length(8),
        Constraint::Length(8),
        Constraint::Fill(2),
        Constraint::Fill(2),
        Constraint::Length(10),
        Constraint::Length(13),
        Constraint::Length(10),
    ];
    let header = [
        "session",
        "pid",
        "name",
        "instance",
        "rank",
        "submissions",
        "unfinished",
    ];
    let table = Table::new(rows, widths)
        .header(Row::new(header).bold())
        .block(Block::bordered().title(title));
    frame.render_widget(table, area);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::NodePlace;
    use crate::node::tests::{fake_node, shm_folder};
    use crate::top::sample::Sample;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn screen_of(pid: u32) -> String {
        let root = shm_folder();
        let writer = fake_node(root.path(), "n", pid);
        writer.set(Gauge::PoolBytes, 100 << 20);
        writer.set(Gauge::PoolUsedBytes, 25 << 20);
        let place = NodePlace {
            node: "n".into(),
            shm_dir: root.path().into(),
        };
        let view = NodeView::open(&place).unwrap();
        let sample = Sample::take(&view);
        let rates = Rates::between(&sample, &sample);
        let mut terminal = Terminal::new(TestBackend::new(100, 24)).unwrap();
        terminal
            .draw(|frame| draw(frame, &view, &rates, Duration::from_secs(1)))
            .unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn the_screen_shows_pool_rates_and_sessions() {
        let text = screen_of(std::process::id());
        for expected in [
            "alive and idle",
            "25.0 MiB of 100.0 MiB",
            "hit ratio",
            "0 sessions",
            "q quits",
        ] {
            assert!(text.contains(expected), "{expected} in\n{text}");
        }
    }

    #[test]
    fn a_dead_daemon_is_called_dead() {
        assert!(screen_of(u32::MAX >> 1).contains("DEAD"));
    }
}
