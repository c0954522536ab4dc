//! `ssd`: shards as they lie on their drives, with or without a daemon that uses them.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use clap::Args;
use comfy_table::Table;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pegaflow_shm::node::{SsdRow, field_text};
use pegaflow_ssd::{BadPage, ShardFill, ShardLayout, ShardView, Verified};
use serde_json::{Value, json};

use crate::error::ToolError;
use crate::node::{Liveness, NodePlace, NodeView};
use crate::output::{age, count, percent, print_json, size, table};

/// Damaged pages that a table shows; JSON has all.
const SHOWN: usize = 20;
const STYLE: &str = "{msg} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta}";

/// Flags of `ssd`.
#[derive(Clone, Debug, Args)]
pub struct SsdArgs {
    /// Files of the shards, as the daemon's --ssd names them [default: those of the daemon of
    /// --node]
    #[arg(value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Read every page and compare its checksum; beside a daemon this takes bandwidth from it
    #[arg(long)]
    pub verify: bool,
}

/// [`SsdRow::state`] of a shard that takes no requests.
const DEGRADED: u32 = 2;
/// How long a drive may take to show anything of a shard: for one that the daemon found out of
/// order, and for others, whose tables may be large.
const BRIEF: Duration = Duration::from_secs(2);
const PATIENT: Duration = Duration::from_secs(60);

/// What is known of one shard.
struct Seen {
    path: PathBuf,
    /// None if it shows nothing.
    file: Option<SeenFile>,
    /// Why it does not, unless its drive does not answer.
    error: Option<String>,
    /// What the daemon that uses it says of it.
    health: Option<Health>,
}

/// What its file shows.
struct SeenFile {
    layout: ShardLayout,
    fill: ShardFill,
    verified: Option<Verified>,
}

struct Health {
    state: &'static str,
    reason: String,
}

impl Seen {
    /// What is wrong, in words. Empty if nothing is. Blocks that are not whole and table chunks
    /// that are not valid are no harm: crashes and reclaimed segments leave them.
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        match self.file.as_ref().map(|file| &file.layout) {
            Some(layout) if layout.file_bytes < layout.expected_bytes => problems.push(format!(
                "the file was cut: {} instead of {}",
                size(layout.file_bytes),
                size(layout.expected_bytes)
            )),
            Some(_) => {}
            None => {
                let why = self.error.as_deref().unwrap_or("its drive does not answer");
                problems.push(format!("{why}: nothing of the file is shown"));
            }
        }
        if let Some(health) = self
            .health
            .as_ref()
            .filter(|health| !health.reason.is_empty())
        {
            problems.push(format!("{}: {}", health.state, health.reason));
        }
        let verified = self.file.iter().flat_map(|file| &file.verified);
        let bad: usize = verified.map(|verified| verified.bad_pages.len()).sum();
        if bad > 0 {
            problems.push(format!("{} damaged pages", count(bad as u64)));
        }
        problems
    }
}

/// `pegactl ssd`. True if nothing is wrong with any shard.
///
/// # Errors
/// A file is not a shard, or cannot be read, and no daemon serves without it.
pub fn ssd(args: &SsdArgs, place: &NodePlace, as_json: bool) -> Result<bool, ToolError> {
    // Named shards can be looked at without any daemon.
    let (rows, runs) = match NodeView::open(place) {
        Ok(view) => (view.reader.ssds(), view.liveness() != Liveness::Dead),
        Err(error) if args.paths.is_empty() => return Err(error),
        Err(_) => (Vec::new(), false),
    };
    let mut paths = args.paths.clone();
    if paths.is_empty() {
        paths.extend(rows.iter().map(|row| PathBuf::from(field_text(&row.path))));
    }
    if paths.is_empty() {
        return Err(ToolError::Plan(format!(
            "the daemon of node {} has no SSD tier: name the files of shards",
            place.node
        )));
    }
    let seen: Vec<Seen> = paths
        .iter()
        .map(|path| {
            // The daemon's are absolute.
            let full = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            let is_its = |row: &&SsdRow| Path::new(&field_text(&row.path)) == full;
            // Of a daemon that died, the node file is the last state.
            look(path, rows.iter().filter(|_| runs).find(is_its), args.verify)
        })
        .collect::<Result<_, _>>()?;
    let fine = seen.iter().all(|shard| shard.problems().is_empty());
    if as_json {
        let shards: Vec<Value> = seen.iter().map(to_json).collect();
        print_json(&json!({ "fine": fine, "shards": shards }));
        return Ok(fine);
    }
    println!("{}", layouts(&seen));
    println!("{}", fills(&seen));
    for shard in &seen {
        if let Some(bad) = bad_pages(shard) {
            println!("{bad}");
        }
        let problems = shard.problems();
        let words = if problems.is_empty() {
            match &shard.health {
                Some(health) => format!("fine, {} for the daemon", health.state),
                None => "fine".to_owned(),
            }
        } else {
            problems.join("; ")
        };
        println!("{}: {words}", shard.path.display());
    }
    Ok(fine)
}

