//! `top`: a live screen of rates, read from shared memory.

#![forbid(unsafe_code)]

mod sample;
mod screen;

use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use self::sample::{Rates, Sample};
use crate::error::ToolError;
use crate::node::{NodePlace, NodeView};
use crate::output::print_json;

/// Flags of `top`.
#[derive(Clone, Debug, clap::Args)]
pub struct TopArgs {
    /// Time between two refreshes, such as 500ms or 2s
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration)]
    pub interval: Duration,
    /// With --json: lines to print, one per interval [default: until interrupted]
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
}

/// Shortest refresh: the screen itself must stay cheap.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(50);

/// `pegactl top`.
///
/// # Errors
/// There is no such node, or the terminal cannot be used.
pub fn top(args: &TopArgs, place: &NodePlace, as_json: bool) -> Result<(), ToolError> {
    let interval = args.interval.max(SHORTEST_INTERVAL);
    let view = NodeView::open(place)?;
    if as_json {
        print_lines(view, place, interval, args.count);
        return Ok(());
    }
    let mut terminal = ratatui::try_init().map_err(ToolError::io("taking the terminal"))?;
    let shown = run_screen(&mut terminal, view, place, interval);
    ratatui::restore();
    shown.map_err(ToolError::io("drawing on the terminal"))
}

/// A daemon that was started anew has a new file: the one mapped here would show its predecessor
/// for ever.
fn follow(view: NodeView, place: &NodePlace) -> NodeView {
    match NodeView::open(place) {
        Ok(newer) if newer.header.boot_id != view.header.boot_id => newer,
        _ => view,
    }
}

fn print_lines(mut view: NodeView, place: &NodePlace, interval: Duration, count: Option<u64>) {
    let mut before = Sample::take(&view);
    let mut printed = 0;
    while count.is_none_or(|count| printed < count) {
        std::thread::sleep(interval);
        view = follow(view, place);
        let now = Sample::take(&view);
        print_json(&Rates::between(&before, &now).json(&view));
        before = now;
        printed += 1;
    }
}

fn run_screen(
    terminal: &mut ratatui::DefaultTerminal,
    mut view: NodeView,
    place: &NodePlace,
    interval: Duration,
) -> std::io::Result<()> {
    let mut before = Sample::take(&view);
    let mut rates = Rates::between(&before, &before);
    loop {
        terminal.draw(|frame| screen::draw(frame, &view, &rates, interval))?;
        let next = Instant::now() + interval;
        while let Some(left) = next.checked_duration_since(Instant::now()) {
            if !event::poll(left)? {
                continue;
            }
            match event::read()? {
                Event::Key(key) if key.kind == KeyEventKind::Press => {
                    let interrupt = key.code == KeyCode::Char('c')
                        && key.modifiers.contains(KeyModifiers::CONTROL);
                    if interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                        return Ok(());
                    }
                }
                Event::Resize(..) => {
                    terminal.draw(|frame| screen::draw(frame, &view, &rates, interval))?;
                }
                _ => {}
            }
        }
        view = follow(view, place);
        let now = Sample::take(&view);
        rates = Rates::between(&before, &now);
        before = now;
    }
}