/// Looks at a shard and at what the running daemon says of it.
fn look(path: &Path, row: Option<&SsdRow>, verify: bool) -> Result<Seen, ToolError> {
    // One that is not open yet is not locked.
    let opening = |row: &&SsdRow| row.state == DEGRADED;
    let patience = row.filter(opening).map_or(PATIENT, |_| BRIEF);
    let (file, error) = match look_at_file(path, verify, patience) {
        Ok(file) => (file, None),
        // The daemon serves without it, and the others are shown.
        Err(error) if row.is_some_and(|row| opening(&row)) => (None, Some(error.to_string())),
        Err(error) => return Err(error),
    };
    let used = file
        .as_ref()
        .is_none_or(|file| file.layout.used_by.is_some());
    let row = row.filter(|row| used || opening(row));
    let health = row.map(|row| Health {
        state: row.state_text(),
        reason: field_text(&row.reason),
    });
    Ok(Seen {
        path: path.to_owned(),
        file,
        error,
        health,
    })
}

/// Looks at a file on a thread of its own. None if the drive shows nothing more for so long: what
/// waits for it then ends with the program.
fn look_at_file(
    path: &Path,
    verify: bool,
    patience: Duration,
) -> Result<Option<SeenFile>, ToolError> {
    let (sender, receiver) = mpsc::channel();
    let pages = Arc::new(AtomicU64::new(0));
    let (seen, name) = (Arc::clone(&pages), path.to_owned());
    let started = std::thread::Builder::new().spawn(move || {
        // Nobody may wait any more.
        let _ = sender.send(see_file(&name, verify, &seen));
    });
    started.map_err(ToolError::io("start of a thread"))?;
    let mut before = 0;
    loop {
        match receiver.recv_timeout(patience) {
            Ok(seen) => return seen.map(Some),
            Err(_) => {
                let now = pages.load(Ordering::Relaxed);
                if now == before {
                    return Ok(None);
                }
                before = now;
            }
        }
    }
}

fn see_file(path: &Path, verify: bool, pages: &AtomicU64) -> Result<SeenFile, ToolError> {
    let view = ShardView::open(path)?;
    let failed = || ToolError::io(path.display().to_string());
    let fill = view.fill().map_err(failed())?;
    let verified = if verify {
        Some(verify_all(&view, path, pages).map_err(failed())?)
    } else {
        None
    };
    Ok(SeenFile {
        layout: view.layout(),
        fill,
        verified,
    })
}

fn verify_all(view: &ShardView, path: &Path, pages: &AtomicU64) -> std::io::Result<Verified> {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template(STYLE) {
        bar.set_style(style);
    }
    bar.set_message(path.display().to_string());
    let verified = view.verify(|done, total| {
        pages.fetch_add(1, Ordering::Relaxed);
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    verified
}

fn to_json(shard: &Seen) -> Value {
    let health = shard.health.as_ref().map(|health| {
        json!({
            "state": health.state, "reason": health.reason,
        })
    });
    let Some(SeenFile {
        layout,
        fill,
        verified,
    }) = &shard.file
    else {
        return json!({
            "path": shard.path, "answers": shard.error.is_some(), "error": shard.error,
            "health": health, "problems": shard.problems(),
        });
    };
    let page = |page: &BadPage| {
        json!({
            "scope": hex(&page.scope), "group": page.group, "hash": hex(&page.hash),
            "page": page.page, "file_offset": page.file_offset, "bytes": page.bytes,
            "error": page.error,
        })
    };
    let verified = verified.as_ref().map(|verified| {
        json!({
            "good_pages": verified.good_pages,
            "good_bytes": verified.good_bytes,
            "moved_pages": verified.moved_pages,
            "bad_pages": verified.bad_pages.iter().map(page).collect::<Vec<Value>>(),
        })
    });
    json!({
        "path": shard.path,
        "answers": true,
        "layout_version": layout.layout_version,
        "node": layout.node,
        "set": hex(&layout.set),
        "shard": hex(&layout.shard),
        "shards_of_set": layout.members,
        "created_unix_s": layout.created_unix_s,
        "file_bytes": layout.file_bytes,
        "expected_bytes": layout.expected_bytes,
        "segments": layout.segments,
        "segment_bytes": layout.segment_bytes,
        "table_bytes": layout.table_bytes,
        "used_by_pid": layout.used_by,
        "blank_segments": fill.blank_segments,
        "used_segments": fill.used_segments,
        "empty_segments": fill.empty_segments,
        "blocks": fill.blocks,
        "broken_blocks": fill.broken_blocks,
        "pages": fill.pages,
        "page_bytes": fill.page_bytes,
        "bad_chunks": fill.bad_chunks,
        "generation": fill.generation,
        "verified": verified,
        "health": health,
        "problems": shard.problems(),
    })
}

fn layouts(seen: &[Seen]) -> Table {
    let header = [
        "shard", "node", "set", "shards", "made", "size", "segments", "of", "used by",
    ];
    let mut layouts = table(&header, &[3, 5, 6, 7]);
    for shard in seen {
        let Some(SeenFile { layout, .. }) = &shard.file else {
            continue;
        };
        layouts.add_row([
            shard.path.display().to_string(),
            layout.node.clone(),
            hex(&layout.set[..4]),
            layout.members.to_string(),
            age(layout.created_unix_s * 1000),
            size(layout.file_bytes),
            count(u64::from(layout.segments)),
            size(u64::from(layout.segment_bytes)),
            layout
                .used_by
                .map_or("nobody".to_owned(), |pid| format!("process {pid}")),
        ]);
    }
    layouts
}

fn fills(seen: &[Seen]) -> Table {
    let header = [
        "shard",
        "blank",
        "used",
        "empty",
        "blocks",
        "pages",
        "bytes",
        "full",
        "good pages",
        "bad",
    ];
    let mut fills = table(&header, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
    for shard in seen {
        let Some(SeenFile {
            layout,
            fill,
            verified,
        }) = &shard.file
        else {
            continue;
        };
        let capacity = u64::from(layout.segments) * u64::from(layout.segment_bytes);
        let verified = |of: &dyn Fn(&Verified) -> u64| {
            verified
                .as_ref()
                .map_or("not read".to_owned(), |verified| count(of(verified)))
        };
        fills.add_row([
            shard.path.display().to_string(),
            count(u64::from(fill.blank_segments)),
            count(u64::from(fill.used_segments)),
            count(u64::from(fill.empty_segments)),
            count(fill.blocks),
            count(fill.pages),
            size(fill.page_bytes),
            percent(fill.page_bytes, capacity),
            verified(&|verified| verified.good_pages),
            verified(&|verified| verified.bad_pages.len() as u64),
        ]);
    }
    fills
}

fn bad_pages(shard: &Seen) -> Option<Table> {
    let bad = &shard.file.as_ref()?.verified.as_ref()?.bad_pages;
    if bad.is_empty() {
        return None;
    }
    let header = ["damaged block", "group", "page", "at byte", "length", "why"];
    let mut pages = table(&header, &[1, 2, 3, 4]);
    for page in bad.iter().take(SHOWN) {
        pages.add_row([
            hex(&page.hash),
            page.group.to_string(),
            page.page.to_string(),
            page.file_offset.to_string(),
            size(u64::from(page.bytes)),
            page.error
                .clone()
                .unwrap_or_else(|| "other checksum".to_owned()),
        ]);
    }
    Some(pages)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use bytemuck::Zeroable;
    use pegaflow_shm::node::text_field;
    use pegaflow_ssd::{BlockKey, Options, PageRef, PoolMemory, ShardSpec, Tier};

    use super::*;

    /// A shard with ten blocks.
    fn shard(path: &Path) {
        let spec = ShardSpec {
            path: path.to_owned(),
            bytes: Some(16 << 20),
        };
        let mut options = Options::new("test", vec![spec]);
        options.segment_bytes = 1 << 20;
        let content: Vec<u8> = (0..40_960u32).map(|at| (at % 251) as u8).collect();
        let pool = PoolMemory::with_content(&content);
        let (mut tier, _) = Tier::open(options, pool, || ()).expect("opens");
        for block in 0..10 {
            let key = BlockKey {
                scope: [1; 32],
                group: 0,
                hash: [block; 32],
            };
            let page = PageRef {
                offset: u64::from(block) * 4096,
                bytes: 4096,
                checksum: pegaflow_ssd::NO_CHECKSUM,
            };
            tier.write(Instant::now(), u64::from(block), &key, &[page])
                .expect("taken");
        }
        assert!(tier.close(Duration::from_secs(60)));
    }

    /// A place without any daemon.
    fn nowhere(folder: &Path) -> NodePlace {
        NodePlace {
            node: "nobody".to_owned(),
            shm_dir: folder.to_owned(),
        }
    }

    #[test]
    fn a_shard_is_described_and_every_damaged_page_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("shard");
        shard(&path);
        let args = SsdArgs {
            paths: vec![path.clone()],
            verify: true,
        };
        assert!(ssd(&args, &nowhere(folder.path()), true).expect("reads"));
        assert!(ssd(&args, &nowhere(folder.path()), false).expect("reads"));
        let seen = look(&path, None, true).expect("reads");
        let fill = &seen.file.as_ref().expect("seen").fill;
        assert_eq!((fill.blocks, fill.page_bytes), (10, 40_960));
        let json = to_json(&seen);
        assert_eq!(json["verified"]["good_pages"], 10);
        assert_eq!(json["node"], "test");
        // The second block's first byte.
        let mut file = std::fs::read(&path).expect("read");
        let content: Vec<u8> = (0..40_960u32).map(|at| (at % 251) as u8).collect();
        let mut pages = file.chunks(4096);
        let at = pages
            .position(|page| *page == content[4096..8192])
            .expect("there");
        file[at * 4096] ^= 1;
        std::fs::write(&path, file).expect("written");
        assert!(
            !ssd(&args, &nowhere(folder.path()), true).expect("reads"),
            "the exit status says so"
        );
        let seen = look(&path, None, true).expect("reads");
        assert_eq!(seen.problems(), ["1 damaged pages"]);
        assert!(bad_pages(&seen).is_some());
        assert_eq!(
            to_json(&seen)["verified"]["bad_pages"][0]["hash"],
            hex(&[1; 32])
        );
    }

    #[test]
    fn what_is_no_shard_is_shown_with_the_others_if_the_daemon_serves_without_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let (foreign, new) = (folder.path().join("notes"), folder.path().join("new"));
        std::fs::write(&foreign, b"something else").expect("written");
        for (path, why) in [
            (&foreign, "not an SSD shard"),
            (&new, "no shard has this name"),
        ] {
            let row = SsdRow {
                used: 1,
                state: DEGRADED,
                path: text_field(&path.display().to_string()),
                reason: text_field("not open"),
                ..SsdRow::zeroed()
            };
            let seen = look(path, Some(&row), false).expect("shown");
            let problems = seen.problems();
            assert_eq!(problems.len(), 2, "{problems:?}");
            assert!(problems[0].contains(why), "{problems:?}");
            assert_eq!(problems[1], "degraded: not open");
            let json = to_json(&seen);
            assert_eq!(json["answers"], true);
            assert!(
                json["error"]
                    .as_str()
                    .is_some_and(|text| text.contains(why))
            );
            let healthy = SsdRow { state: 0, ..row };
            assert!(look(path, Some(&healthy), false).is_err());
        }
    }

    #[test]
    fn what_is_no_shard_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("notes");
        std::fs::write(&path, b"something else").expect("written");
        let args = SsdArgs {
            paths: vec![path],
            verify: false,
        };
        let error = ssd(&args, &nowhere(folder.path()), true)
            .expect_err("it is no shard")
            .to_string();
        assert!(
            error.contains("notes") && error.contains("not an SSD shard"),
            "{error}"
        );
    }
}
